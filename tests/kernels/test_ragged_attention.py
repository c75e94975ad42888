"""`ragged_attention`: fast against reference, that against plain attention, and laws."""

from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.ragged_attention import reference
from focus_compile.kernels.ragged_attention.op import ragged_attention
from tests.kernels.ragged import Rows, laid_out, permuted, ragged_rows, strided
from tests.kernels.strategies import (
    DTYPES,
    LAYOUTS,
    Problem,
    assert_as_accurate,
    fuzzed,
    lay_out,
    plain_attention,
)


@dataclass(frozen=True)
class Case:
    """ragged_attention's arguments; `rows` holds starts and max_rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    slot: Tensor
    rows: Rows
    lengths: Tensor
    scale: float

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float]:
        rows = self.rows
        return (
            *(self.q, self.k, self.v, self.slot, rows.starts, self.lengths),
            *(rows.max_rows, self.scale),
        )

    def double(self) -> "Case":
        return replace(self, q=self.q.double(), k=self.k.double(), v=self.v.double())


@st.composite
def cases(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Odd strides; slots in any order, some unused; lengths from 0 to all."""
    rows = draw(ragged_rows())
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    length, width = draw(st.integers(1, 70)), draw(st.sampled_from((8, 16, 20)))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    sequences = len(rows.slices)
    slots = sequences + draw(st.integers(1, 2))

    def normal(*shape: int) -> Tensor:
        return torch.randn((*shape, width), generator=generator).to(dtype)

    k, v = normal(slots, kv_heads, length), normal(slots, kv_heads, length)
    odd = draw(st.booleans())
    lengths = torch.randint(length + 1, (sequences,), generator=generator)
    return Case(
        q=laid_out(normal(kv_heads * group, rows.total), draw(st.sampled_from(LAYOUTS))),
        k=lay_out(k, draw(st.sampled_from(LAYOUTS))),
        v=lay_out(v, draw(st.sampled_from(LAYOUTS))),
        slot=strided(torch.randperm(slots, generator=generator)[:sequences], odd),
        rows=rows,
        lengths=strided(lengths, odd),
        scale=draw(st.sampled_from((width**-0.5, 1.0, -0.3))),
    )


def exact(case: Case) -> Tensor:
    return reference.ragged_attention(*case.double().arguments)


def plain(case: Case) -> Tensor:
    """Torch's attention in the case's dtype, one sequence at a time."""
    out = torch.zeros_like(case.q, memory_format=torch.contiguous_format)
    for s, part in enumerate(case.rows.slices):
        length = int(case.lengths[s])
        if part.stop > part.start and length > 0:
            slot = int(case.slot[s])
            k, v = (cache[slot, None, :, :length] for cache in (case.k, case.v))
            q = case.q[None, :, part]
            weight = torch.ones(1, q.shape[2])
            out[:, part] = plain_attention(Problem(q, k, v, None, weight, case.scale))[0]
    return out


def assert_accurate(found: Tensor, case: Case) -> None:
    assert found.is_contiguous()
    values = case.v[~case.v.isnan()]
    assert_as_accurate(found, exact(case), plain(case), values)
    assert (found[:, int(case.rows.starts[-1]) :] == 0).all()
    for part, length in zip(case.rows.slices, case.lengths.tolist(), strict=True):
        if length == 0:
            assert (found[:, part] == 0).all()


def poisoned(case: Case) -> Case:
    """What is not visible to its sequence, or to none, is NaN; so are the queries of padding."""
    k, v = (torch.full(cache.shape, torch.nan, dtype=cache.dtype) for cache in (case.k, case.v))
    for slot, length in zip(case.slot.tolist(), case.lengths.tolist(), strict=True):
        k[slot, :, :length] = case.k[slot, :, :length]
        v[slot, :, :length] = case.v[slot, :, :length]
    q = case.q.clone()
    q[:, int(case.rows.starts[-1]) :] = torch.nan
    return replace(case, q=q, k=k, v=v)


@fuzzed
@given(cases())
def test_is_as_accurate_as_plain_attention(case: Case) -> None:
    assert_accurate(ragged_attention(*case.arguments), case)


@fuzzed
@given(cases())
def test_reads_visible_keys_only(case: Case) -> None:
    found = ragged_attention(*poisoned(case).arguments)
    assert_accurate(found, case)


@fuzzed
@given(cases(dtypes=(torch.float64,)))
def test_reference_is_plain_attention(case: Case) -> None:
    torch.testing.assert_close(exact(case), plain(case), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ragged_attention(*case.arguments), exact(case))


@fuzzed
@given(cases(dtypes=(torch.float32,)), st.randoms())
def test_order_of_sequences_does_not_matter(case: Case, random: Random) -> None:
    order = list(range(len(case.rows.slices)))
    random.shuffle(order)
    rows, source = permuted(case.rows, order)
    moved = replace(
        case, q=case.q[:, source], rows=rows, slot=case.slot[order], lengths=case.lengths[order]
    )
    found = ragged_attention(*moved.arguments)
    torch.testing.assert_close(found, ragged_attention(*case.arguments)[:, source])


def test_several_sequences_may_share_a_slot() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 8), torch.randn(3, 1, 9, 8)
    starts, lengths = torch.tensor([0, 2, 4]), torch.tensor([9, 9])
    found = ragged_attention(q, k, k, torch.tensor([2, 2]), starts, lengths, 2, 0.3)
    whole = ragged_attention(q, k, k, torch.tensor([2]), starts[[0, 2]], lengths[:1], 4, 0.3)
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("sequences", [0, 2])
def test_nothing(sequences: int) -> None:
    starts, none = torch.zeros(sequences + 1).int(), torch.zeros(sequences).long()
    for rows in (0, 3):
        q, k = torch.ones(2, rows, 4), torch.ones(2, 1, 5, 4)
        found = ragged_attention(q, k, k, none, starts, none + 5, 4, 1.0)
        assert torch.equal(found, torch.zeros(2, rows, 4))


GOOD = {
    "q": torch.ones(4, 5, 8),
    "k": torch.ones(3, 2, 7, 8),
    "v": torch.ones(3, 2, 7, 8),
    "slot": torch.tensor([1]),
    "starts": torch.tensor([0, 5]),
    "lengths": torch.tensor([7]),
    "max_rows": 5,
    "scale": 1.0,
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("q", torch.ones(1, 4, 5, 8), ValueError),
        ("q", torch.ones(4, 5, 9), ValueError),
        ("q", torch.ones(3, 5, 8), ValueError),
        ("q", torch.ones(4, 5, 8).long(), TypeError),
        ("q", torch.ones(4, 5, 8).double(), TypeError),
        ("v", torch.ones(3, 2, 6, 8), ValueError),
        ("v", torch.ones(2, 7, 8), ValueError),
        ("slot", torch.tensor([1]).int(), TypeError),
        ("slot", torch.tensor([1, 2]), ValueError),
        ("starts", torch.tensor([0.0, 5.0]), TypeError),
        ("starts", torch.tensor([0, 2, 5]), ValueError),
        ("lengths", torch.tensor([7.0]), TypeError),
        ("lengths", torch.tensor([[7]]), ValueError),
        ("max_rows", 0, ValueError),
    ],
)
def test_bad_input(name: str, value: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="ragged_attention: "):
        ragged_attention(**(GOOD | {name: value}))
