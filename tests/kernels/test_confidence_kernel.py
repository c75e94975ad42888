"""`confidence` in Triton: interpreted, or compiled on CUDA.

pytest -m gpu tests/kernels/test_confidence_kernel.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.confidence import cpu
from tests.kernels.devices import FLOATS, each_device, few, moved

pytest.importorskip("triton")
from focus_compile.kernels.confidence import kernel


@each_device
@given(data=st.data())
@few
def test_confidence(device: str, data: st.DataObject) -> None:
    """Normal, tied or huge logits of up to 4 axes and of odd strides, over several slices."""
    draw = data.draw
    shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.integers(1, 5000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from((0.1, 3.0, 1e3)))
    if draw(st.booleans()):
        values = values.round()
    if draw(st.booleans()):
        values[torch.rand(shape, generator=generator) < 0.3] = -torch.inf
    values = values.to(draw(st.sampled_from(FLOATS)))
    if draw(st.booleans()):
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    check_confidence(values, device)


def check_confidence(values: Tensor, device: str) -> None:
    probability, token = kernel.confidence(moved(values, device))
    assert (probability.dtype, token.dtype) == (torch.float32, torch.int64)
    assert probability.shape == token.shape == values.shape[:-1]
    exact, best = cpu.confidence(values.double())
    assert torch.equal(token.cpu(), best)
    torch.testing.assert_close(probability.cpu(), exact, rtol=1e-5, atol=0, equal_nan=True)


@each_device
@pytest.mark.parametrize("dtype", FLOATS)
def test_confidence_of_slices_with_nothing_finite_or_unknown(
    device: str, dtype: torch.dtype
) -> None:
    """Rows whose first slices are -inf, all is -inf, one logit is NaN or +inf; ties across."""
    values = torch.zeros(7, 3000, dtype=dtype)
    values[0, :2100] = -torch.inf
    values[1] = -torch.inf
    values[2, 2500], values[2, 2700] = torch.nan, torch.nan
    values[3, 1500] = torch.inf
    values[4, [1023, 1024, 2999]] = 5.0
    values[5, 2999] = 60.0
    values[6, 1:] = -torch.inf
    check_confidence(values, device)
    check_confidence(values[1:6, 5::7], device)
    probability, _ = kernel.confidence(moved(values, device))
    assert probability.isnan().tolist() == [False, True, True, True, False, False, False]
    assert float(probability[6]) == 1.0


@each_device
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 9000), (130, 40)])
def test_confidence_of_few_and_of_many_rows(device: str, rows: int, vocabulary: int) -> None:
    torch.manual_seed(rows)
    check_confidence(torch.randn(rows, vocabulary), device)
    room = torch.randn(2, rows + 3, vocabulary + 8)
    check_confidence(room[:, 1:-2, 5:-3], device)
    check_confidence(torch.randn(2, 3, 2, vocabulary).transpose(0, 2), device)
