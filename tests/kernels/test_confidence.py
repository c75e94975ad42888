"""`confidence`: fast against reference, ties, extremes, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.confidence import cpu, reference
from focus_compile.kernels.confidence.op import confidence
from tests.kernels.strategies import DTYPES, fuzzed

EPS = torch.finfo(torch.float32).eps


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """[..., V]: normal, flat with many ties, or huge; some entries -inf; some of odd strides."""
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.integers(1, 50)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from((0.1, 3.0, 1e4)))
    if draw(st.booleans()):
        values = values.round()
    if draw(st.booleans()):
        hidden = torch.rand(shape, generator=generator) < 0.3
        hidden[..., 0] = False
        values = values.masked_fill(hidden, -torch.inf)
    values = values.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    return values


@fuzzed
@given(logits())
def test_matches_reference(values: Tensor) -> None:
    probability, token = confidence(values)
    expected, best = reference.confidence(values)
    assert (probability.dtype, token.dtype) == (torch.float32, torch.int64)
    assert probability.is_contiguous()
    assert token.is_contiguous()
    assert torch.equal(token, best)
    allowed = (values.shape[-1] + 8) * EPS * expected
    assert ((probability - expected).abs() <= allowed).all()


@fuzzed
@given(logits())
def test_reference_is_the_softmax_maximum(values: Tensor) -> None:
    probability, token = reference.confidence(values)
    if values.numel() == 0:
        return
    weights = (values.double() - values.double().amax(-1, keepdim=True)).exp()
    expected = weights.amax(-1) / weights.sum(-1)
    torch.testing.assert_close(probability.double(), expected, rtol=2 * EPS, atol=0)
    assert torch.equal(token, values.double().argmax(-1))


@fuzzed
@given(logits())
def test_lies_between_a_share_and_certainty(values: Tensor) -> None:
    probability, _ = confidence(values)
    assert (probability * values.shape[-1] >= 1 - values.shape[-1] * EPS).all()
    assert (probability <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_token(dtype: torch.dtype) -> None:
    values = torch.zeros(3, 1000, dtype=dtype)
    values[1, 400:] = 5.0
    values[2, [999, 7]] = 1.0
    assert confidence(values)[1].tolist() == [0, 400, 7]


def test_nearly_equal_logits_are_no_tie() -> None:
    """Their float32 probabilities are equal; the larger logit still wins."""
    values = torch.tensor([1e-9, 2e-9])
    assert int(confidence(values)[1]) == 1


def test_many_rows_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 7, 11)
    whole = cpu.confidence(values)
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 25)
    for part, expected in zip(cpu.confidence(values), whole, strict=True):
        assert torch.equal(part, expected)


def test_certainty_and_nothing_finite() -> None:
    values = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
    probability, _ = confidence(values)
    assert float(probability[0]) == 1.0
    assert bool(probability[1].isnan())


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (torch.tensor(1.0), ValueError),
        (torch.zeros(3, 0), ValueError),
        (torch.zeros(3, 4).long(), TypeError),
    ],
)
def test_bad_input(values: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="confidence: "):
        confidence(values)
