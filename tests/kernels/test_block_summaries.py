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
    out = block_summaries(k, key_block)
    exact = reference.block_summaries(k.double(), key_block)
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
    out = reference.block_summaries(k, key_block)
    assert out.shape[2] == len(means)
    for j, mean in enumerate(means):
        torch.testing.assert_close(out[:, :, j], mean, rtol=1e-13, atol=1e-13)


@fuzzed
@given(problems(masks=("none",), dtypes=(torch.float32,)))
def test_blocks_of_one_token_are_the_keys(problem: Problem) -> None:
    assert torch.equal(block_summaries(problem.k, 1), problem.k)


def test_no_full_block() -> None:
    assert block_summaries(torch.randn(2, 3, 7, 8), 32).shape == (2, 3, 0, 8)


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
        block_summaries(k, key_block)
