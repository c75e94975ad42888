"""`compact_rows` in Triton: interpreted, or compiled on CUDA.

pytest -m gpu tests/kernels/test_compaction_kernel.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_compile.kernels.compaction import cpu, reference
from tests.kernels.devices import each_device, moved
from tests.kernels.ragged import make_rows
from tests.kernels.test_compaction import Case, cases

pytest.importorskip("triton")
from focus_compile.kernels.compaction import kernel


def check(case: Case, device: str, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    keep, starts, capacity = case
    found = kernel.compact_rows(moved(keep, device), moved(starts, device), capacity)
    for part, value in zip(found, expected, strict=True):
        assert part.is_contiguous()
        assert torch.equal(part.cpu(), value)
        assert part.dtype == value.dtype


@each_device
@settings(deadline=None, max_examples=16)
@given(data=st.data())
def test_matches_reference(device: str, data: st.DataObject) -> None:
    case = data.draw(cases())
    check(case, device, reference.compact_rows(*case))


@each_device
@pytest.mark.parametrize("capacity", [0, 300, 20000])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_more_rows_than_are_counted_at_once(device: str, capacity: int, share: float) -> None:
    rows = make_rows([64, 900, 0, 5000, 1, 4096], padding=5000, share=share)
    case = rows.masked, rows.starts, capacity
    check(case, device, cpu.compact_rows(*case))


@each_device
@pytest.mark.parametrize("sequences", [0, 3])
def test_nothing(device: str, sequences: int) -> None:
    starts = torch.zeros(sequences + 1).int()
    for rows in (0, 3):
        case = torch.ones(rows, dtype=torch.bool), starts, 4
        check(case, device, reference.compact_rows(*case))
