"""`capture_sinks`: fast against reference, ties, masks, empty sets, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.sink_capture import cpu, reference
from focus_compile.kernels.sink_capture.op import capture_sinks
from tests.kernels.strategies import MASKS, Problem, assert_highest, fuzzed, problems

EPS = torch.finfo(torch.float32).eps


@st.composite
def captures(draw: st.DrawFn, masks: tuple[str, ...] = MASKS) -> tuple[Problem, Tensor, int]:
    """(problem, limit [B], count)."""
    problem = draw(problems(masks=masks, max_length=40))
    batch, length = problem.k.shape[0], problem.k.shape[2]
    limit = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    return problem, torch.tensor(limit), draw(st.integers(0, 12))


def log_sum_exp(problem: Problem) -> Tensor:
    """Over all keys of the masked logits, [B, H, R] float64; -inf for a row without a key."""
    return masked_logits(problem).logsumexp(-1)


def masked_logits(problem: Problem) -> Tensor:
    """[B, H, R, T] float64."""
    p = problem.double()
    of_head = torch.arange(p.q.shape[1]) // (p.q.shape[1] // p.k.shape[1])
    logits = p.scale * torch.einsum("bhrd,bhtd->bhrt", p.q, p.k[:, of_head])
    if p.mask is None:
        return logits
    if p.mask.dtype == torch.bool:
        return logits.masked_fill(~p.mask, -torch.inf)
    return logits + p.mask


def tolerance(problem: Problem, scores: Tensor) -> float:
    """Largest error of a float32 score: that of its logits, and one rounding for each sum."""
    p = problem.double()
    logit = p.scale * p.q.shape[3] * float(p.q.abs().max()) * float(p.k.abs().max())
    if p.mask is not None and p.mask.dtype != torch.bool:
        logit += float(torch.where(p.mask.isinf(), 0.0, p.mask).abs().max())
    sums = p.q.shape[1] * p.q.shape[2] + p.k.shape[2]
    return 4 * EPS * (p.q.shape[3] * logit + sums) * float(scores.max())


@fuzzed
@given(captures())
def test_finds_what_draws_most_attention(case: tuple[Problem, Tensor, int]) -> None:
    problem, limit, count = case
    p = problem
    lse = log_sum_exp(p)
    sinks = capture_sinks(p.q, p.k, lse.float(), p.weight, p.mask, limit, count, p.scale)
    assert sinks.dtype == torch.int64
    assert sinks.shape == (p.q.shape[0], count)
    scores = reference.attention_received(p.q, p.k, lse, p.weight, p.mask, p.scale)
    for b, end in enumerate(limit.tolist()):
        assert_highest(sinks[b], scores[b, :end], count, tolerance(p, scores[b]))


@fuzzed
@given(captures())
def test_reference_is_the_mean_column_of_the_attention_matrix(
    case: tuple[Problem, Tensor, int],
) -> None:
    p = case[0].double()
    matrix = masked_logits(p).softmax(-1).nan_to_num(0.0)
    share = p.weight.double() / p.weight.double().sum(1, keepdim=True).clamp_min(1.0)
    expected = torch.einsum("br,bhrt->bt", share, matrix) / p.q.shape[1]
    actual = reference.attention_received(p.q, p.k, log_sum_exp(p), p.weight, p.mask, p.scale)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@fuzzed
@given(problems(masks=("none",)))
def test_columns_sum_to_the_weight_of_all_rows_and_heads(problem: Problem) -> None:
    p, lse = problem, log_sum_exp(problem)
    for b in range(p.q.shape[0]):
        total = p.q.shape[1] * float(p.weight[b].sum())
        fast = cpu.attention_received(p.q[b], p.k[b], lse[b].float(), p.weight[b], None, p.scale)
        assert float(fast.sum()) == pytest.approx(total, rel=1e-5, abs=0)
        slow = reference.attention_received(
            p.q[b : b + 1], p.k[b : b + 1], lse[b : b + 1], p.weight[b : b + 1], None, p.scale
        )
        assert float(slow.sum()) == pytest.approx(float(total > 0), rel=1e-12)


@fuzzed
@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_equal_keys_tie_exactly(heads: int, length: int, distinct: int, seed: int) -> None:
    """A few keys, much repeated. Among positions of one key, the first ones are taken."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-9, 9, (1, heads, 5, 24), generator=generator).float()
    keys = torch.randint(-9, 9, (1, heads, distinct, 24), generator=generator).float()
    kind = torch.randint(distinct, (length,), generator=generator)
    limit = torch.tensor([length])
    problem = Problem(q, keys[:, :, kind], keys, None, torch.rand(1, 5), 0.01)
    lse = log_sum_exp(problem).float()
    sinks = capture_sinks(q, problem.k, lse, problem.weight, None, limit, 12, 0.01)
    for one in range(distinct):
        places = (kind == one).nonzero().flatten().tolist()
        taken = [t for t in sinks[0].tolist() if t in places]
        assert taken == places[: len(taken)]


