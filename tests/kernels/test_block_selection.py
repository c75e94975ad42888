"""`select_blocks`: fast against reference, ties, empty sets, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.block_selection import reference
from focus_compile.kernels.block_selection.op import select_blocks
from tests.kernels.strategies import Problem, assert_highest, fuzzed, problems

EPS = torch.finfo(torch.float32).eps


@st.composite
def selections(draw: st.DrawFn) -> tuple[Problem, Tensor, Tensor]:
    """(problem, candidates [B], keep [B]); the problem's keys serve as block summaries."""
    problem = draw(problems(masks=("none",), max_length=40))
    batch, total = problem.k.shape[0], problem.k.shape[2]
    candidates = draw(st.lists(st.integers(0, total), min_size=batch, max_size=batch))
    keep = draw(st.lists(st.integers(0, total + 2), min_size=batch, max_size=batch))
    return problem, torch.tensor(candidates), torch.tensor(keep)


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Small integers: float32 sums of their products are exact, so ties are exact too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).float()


@fuzzed
@given(selections())
def test_keeps_the_most_relevant(case: tuple[Problem, Tensor, Tensor]) -> None:
    problem, candidates, keep = case
    q, summaries, weight = problem.q, problem.k, problem.weight
    kept = select_blocks(q, weight, summaries, candidates, keep)
    assert kept.dtype == torch.int64
    assert kept.shape == (q.shape[0], summaries.shape[2])
    scores = reference.relevance(q, weight, summaries)
    for b, limit in enumerate(candidates.tolist()):
        assert (kept[b, limit:] == -1).all()
        bound = tolerance(problem, b)
        assert_highest(kept[b, :limit], scores[b, :limit], int(keep[b]), bound)


def tolerance(problem: Problem, b: int) -> float:
    """Largest difference that float32 rounding of sequence b's sums can make to two scores."""
    q, summaries, weight = problem.q, problem.k, problem.weight
    sizes = reference.relevance(q.abs(), weight, summaries.abs())
    terms = q.shape[1] * q.shape[2] + q.shape[3]
    return 2 * terms * EPS * float(sizes[b].max())


def test_bfloat16_inputs_are_compared_in_float32() -> None:
    """So many blocks that bfloat16 scores would tie by the dozen."""
    torch.manual_seed(0)
    q, summaries = torch.randn(1, 2, 3, 16).bfloat16(), torch.randn(1, 1, 4000, 16).bfloat16()
    problem = Problem(q, summaries, summaries, None, torch.ones(1, 3), 1.0)
    kept = select_blocks(q, problem.weight, summaries, torch.tensor([4000]), torch.tensor([1000]))
    scores = reference.relevance(q, problem.weight, summaries)
    assert_highest(kept[0], scores[0], 1000, tolerance(problem, 0))


@fuzzed
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 4)),
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_ties_go_to_the_lowest_id(
    sizes: tuple[int, int, int, int], blocks: int, seed: int, data: st.DataObject
) -> None:
    batch, kv_heads, group, rows = sizes
    q = integers((batch, kv_heads * group, rows, 8), seed)
    summaries = integers((batch, kv_heads, blocks, 8), seed + 1)
    weight = integers((batch, rows), seed + 2).abs()
    candidates = torch.tensor([data.draw(st.integers(0, blocks)) for _ in range(batch)])
    keep = torch.tensor([data.draw(st.integers(0, blocks)) for _ in range(batch)])
    kept = select_blocks(q, weight, summaries, candidates, keep)
    assert torch.equal(kept, reference.select_blocks(q, weight, summaries, candidates, keep))


