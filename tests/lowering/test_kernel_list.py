"""Generated code is read right: C++ as it is written here, Triton from an example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from focus_compile.lowering.kernel_list import (
    Launch,
    generated_code,
    launches_in,
    layers_of,
    summary,
)

TRITON = """
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.runtime.triton_heuristics import start_graph, end_graph
aten = torch.ops.aten
async_compile = AsyncCompile()

# kernel path: ab/cab.py
# Topologically Sorted Source Nodes: [x, norm], Original ATen: [aten.embedding, aten._to_copy, \
aten.pow, aten.mean, aten.rsqrt, aten.mul]
# Source node to ATen node mapping:
#   x => embedding
# Graph fragment:
#   %embedding : [num_users=2] = call_function[target=torch.ops.aten.embedding.default](args = ())
triton_red_fused__to_copy_embedding_mean_mul_pow_rsqrt_0 = \
async_compile.triton('triton_red_fused__to_copy_embedding_mean_mul_pow_rsqrt_0', '''
import triton
import triton.language as tl

@triton.jit
def triton_red_fused__to_copy_embedding_mean_mul_pow_rsqrt_0(in_ptr0, out_ptr0, xnumel):
    pass

def call(args):
    extern_kernels.mm(args)
    triton_red_fused__to_copy_embedding_mean_mul_pow_rsqrt_0.run(*args, grid=1)
''', device_str='cuda')

triton_tem_fused_mm_1 = async_compile.triton('triton_tem_fused_mm_1', '''
import triton
''', device_str='cuda')

async_compile.wait(globals())
del async_compile

class Runner:
    def call(self, args):
        arg0_1, arg1_1, arg2_1 = args
        args.clear()
        s34 = arg0_1.size()[1]
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            assert_size_stride(arg0_1, (1, s34), (s34, 1))
            buf1 = empty_strided_cuda((1, s34, 64), (64*s34, 64, 1), torch.bfloat16)
            # Topologically Sorted Source Nodes: [x, norm], Original ATen: [aten.embedding, \
aten._to_copy, aten.pow, aten.mean, aten.rsqrt, aten.mul]
            stream0 = get_raw_stream(0)
            triton_red_fused__to_copy_embedding_mean_mul_pow_rsqrt_0.run(arg0_1, buf1, s34, 64, \
stream=stream0)
            # Topologically Sorted Source Nodes: [q], Original ATen: [aten.view, aten.t, aten.mm]
            extern_kernels.mm(reinterpret_tensor(buf1, (s34, 64), (64, 1), 0), arg1_1, out=buf2)
            extern_kernels.addmm(arg2_1, buf1, arg1_1, alpha=1, beta=1, out=buf2)
            triton_tem_fused_mm_1.run(buf1, arg1_1, buf3, s34, 1, 1, stream=stream0)
            # Topologically Sorted Source Nodes: [at], Original ATen: [focus_compile.attention]
            buf4 = torch.ops.focus_compile.attention.default(buf3, arg1_1, arg2_1, None, 0.125)
            buf5 = buf4
            assert_size_stride(buf5, (1, 4), (4, 1), 'torch.ops.focus_compile.attention.default')
            del buf4
            triton_red_fused__to_copy_embedding_mean_mul_pow_rsqrt_0.run(buf5, buf1, s34, 64, \
stream=stream0)
            buf6 = torch.ops.aten.sort.stable(buf5, stable=False)
            buf7 = aten.topk.default(buf5, 2)
        return (buf6, )

runner = Runner(partitions=[])
call = runner.call

if __name__ == "__main__":
    from torch._inductor.wrapper_benchmark import compiled_module_main
    compiled_module_main('None', benchmark_compiled_module)
"""


def test_triton_code() -> None:
    name = "triton_red_fused__to_copy_embedding_mean_mul_pow_rsqrt_0"
    norm = Launch("fused", name, ("embedding", "_to_copy", "pow", "mean", "rsqrt", "mul"))
    found = launches_in(TRITON)
    assert found == [
        norm,
        Launch("linear", "mm"),
        Launch("linear", "addmm"),
        Launch("linear", "triton_tem_fused_mm_1", ("mm",)),
        Launch("op", "attention"),
        norm,
        Launch("extern", "sort"),
        Launch("extern", "topk"),
    ]
    assert summary(found) == "8 launches: 2 fused, 3 linear, attention, sort, topk"
    assert "2 fused (embedding+_to_copy+pow+mean+rsqrt+mul, embedding+" in summary(found, ops=True)


def function(x: Tensor, rows: Tensor, weight: Tensor) -> Any:
    product = torch.nn.functional.silu(x.index_select(0, rows) @ weight.T)
    return torch.sort((product + 1).sum(-1), stable=True)


def compile_function() -> list[str]:
    torch._dynamo.reset()
    with generated_code() as code, torch.no_grad():
        torch.compile(function)(torch.randn(9, 16), torch.arange(4), torch.randn(8, 16))
    return code


def test_cpp_code_compiled_or_from_the_cache() -> None:
    (code,) = compile_function()
    found = launches_in(code)
    assert [launch.kind for launch in found].count("linear") == 1
    assert [launch.name for launch in found if launch.kind == "extern"] == ["sort"]
    computed = {op for launch in found if launch.kind == "fused" for op in launch.ops}
    assert {"index_select", "silu", "add", "sum"} <= computed
    assert all("_" not in op or op == "index_select" for op in computed)
    (cached,) = compile_function()
    assert launches_in(cached) == found


def test_code_without_launches() -> None:
    assert launches_in("") == []
    assert summary([]) == "no launches"


def test_layers_are_counted_by_their_attention() -> None:
    fused, linear = Launch("fused", "k", ("add", "view")), Launch("linear", "mm")
    dense, sparse = Launch("op", "attention"), Launch("op", "sparse_attention")
    select = Launch("op", "select_blocks")
    launches = [linear, dense, fused, linear, dense]
    launches += [fused, select, linear, linear, sparse] + [fused, select, sparse] * 2 + [linear]
    regions = ["dense-prefix"] * 2 + ["sparse-suffix"] * 3
    assert layers_of(launches, regions) == {
        "dense-prefix": [fused, linear, dense],
        "sparse-suffix": [fused, select, sparse],
    }
    assert layers_of(launches, regions[1:]) == {}
    assert summary([fused, select, sparse], ops=True) == (
        "3 launches: 1 fused (add), select_blocks, sparse_attention"
    )
