"""`select_blocks` in Triton: interpreted, or compiled on CUDA.

pytest -m gpu tests/kernels/test_block_selection_kernel.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.block_selection import reference
from tests.kernels.devices import FLOATS, each_device, few, moved
from tests.kernels.strategies import LAYOUTS, Problem, assert_highest, lay_out
from tests.kernels.test_block_selection import integers, selections

pytest.importorskip("triton")
from focus_compile.kernels.block_selection import kernel

EPS = torch.finfo(torch.float32).eps


def select(
    problem: Problem, summaries: Tensor, limits: tuple[Tensor, Tensor], device: str
) -> Tensor:
    given = [moved(t, device) for t in (problem.q, problem.weight, summaries, *limits)]
    kept = kernel.select_blocks(*given)
    assert kept.dtype == torch.int64
    assert kept.is_contiguous()
    return kept.cpu()


@each_device
@given(data=st.data(), bound=st.booleans())
@few
def test_keeps_the_most_relevant(device: str, data: st.DataObject, bound: bool) -> None:
    """Held to the bound of `test_block_selection`."""
    problem, candidates, keep = data.draw(selections())
    dtype = data.draw(st.sampled_from(FLOATS))
    q, summaries = problem.q.to(dtype), problem.k.to(dtype)
    if bound:
        wide = torch.cat([summaries, summaries.abs() / 2 - 1], -1)
        summaries = lay_out(wide, data.draw(st.sampled_from(LAYOUTS)))
    problem = Problem(q, summaries, summaries, None, problem.weight, 1.0)
    kept = select(problem, summaries, (candidates, keep), device)
    scores = reference.relevance(q, problem.weight, summaries)
    sizes = reference.relevance(q.abs(), problem.weight, summaries.abs())
    if bound:
        sizes *= 2
    terms = q.shape[1] * q.shape[2] + 2 * q.shape[3]
    for b, limit in enumerate(candidates.tolist()):
        assert (kept[b, limit:] == -1).all()
        allowed = 2 * terms * EPS * float(sizes[b].max())
        assert_highest(kept[b, :limit], scores[b, :limit], int(keep[b]), allowed)


@each_device
@given(data=st.data())
@few
def test_integer_relevance_is_exact(device: str, data: st.DataObject) -> None:
    """Group 7 and width 80, as many as no power of two; ties to the lowest id."""
    draw = data.draw
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows = draw(st.integers(0, 9))
    blocks, seed = draw(st.integers(0, 40)), draw(st.integers(0, 2**32 - 1))
    dtype = draw(st.sampled_from(FLOATS))
    q = integers((batch, kv_heads * 7, rows, 80), seed).to(dtype)
    summaries = integers((batch, kv_heads, blocks, draw(st.sampled_from((80, 160)))), seed + 1)
    summaries = summaries.to(dtype)
    weight = integers((batch, rows), seed + 2).abs()
    limits = [torch.tensor([draw(st.integers(0, blocks)) for _ in range(batch)]) for _ in "ck"]
    problem = Problem(q, summaries, summaries, None, weight, 1.0)
    kept = select(problem, summaries, (limits[0], limits[1]), device)
    assert torch.equal(kept, reference.select_blocks(q, weight, summaries, *limits))


@each_device
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "kv_heads", "blocks"), [(4, 4, 150), (14, 2, 200)])
def test_equal_summaries_tie_exactly(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, blocks: int
) -> None:
    """One summary repeated over several programs: whatever the rounding, the first blocks win."""
    torch.manual_seed(blocks)
    q, summary = torch.randn(1, heads, 5, 24).to(dtype), torch.randn(1, kv_heads, 1, 48).to(dtype)
    summaries = summary.repeat(1, 1, blocks, 1)
    problem = Problem(q, summaries, summaries, None, torch.rand(1, 5), 1.0)
    limits = torch.tensor([blocks]), torch.tensor([blocks // 2])
    order = torch.arange(blocks)
    kept = select(problem, summaries, limits, device)
    assert torch.equal(kept[0], order.where(order < blocks // 2, -1))


@each_device
@pytest.mark.parametrize("dtype", FLOATS)
def test_more_blocks_than_one_program_holds(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, summaries = torch.randn(1, 2, 3, 16).to(dtype), torch.randn(1, 1, 5000, 32).to(dtype)
    weight = torch.ones(1, 3)
    limits = torch.tensor([4900]), torch.tensor([1000])
    given = [moved(t, device) for t in (q, weight, summaries, *limits)]
    kept = kernel.select_blocks(*given).cpu()
    scores = reference.relevance(q, weight, summaries)
    assert_highest(kept[0, :4900], scores[0, :4900], 1000, 200 * EPS * float(scores.abs().max()))