@fuzzed
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_equal_summaries_tie_exactly(heads: int, blocks: int, keep: int, seed: int) -> None:
    """One summary repeated: whatever the rounding, the first blocks win."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((1, heads, 5, 24), generator=generator)
    summary = torch.randn((1, heads, 1, 24), generator=generator)
    limits = torch.tensor([blocks]), torch.tensor([keep])
    kept = select_blocks(q, torch.ones(1, 5), summary.repeat(1, 1, blocks, 1), *limits)
    order = torch.arange(blocks)
    assert torch.equal(kept[0], order.where(order < keep, -1))


@fuzzed
@given(selections())
def test_reference_is_a_weighted_mean_over_rows_and_heads(
    case: tuple[Problem, Tensor, Tensor],
) -> None:
    problem, _, _ = case
    q, summaries, weight = problem.q.double(), problem.k.double(), problem.weight.double()
    of_head = torch.arange(q.shape[1]) // (q.shape[1] // summaries.shape[1])
    by_head = torch.einsum("bhrd,bhjd->bhrj", q, summaries[:, of_head]).mean(1)
    share = weight / weight.sum(1, keepdim=True).clamp_min(1.0)
    expected = torch.einsum("br,brj->bj", share, by_head)
    torch.testing.assert_close(
        reference.relevance(q, weight, summaries), expected, rtol=1e-11, atol=1e-11
    )


@fuzzed
@given(selections())
def test_bounds_split_the_query_by_sign(
    case: tuple[Problem, Tensor, Tensor],
) -> None:
    """Summaries twice as wide: relevance is (max(q, 0), min(q, 0)) . summary."""
    problem, candidates, keep = case
    boxes = torch.cat([problem.k, problem.k.abs() / 2 - 1], -1)
    extended = torch.cat([problem.q.clamp(min=0), problem.q.clamp(max=0)], -1)
    kept = select_blocks(problem.q, problem.weight, boxes, candidates, keep)
    plain = select_blocks(extended, problem.weight, boxes, candidates, keep)
    assert torch.equal(kept, plain)
    torch.testing.assert_close(
        reference.relevance(problem.q, problem.weight, boxes),
        reference.relevance(extended, problem.weight, boxes),
    )


@fuzzed
@given(selections())
def test_more_kept_is_a_superset(case: tuple[Problem, Tensor, Tensor]) -> None:
    problem, candidates, keep = case
    fewer = select_blocks(problem.q, problem.weight, problem.k, candidates, keep)
    more = select_blocks(problem.q, problem.weight, problem.k, candidates, keep + 1)
    for some, all_of in zip(fewer.tolist(), more.tolist(), strict=True):
        assert set(some) <= set(all_of) | {-1}


@fuzzed
@given(selections())
def test_rows_of_weight_zero_do_not_count(case: tuple[Problem, Tensor, Tensor]) -> None:
    problem, candidates, keep = case
    other = torch.where(problem.weight[:, None, :, None] > 0, problem.q, 7.0)
    kept = select_blocks(problem.q, problem.weight, problem.k, candidates, keep)
    assert torch.equal(kept, select_blocks(other, problem.weight, problem.k, candidates, keep))


@pytest.mark.parametrize(("blocks", "rows"), [(0, 3), (5, 0)])
def test_nothing_to_rank(blocks: int, rows: int) -> None:
    q, summaries = torch.randn(2, 4, rows, 8), torch.randn(2, 2, blocks, 8)
    limit = torch.tensor([blocks, 0])
    kept = select_blocks(q, torch.ones(2, rows), summaries, limit, torch.tensor([2, 2]))
    assert kept.tolist() == ([[], []] if blocks == 0 else [[0, 1, -1, -1, -1], [-1] * 5])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 4, 5, 8)}, ValueError, "batch"),
        ({"q": torch.zeros(2, 4, 5, 6)}, ValueError, "head dimension"),
        ({"q": torch.zeros(2, 3, 5, 8)}, ValueError, "multiple of the kv heads"),
        ({"weight": torch.zeros(2, 4)}, ValueError, "rows"),
        ({"weight": torch.zeros(2, 5).long()}, TypeError, "weight"),
        ({"summaries": torch.zeros(2, 2, 7, 8).double()}, TypeError, "dtype"),
        ({"candidates": torch.zeros(2)}, TypeError, "candidates must be int64"),
        ({"keep": torch.zeros(2, 1).long()}, ValueError, "keep must have 1 axes"),
    ],
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = {
        "q": torch.zeros(2, 4, 5, 8),
        "weight": torch.zeros(2, 5),
        "summaries": torch.zeros(2, 2, 7, 8),
        "candidates": torch.zeros(2).long(),
        "keep": torch.zeros(2).long(),
    }
    with pytest.raises(error, match=f"select_blocks: .*{message}"):
        select_blocks(**{**good, **change})
