"""The split-KV kernel compiled for Hopper, on any machine: what the compiler made of its loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from focus_compile.kernels.split_kv import _attend_share

fixed = json.loads(sys.argv[1])
options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
fixed |= {"mask": None, "lse": None, "q_d": 1, "k_d": 1, "v_d": 1}
if fixed["KEY_BLOCK"] == 0:
    fixed |= {"blocks": None, "sinks": None, "candidates": None}
types = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*fp32", "sums": "*fp32", "scale": "fp32"}
types |= dict.fromkeys(("blocks", "sinks", "candidates"), "*i64")
aligned = {"q", "k", "v", "out", "q_b", "q_h", "q_r", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t"}
names = _attend_share.arg_names
source = ASTSource(
    fn=_attend_share,
    signature={n: "constexpr" if n in fixed else types.get(n, "i32") for n in names},
    constexprs={(i,): fixed[n] for i, n in enumerate(names) if n in fixed},
    attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned},
)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(json.dumps({"shared": kernel.metadata.shared, "ttgir": kernel.asm["ttgir"]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key_block", "block_m", "block_n", "warps", "stages"),
    [(32, 64, 64, 4, 4), (0, 128, 64, 8, 3), (32, 128, 128, 8, 2)],
)
def test_the_loop_is_pipelined(
    key_block: int, block_m: int, block_n: int, warps: int, stages: int, tmp_path: Path
) -> None:
    """K and V are copied ahead, 16 bytes a thread, and multiplied by warp group from shared memory.

    Nothing changes its layout on the way: ids and addresses are made where they are used.
    """
    fixed = {
        "GROUP": 7,
        "HEAD_DIM": 128,
        "BLOCK_D": 128,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "KEY_BLOCK": key_block,
        "MASK": "none",
        "SHARED": True,
        "WANT_LSE": False,
        "PRECISION": "tf32",
        "num_warps": warps,
        "num_stages": stages,
    }
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", SCRIPT, json.dumps(fixed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    assert made["shared"] >= (block_m + 2 * stages * block_n) * 128 * 2
    loop = next(part for part in made["ttgir"].split("scf.for") if "async_wait" in part)
    loop = loop[: loop.rindex("scf.yield")]
    assert loop.count("warp_group_dot ") == 2
    assert loop.count("async_copy_global_to_local") == 2
    assert loop.count("contiguity = 8") == 2
    moved = [line for line in loop.splitlines() if "convert_layout" in line]
    assert all("dot_op" in line for line in moved)  # the weights, from one product to the other