@fuzzed
@given(captures())
def test_uniform_attention_takes_the_first_positions(case: tuple[Problem, Tensor, int]) -> None:
    problem, limit, count = case
    q = torch.zeros_like(problem.q)
    lse = torch.full(q.shape[:3], problem.k.shape[2]).log()
    sinks = capture_sinks(q, problem.k, lse, problem.weight, None, limit, count, 1.0)
    first = torch.arange(count)
    assert torch.equal(sinks, first.where(first < limit[:, None], -1))


@fuzzed
@given(captures(masks=("none",)))
def test_repeated_rows_of_weight_zero_do_not_count(case: tuple[Problem, Tensor, int]) -> None:
    problem, limit, count = case
    p = problem
    q = torch.cat([p.q, p.q[:, :, :1].expand(-1, -1, 3, -1)], 2)
    weight = torch.cat([p.weight, torch.zeros(q.shape[0], 3)], 1)
    lse = log_sum_exp(p)
    padded_lse = torch.cat([lse, lse[:, :, :1].expand(-1, -1, 3)], 2)
    alone = reference.attention_received(p.q, p.k, lse, p.weight, None, p.scale)
    padded = reference.attention_received(q, p.k, padded_lse, weight, None, p.scale)
    assert torch.equal(alone, padded)
    sinks = capture_sinks(q, p.k, padded_lse.float(), weight, None, limit, count, p.scale)
    for b, end in enumerate(limit.tolist()):
        assert_highest(sinks[b], alone[b, :end], count, tolerance(p, alone[b]))


def test_many_heads_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, weight = torch.randn(6, 5, 8), torch.randn(3, 20, 8), torch.rand(5)
    mask = torch.rand(6, 5, 20) < 0.7
    lse = torch.randn(6, 5)
    lse[2, 1] = -torch.inf
    whole = cpu.attention_received(q, k, lse, weight, mask, 0.5)
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 400)
    torch.testing.assert_close(cpu.attention_received(q, k, lse, weight, mask, 0.5), whole)


def test_a_row_without_keys_counts_nothing() -> None:
    """Whatever its logits would be: its log-sum-exp says so."""
    q, k, weight = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 9, 8), torch.ones(1, 2)
    lse = log_sum_exp(Problem(q, k, k, None, weight, 1.0))
    lse[:, :, 1] = -torch.inf
    alone = reference.attention_received(q[:, :, :1], k, lse[:, :, :1], weight[:, :1], None, 1.0)
    both = reference.attention_received(q, k, lse, weight, None, 1.0)
    torch.testing.assert_close(both, alone / 2)
    fast = cpu.attention_received(q[0], k[0], lse[0].float(), weight[0], None, 1.0)
    torch.testing.assert_close(fast.double() / 4, both[0], rtol=1e-5, atol=1e-7)


def test_no_rows() -> None:
    q, k, lse = torch.randn(1, 4, 0, 8), torch.randn(1, 2, 9, 8), torch.zeros(1, 4, 0)
    sinks = capture_sinks(q, k, lse, torch.ones(1, 0), None, torch.tensor([9]), 2, 1.0)
    assert sinks.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 5, 8)}, ValueError, "multiple of the kv heads"),
        ({"lse": torch.zeros(2, 5)}, ValueError, "lse must have 3 axes"),
        ({"lse": torch.zeros(2, 2, 5)}, ValueError, "lse and q differ in heads"),
        ({"lse": torch.zeros(2, 4, 6)}, ValueError, "lse and q differ in rows"),
        ({"lse": torch.zeros(2, 4, 5).double()}, TypeError, "lse must be float32"),
        ({"weight": torch.zeros(2, 4)}, ValueError, "rows"),
        ({"weight": torch.zeros(1, 5)}, ValueError, "batch"),
        ({"limit": torch.zeros(2)}, TypeError, "limit must be int64"),
        ({"count": -1}, ValueError, "count"),
        ({"mask": torch.zeros(4)}, ValueError, "broadcast"),
        ({"mask": torch.zeros(9).int()}, TypeError, "bool or floating"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 9, 8),
        "lse": torch.zeros(2, 4, 5),
        "weight": torch.zeros(2, 5),
        "mask": None,
        "limit": torch.zeros(2).long(),
        "count": 3,
        "scale": 1.0,
    }
    with pytest.raises(error, match=f"capture_sinks: .*{message}"):
        capture_sinks(**{**good, **change})  # type: ignore[arg-type]
