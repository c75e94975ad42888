"""`compact_rows`: fast against reference, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.compaction import reference
from focus_compile.kernels.compaction.op import compact_rows
from tests.kernels.ragged import ragged_rows, strided
from tests.kernels.strategies import fuzzed

Case = tuple[Tensor, Tensor, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """(keep, starts, capacity): from none kept to all, in padding too; room for some or for all."""
    rows = draw(ragged_rows())
    keep = strided(rows.masked, draw(st.booleans()))
    return keep, rows.starts, draw(st.integers(0, rows.total + 5))


@fuzzed
@given(cases())
def test_matches_reference(case: Case) -> None:
    for found, expected in zip(compact_rows(*case), reference.compact_rows(*case), strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
        assert found.is_contiguous()


@fuzzed
@given(cases())
def test_laws(case: Case) -> None:
    """What is read through the index are the kept rows of each sequence, in order."""
    keep, starts, _ = case
    index, new_starts = compact_rows(keep, starts, keep.shape[0])
    rows = torch.arange(keep.shape[0])
    assert new_starts[0] == 0
    for s in range(starts.shape[0] - 1):
        part = slice(int(starts[s]), int(starts[s + 1]))
        new = index[int(new_starts[s]) : int(new_starts[s + 1])]
        assert torch.equal(new, rows[part][keep[part]])
    count = int(new_starts[-1])
    assert count == int(keep[: int(starts[-1])].sum())
    assert (index[count:] == (index[count - 1] if count else 0)).all()


@fuzzed
@given(cases())
def test_twice_is_once(case: Case) -> None:
    """All kept, nothing changes."""
    keep, starts, capacity = case
    _, new_starts = compact_rows(keep, starts, capacity)
    again, same = compact_rows(torch.ones(capacity, dtype=torch.bool), new_starts, capacity)
    count = int(new_starts[-1])
    assert torch.equal(same, new_starts)
    assert torch.equal(again[:count], torch.arange(count))


@pytest.mark.parametrize("sequences", [0, 3])
def test_nothing(sequences: int) -> None:
    starts = torch.zeros(sequences + 1).int()
    for rows in (0, 3):
        index, new_starts = compact_rows(torch.ones(rows, dtype=torch.bool), starts, 4)
        assert index.tolist() == [0] * 4
        assert torch.equal(new_starts, starts)


@pytest.mark.parametrize(
    ("keep", "starts", "capacity", "error"),
    [
        (torch.ones(5), torch.tensor([0, 5]), 5, TypeError),
        (torch.tensor(True), torch.tensor([0, 5]), 5, ValueError),
        (torch.ones(5, dtype=torch.bool), torch.tensor([0.0]), 5, TypeError),
        (torch.ones(5, dtype=torch.bool), torch.tensor([0, 5])[:0], 5, ValueError),
        (torch.ones(5, dtype=torch.bool), torch.tensor([0, 5]), -1, ValueError),
    ],
)
def test_bad_input(keep: Tensor, starts: Tensor, capacity: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="compact_rows: "):
        compact_rows(keep, starts, capacity)
