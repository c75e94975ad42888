"""The Triton kernels of token eviction: captured in a CUDA graph, and compiled for Hopper.

pytest -m gpu tests/kernels/test_eviction_graphs.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from focus_compile.kernels.compaction.op import compact_rows
from focus_compile.kernels.importance.op import importance
from focus_compile.kernels.ragged_attention.op import ragged_attention
from focus_compile.kernels.row_selection.op import select_rows, targets


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [1, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_captured_in_a_cuda_graph(sequences: int, dtype: torch.dtype) -> None:
    """And a replay reads what its inputs hold by then: other rows, starts, slots and lengths."""
    torch.manual_seed(0)
    block, length, rows = 32, 700, 32 * sequences
    q = torch.randn(2, 8, rows, 64, device="cuda").to(dtype)
    k = torch.randn(2, 2, rows, 64, device="cuda").to(dtype)
    cache = torch.randn(2, sequences, 2, length, 64, device="cuda").to(dtype)
    masked = torch.rand(rows, device="cuda") < 0.7
    counts = torch.full((sequences,), block, device="cuda")
    slot, lengths = torch.arange(sequences, device="cuda"), torch.full_like(counts, length)
    positions = torch.arange(rows, device="cuda") % block

    def step() -> list[Tensor]:
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        scores = [importance(q[i], k[i], masked, starts, block, 0.125) for i in range(2)]
        target = targets(counts, torch.ones(sequences, device="cuda"), 1.5)
        progress = torch.full_like(target, -1)
        keep = select_rows(
            scores[1] - scores[0], masked, positions, starts, target, progress, block
        )
        index, kept = compact_rows(keep, starts, rows // 2)
        out = ragged_attention(q[0][:, index], *cache, slot, kept, lengths, block, 0.125)
        return [*scores, keep, index, kept, out]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        masked.copy_(torch.rand(rows) < 0.5)
        counts.copy_(torch.randint(block + 1, (sequences,)))
        slot.copy_(torch.randperm(sequences))
        lengths.copy_(torch.randint(length + 1, (sequences,)))
        q.copy_(torch.randn(q.shape))
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).tolist()
        for s in range(sequences):
            positions[starts[s] : starts[s + 1]] = torch.arange(int(counts[s])).cuda()
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)


SCRIPT = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

folder, name, fixed, types, aligned, options = json.loads(sys.argv[1])
function = getattr(importlib.import_module(f"focus_compile.kernels.{folder}.kernel"), name)
names = function.arg_names
source = ASTSource(
    fn=function,
    signature={n: "constexpr" if n in fixed else types.get(n, "i32") for n in names},
    constexprs={(i,): fixed[n] for i, n in enumerate(names) if n in fixed},
    attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned},
)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(json.dumps({"shared": kernel.metadata.shared, "ttgir": kernel.asm["ttgir"]}))
"""


def compiled(
    folder: str,
    name: str,
    fixed: dict[str, object],
    types: dict[str, str],
    aligned: list[str],
    options: dict[str, int],
    cache: Path,
) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    given = json.dumps([folder, name, fixed, types, aligned, options])
    command = [sys.executable, "-c", SCRIPT, given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    made: dict[str, str] = json.loads(done.stdout)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "key_block"), [(True, 0), (False, 0), (True, 32)])
def test_the_attention_loop_is_pipelined(shared: bool, key_block: int, tmp_path: Path) -> None:
    """As that of `split_kv` is: see test_split_kv_compiled."""
    sizes = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_M": 64, "BLOCK_N": 64}
    strides = dict.fromkeys(("q_d", "k_d", "v_d", "slot_s", "lengths_s"), 1)
    fixed = sizes | strides | {"KEY_BLOCK": key_block, "SHARED": shared, "PRECISION": "tf32"}
    types = dict.fromkeys(("q", "k", "v"), "*bf16") | {"slot": "*i64", "lengths": "*i64"}
    if key_block == 0:
        fixed |= {"blocks": None, "candidates": None}
    types |= dict.fromkeys(("blocks", "candidates"), "*i64")
    types |= {"starts": "*i32", "scale": "fp32", "out": "*fp32" if shared else "*bf16"}
    if shared:
        types["sums"] = "*fp32"
    else:
        fixed["sums"] = None
    aligned = "q k v out q_h q_t k_s k_h k_n v_s v_h v_n".split()
    made = compiled(
        "ragged_attention", "_attend_share", fixed, types, aligned,
        {"num_warps": 4, "num_stages": 4}, tmp_path,
    )  # fmt: skip
    loop = next(part for part in made["ttgir"].split("scf.for") if "async_wait" in part)
    loop = loop[: loop.rindex("scf.yield")]
    assert loop.count("warp_group_dot ") == 2
    assert loop.count("async_copy_global_to_local") == 2
    assert loop.count("contiguity = 8") == 2
    moved = [line for line in loop.splitlines() if "convert_layout" in line]
    assert all("dot_op" in line for line in moved)


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "warps"), [(64, 4), (128, 8)])
def test_keys_stay_in_shared_memory(keys: int, warps: int, tmp_path: Path) -> None:
    """`importance` puts its three tiles of keys there before its loop over heads."""
    fixed = {
        "HEADS": 4, "GROUP": 4, "WIDTH": 128, "D": 128, "KEYS": keys, "QUERIES": 64,
        "PRECISION": "tf32", "q_d": 1, "k_d": 1, "masked_t": 1,
    }  # fmt: skip
    types = {"q": "*bf16", "k": "*bf16", "masked": "*u8", "starts": "*i32", "parts": "*fp32"}
    made = compiled(
        "importance", "_score_kernel", fixed, types | {"scale": "fp32"},
        ["q", "k", "parts", "q_h", "q_t", "k_h", "k_t"],
        {"num_warps": warps, "num_stages": 1}, tmp_path,
    )  # fmt: skip
    before, _, loop = made["ttgir"].partition("scf.for")
    assert (before.count("local_alloc"), loop.count("local_alloc")) == (3, 1)
    assert loop.count("warp_group_dot ") == 3
    assert int(made["shared"]) <= (3 * keys + 64) * 256 + 4096


@pytest.mark.slow
@pytest.mark.parametrize("starts", ["*i32", "*i64"])
def test_the_others_compile(starts: str, tmp_path: Path) -> None:
    strides = {"delta_t": 1, "masked_t": 1, "positions_t": 1, "target_s": 1, "progress_s": 1}
    types = {"delta": "*fp32", "masked": "*u8", "positions": "*i64", "starts": starts}
    types |= {"target": "*i64", "progress": "*i64", "out": "*u8"}
    for block in (16, 256):
        fixed = strides | {"BLOCK": block}
        options = {"num_warps": max(block // 32, 1)}
        compiled("row_selection", "_select_kernel", fixed, types, [], options, tmp_path)
    types = {"keep": "*u8", "starts": starts, "index": "*i64", "new_starts": starts}
    fixed = {"COUNTED": 4096, "PLACED": 256, "keep_t": 1}
    compiled("compaction", "_compact_kernel", fixed, types, [], {"num_warps": 4}, tmp_path)
    types = {"parts": "*fp32", "masked": "*u8", "starts": starts, "out": "*fp32"}
    fixed = {"SHARES": 32, "BLOCK": 128, "masked_t": 1}
    compiled("importance", "_sum_kernel", fixed, types, [], {"num_warps": 4}, tmp_path)
