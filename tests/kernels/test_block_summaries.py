"""`block_summaries`: fast against reference, strides, partial blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focus_compile.kernels.block_summaries import reference
from focus_compile.kernels.block_summaries.op import block_summaries
from tests.kernels.strategies import Problem, fuzzed, problems


@fuzzed
@given(problems(masks=("none",)), st.integers(1, 80))
def test_is_the_mean_rounded_once(problem: Problem, key_block: int) -> None:
    """Against float64: float32 accumulation, then one rounding to the dtype of k."""
    k = problem.k
    out = block_summaries(k, key_block, "mean")
    exact = reference.block_summaries(k.double(), key_block, "mean")
    assert out.dtype == k.dtype
    assert out.is_contiguous()
    assert out.shape == exact.shape
    largest = float(k.abs().max())
    accumulation = 2 * key_block * torch.finfo(torch.float32).eps * largest
    rounding = torch.finfo(k.dtype).eps / 2 * exact.abs()
    assert ((out.double() - exact).abs() <= accumulation + rounding).all()


@fuzzed
@given(problems(masks=("none",)), st.integers(1, 12))
def test_reference_is_the_mean_of_each_block(problem: Problem, key_block: int) -> None:
    k = problem.k.double()
    means = [block.mean(2) for block in k.split(key_block, 2) if block.shape[2] == key_block]
    out = reference.block_summaries(k, key_block, "mean")
    assert out.shape[2] == len(means)
    for j, mean in enumerate(means):
        torch.testing.assert_close(out[:, :, j], mean, rtol=1e-13, atol=1e-13)


@fuzzed
@given(problems(masks=("none",), dtypes=(torch.float32,)))
def test_blocks_of_one_token_are_the_keys(problem: Problem) -> None:
    assert torch.equal(block_summaries(problem.k, 1, "mean"), problem.k)
    bounds = block_summaries(problem.k, 1, "bound")
    assert torch.equal(bounds, torch.cat([problem.k, problem.k], -1))


@fuzzed
@given(problems(masks=("none",)), st.integers(1, 80))
def test_bounds_are_exact(problem: Problem, key_block: int) -> None:
    k = problem.k
    out = block_summaries(k, key_block, "bound")
    exact = reference.block_summaries(k.double(), key_block, "bound")
    assert out.dtype == k.dtype
    assert out.is_contiguous()
    assert out.shape == exact.shape
    assert torch.equal(out.double(), exact)


@fuzzed
@given(problems(masks=("none",)), st.integers(1, 12))
def test_reference_box_bounds_every_key(problem: Problem, key_block: int) -> None:
    """max(q, 0) . high + min(q, 0) . low is at least q . k, and is reached by one channel."""
    k = problem.k.double()
    boxes = reference.block_summaries(k, key_block, "bound")
    query = torch.randn(k.shape[-1], dtype=torch.float64)
    bounds = boxes @ torch.cat([query.clamp(min=0), query.clamp(max=0)])
    for j in range(boxes.shape[2]):
        block = k[:, :, j * key_block : (j + 1) * key_block]
        assert ((block @ query).amax(2) <= bounds[:, :, j] + 1e-9).all()
        assert torch.equal(boxes[:, :, j, 0], block[..., 0].amax(2))


def test_no_full_block() -> None:
    assert block_summaries(torch.randn(2, 3, 7, 8), 32, "mean").shape == (2, 3, 0, 8)
    assert block_summaries(torch.randn(2, 3, 7, 8), 32, "bound").shape == (2, 3, 0, 16)


@pytest.mark.parametrize(
    ("k", "key_block", "error"),
    [
        (torch.zeros(2, 3, 4), 1, ValueError),
        (torch.zeros(2, 3, 4, 5), 0, ValueError),
        (torch.zeros(2, 3, 4, 5).long(), 1, TypeError),
    ],
)
def test_bad_input(k: torch.Tensor, key_block: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="block_summaries: "):
        block_summaries(k, key_block, "mean")


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        block_summaries(torch.zeros(1, 1, 4, 2), 2, "median")
