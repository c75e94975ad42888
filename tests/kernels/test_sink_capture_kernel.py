"""`capture_sinks` in Triton: interpreted in float32, or compiled on CUDA in every dtype.

pytest -m gpu tests/kernels/test_sink_capture_kernel.py
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.devices import DOT_DTYPES, each_device, few, moved
from tests.kernels.strategies import Problem, assert_highest, lay_out
from tests.kernels.test_sink_capture import captures, log_sum_exp, masked_logits, tolerance

pytest.importorskip("triton")
from focus_compile.kernels.sink_capture import kernel


@each_device
@given(data=st.data())
@few
def test_finds_what_draws_most_attention(device: str, data: st.DataObject) -> None:
    problem, limit, count = data.draw(captures())
    dtype = data.draw(st.sampled_from(DOT_DTYPES[device]))
    p = replace(problem, q=problem.q.to(dtype), k=problem.k.to(dtype))
    check_sinks(p, limit, count, device)


def check_sinks(p: Problem, limit: Tensor, count: int, device: str) -> Tensor:
    """Against the reference of the same numbers, to the bound of `test_sink_capture`."""
    lse = log_sum_exp(p)
    given = [moved(t, device) for t in (p.q, p.k, lse.float(), p.weight, p.mask, limit)]
    sinks = kernel.capture_sinks(*given, count, p.scale)
    assert sinks.dtype == torch.int64
    assert sinks.shape == (p.q.shape[0], count)
    scores = reference_scores(p, lse)
    for b, end in enumerate(limit.tolist()):
        allowed = tolerance(p, scores[b])
        assert_highest(sinks[b].cpu(), scores[b, :end], count, allowed)
    return sinks.cpu()


def reference_scores(p: Problem, lse: Tensor) -> Tensor:
    """`attention_received` of the reference in one product, [B, T] float64."""
    probability = (masked_logits(p) - lse[..., None]).exp().nan_to_num(0.0)
    scores = torch.einsum("br,bhrt->bt", p.weight.double(), probability)
    total = p.weight.double().sum(1, keepdim=True) * p.q.shape[1]
    return scores / torch.where(total > 0, total, 1.0)


@each_device
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "length", "width", "mask"),
    [
        (7, 1, 40, 300, 80, "none"),  # 280 packed rows, 3 tiles of keys
        (4, 4, 5, 131, 128, "row"),
        (6, 2, 150, 70, 8, "key"),
        (14, 2, 3, 129, 24, "bool"),
        (2, 1, 33, 5000, 16, "none"),  # more positions than one program holds
    ],
)
def test_sinks_over_many_tiles(
    device: str, heads: int, kv_heads: int, rows: int, length: int, width: int, mask: str
) -> None:
    for dtype in DOT_DTYPES[device]:
        torch.manual_seed(length)
        q = torch.randn(2, heads, rows, width).to(dtype)
        k = lay_out(torch.randn(2, kv_heads, length, width).to(dtype), "heads-inside")
        hidden = torch.rand(rows, length) < 0.3
        hidden[0] = True
        shown = {
            "none": None,
            "row": torch.randn(rows, length).masked_fill(hidden, -torch.inf),
            "key": torch.randn(2, 1, 1, length).masked_fill(hidden[-1], -torch.inf),
            "bool": torch.rand(2, heads, 1, length) < torch.tensor([0.5, 0.0])[:, None, None, None],
        }[mask]
        weight = torch.randint(0, 3, (2, rows)).float()
        problem = Problem(q, k, k, shown, weight, width**-0.5)
        check_sinks(problem, torch.tensor([length, length // 2]), 16, device)


@each_device
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 4), st.integers(0, 2**32 - 1))
@few
def test_equal_keys_tie_exactly(
    device: str, heads: int, length: int, distinct: int, seed: int
) -> None:
    """A few keys, much repeated. Among positions of one key, the first ones are taken.

    Of whole numbers: interpreted, a product of matrices is numpy's, which may round equal rows
    differently.
    """
    for dtype in DOT_DTYPES[device]:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randint(-3, 4, (1, heads, 5, 24), generator=generator).to(dtype)
        keys = torch.randint(-3, 4, (1, heads, distinct, 24), generator=generator).to(dtype)
        kind = torch.randint(distinct, (length,), generator=generator)
        p = Problem(q, keys[:, :, kind], keys, None, torch.rand((1, 5), generator=generator), 0.2)
        sinks = check_sinks(p, torch.tensor([length]), 12, device)
        for one in range(distinct):
            places = (kind == one).nonzero().flatten().tolist()
            taken = [t for t in sinks[0].tolist() if t in places]
            assert taken == places[: len(taken)]


@each_device
def test_sinks_under_masks_of_the_lowest_number(device: str) -> None:
    """Masks of finfo.min: a row of nothing else attends to all keys alike, and none gives NaN."""
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 20, 16)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(1, 1, 3, 20)
    mask[..., 7:], mask[:, :, 1] = lowest, lowest
    lse = log_sum_exp(Problem(q, k, k, mask, torch.ones(1, 3), 1.0)).float()
    given = [moved(t, device) for t in (q, k, lse, torch.ones(1, 3), mask)]
    limit = torch.tensor([20], device=device)
    parts = kernel.attention_received(*given, limit, 1.0)
    received = parts.sum(1)[0].cpu()
    assert received.isfinite().all()
    assert (received[:7] > received[7:].max()).all()
    torch.testing.assert_close(received[7:], received[7:8].expand(13))


@each_device
@pytest.mark.parametrize(
    ("rows", "length", "count", "expected"),
    [(0, 9, 2, [[0, 1]]), (3, 0, 2, [[-1, -1]]), (3, 9, 0, [[]])],
)
def test_no_rows_or_keys_or_sinks(
    device: str, rows: int, length: int, count: int, expected: list[list[int]]
) -> None:
    q, k = torch.randn(1, 4, rows, 8, device=device), torch.randn(1, 2, length, 8, device=device)
    lse, weight = torch.zeros(1, 4, rows, device=device), torch.ones(1, rows, device=device)
    limit = torch.tensor([length], device=device)
    sinks = kernel.capture_sinks(q, k, lse, weight, None, limit, count, 1.0)
    assert sinks.tolist() == expected
