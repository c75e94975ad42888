"""`staleness`: fast against reference, what it estimates exactly, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.staleness import cpu, reference
from focus_compile.kernels.staleness.op import staleness
from tests.kernels.strategies import Problem, fuzzed, problems
from tests.kernels.test_sink_capture import log_sum_exp, masked_logits


def attend(p: Problem) -> Tensor:
    """[B, H, R, d]; zeros for a row without a key."""
    of_head = torch.arange(p.q.shape[1]) // (p.q.shape[1] // p.v.shape[1])
    return masked_logits(p).softmax(-1).nan_to_num(0.0) @ p.v[:, of_head].double()


@st.composite
def judgements(draw: st.DrawFn) -> tuple[Any, ...]:
    """Arguments of `staleness` over any problem."""
    p = draw(problems(max_length=24))
    batch, length, rows = p.q.shape[0], p.k.shape[2], p.q.shape[2]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    readers = torch.randint(rows, (batch, draw(st.integers(1, 5))), generator=generator)
    positions = torch.randint(length, (batch, draw(st.integers(1, 6))), generator=generator)
    at = positions[:, None, :, None].expand(-1, p.k.shape[1], -1, p.k.shape[3])
    old_k, old_v = p.k.gather(2, at), p.v.gather(2, at)
    noise = draw(st.sampled_from((0.0, 0.1, 1.0)))
    new_k, new_v = (
        x + noise * torch.randn(x.shape, generator=generator).to(x) for x in (old_k, old_v)
    )
    return (
        p.q, p.k, attend(p).to(p.q.dtype), log_sum_exp(p).float(), readers,
        torch.randint(2, readers.shape, generator=generator).float(),
        torch.rand(batch, length, generator=generator) < 0.5,
        old_k, new_k, old_v, new_v, positions,
        torch.rand(positions.shape, generator=generator), p.mask, p.scale,
    )  # fmt: skip


@fuzzed
@given(judgements())
def test_equals_the_reference(given_: tuple[Any, ...]) -> None:
    error, received = staleness(*given_)
    expected, expected_received = reference.staleness(*given_)
    assert error.dtype == received.dtype == torch.float32
    torch.testing.assert_close(error, expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(received, expected_received, rtol=1e-3, atol=1e-5)


@fuzzed
@given(problems(masks=("none", "bool"), dtypes=(torch.float32,), max_length=24), st.integers(0, 99))
def test_is_exact_where_all_that_is_left_was_probed_and_only_values_moved(
    p: Problem, seed: int
) -> None:
    """Then first order is all there is, and the ratio is one."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.rand(p.k.shape[2], generator=generator) < 0.5
    left[0] = True
    positions = left.nonzero()[:, 0].expand(p.q.shape[0], -1)
    new_v = p.v.clone()
    new_v[:, :, left] += torch.randn(new_v[:, :, left].shape, generator=generator)
    now, renewed = attend(p), attend(Problem(p.q, p.k, new_v, p.mask, p.weight, p.scale))
    readers = torch.arange(p.q.shape[2]).expand(p.q.shape[0], -1)
    ones = torch.ones(readers.shape)
    keys = p.k[:, :, left]
    error, received = staleness(
        p.q, p.k, now.to(p.q.dtype), log_sum_exp(p).float(), readers, ones,
        left.expand(p.q.shape[0], -1), keys, keys, p.v[:, :, left], new_v[:, :, left], positions,
        torch.ones(positions.shape), p.mask, p.scale,
    )  # fmt: skip
    squares = (renewed - now).square().sum((1, 2, 3)), now.square().sum((1, 2, 3))
    torch.testing.assert_close(error.double(), torch.stack(squares, 1), rtol=1e-3, atol=1e-5)
    whole = (log_sum_exp(p) > -torch.inf).double().mean((1, 2))
    torch.testing.assert_close(received.double().sum(1), whole, rtol=1e-4, atol=1e-5)


def test_nothing_moved_is_no_error() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)
    p = Problem(q, k, k, None, torch.ones(2, 3), 0.3)
    positions = torch.tensor([[1, 5], [2, 2]])
    at = k.gather(2, positions[:, None, :, None].expand(-1, 2, -1, 8))
    error, _ = staleness(
        q, k, attend(p).float(), log_sum_exp(p).float(), torch.zeros(2, 1).long(), torch.ones(2, 1),
        torch.ones(2, 9).bool(), at, at, at, at, positions, torch.ones(2, 2), None, 0.3,
    )  # fmt: skip
    assert torch.equal(error[:, 0], torch.zeros(2))
    assert (error[:, 1] > 0).all()


def test_many_heads_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(1, 6, 5, 8), torch.randn(1, 3, 20, 8), torch.randn(1, 3, 20, 8)
    mask = torch.rand(1, 6, 5, 20) < 0.7
    p = Problem(q, k, v, mask, torch.ones(1, 5), 0.5)
    positions = torch.tensor([[3, 7, 11]])
    given_ = (
        q, k, attend(p).float(), log_sum_exp(p).float(), torch.tensor([[0, 4]]), torch.ones(1, 2),
        torch.rand(1, 20) < 0.5, k[:, :, [3, 7, 11]], k[:, :, [4, 8, 12]], v[:, :, [3, 7, 11]],
        v[:, :, [4, 8, 12]], positions, torch.rand(1, 3), mask, 0.5,
    )  # fmt: skip
    whole = cpu.staleness(*given_)
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(cpu.staleness(*given_), whole)


@pytest.mark.parametrize(
    ("at", "value", "error", "message"),
    [
        (3, torch.zeros(1, 2, 3).double(), TypeError, "lse must be float32"),
        (4, torch.zeros(1, 2), TypeError, "readers must be int64"),
        (5, torch.zeros(1, 3), ValueError, "reader_weight and readers"),
        (6, torch.zeros(1, 9), TypeError, "left must be bool"),
        (6, torch.zeros(1, 8).bool(), ValueError, "left and k differ in length"),
        (8, torch.zeros(1, 2, 3, 8), ValueError, "k and v differ"),
        (11, torch.zeros(1, 3).long(), ValueError, "positions and old_k"),
        (12, torch.zeros(1, 3), ValueError, "probe_weight and positions"),
    ],
)
def test_bad_input(at: int, value: Tensor, error: type[Exception], message: str) -> None:
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 9, 8)
    probes = torch.zeros(1, 2, 2, 8)
    arguments: list[Any] = [
        q, k, q, torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.zeros(1, 2),
        torch.zeros(1, 9).bool(), probes, probes, probes, probes, torch.zeros(1, 2).long(),
        torch.zeros(1, 2), None, 1.0,
    ]  # fmt: skip
    staleness(*arguments)
    arguments[at] = value
    with pytest.raises(error, match=message):
        staleness(*arguments)
