"""The Triton kernels that select, captured in a CUDA graph.

pytest -m gpu tests/kernels/test_kernels_in_graphs.py
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from focus_compile.kernels.block_selection import kernel as blocks_kernel
from focus_compile.kernels.confidence import kernel as confidence_kernel
from focus_compile.kernels.sink_capture import kernel as sinks_kernel


@pytest.mark.gpu
@pytest.mark.parametrize("length", [700, 5000])
def test_all_are_captured_in_a_cuda_graph(length: int) -> None:
    """And a replay reads what its inputs hold by then. 5,000 are more than one program holds."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 9, 64), torch.randn(2, 2, length, 64)
    weight, logits = torch.ones(2, 9), torch.randn(2, 9, 5000)
    limits = [torch.tensor([length, 300]), torch.tensor([20, 40])]
    lse = torch.full((2, 8, 9), 20.0, device="cuda")
    tensors = [t.cuda() for t in (q, k, weight, logits, *limits)]

    def run() -> list[Tensor]:
        q, k, weight, logits, limit, keep = tensors
        blocks = blocks_kernel.select_blocks(q, weight, k, limit, keep)
        sinks = sinks_kernel.capture_sinks(q, k, lse, weight, None, limit, 16, 1.0)
        return [blocks, sinks, *confidence_kernel.confidence(logits)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    for tensor in tensors[:4]:
        tensor.copy_(torch.rand_like(tensor))
    tensors[5].fill_(7)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(captured, run(), strict=True):
            assert torch.equal(found, expected)
