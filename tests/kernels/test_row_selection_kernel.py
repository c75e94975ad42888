"""`select_rows` in Triton: interpreted, or compiled on CUDA; it decides as the reference does.

pytest -m gpu tests/kernels/test_row_selection_kernel.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.row_selection import cpu, reference
from tests.kernels.devices import each_device, moved
from tests.kernels.ragged import make_rows
from tests.kernels.test_row_selection import Case, cases

pytest.importorskip("triton")
from focus_compile.kernels.row_selection import kernel


def run(case: Case, device: str) -> Tensor:
    keep = kernel.select_rows(*(moved(tensor, device) for tensor in case[:-1]), case[-1])
    assert (keep.dtype, keep.is_contiguous()) == (torch.bool, True)
    return keep.cpu()


@each_device
@settings(deadline=None, max_examples=16)
@given(data=st.data())
def test_matches_reference(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(most=40))
    assert torch.equal(run(case, device), reference.select_rows(*case))


@each_device
@pytest.mark.parametrize("most", [1, 16, 64, 256])
def test_blocks_of_every_size(device: str, most: int) -> None:
    """With much padding, which several programs clear; `cpu` decides alike."""
    for seed in range(6):
        rows = make_rows([most, 0, most // 2, most], padding=3000, gap=1 + seed % 2, seed=seed)
        delta = torch.randn(rows.total, generator=torch.Generator().manual_seed(seed))
        target = torch.tensor([2, 0, 1, most // 3])
        progress = torch.tensor([-1, 5, 1000, 20])
        case = (delta, rows.masked, rows.positions, rows.starts, target, progress, most)
        keep = run(case, device)
        assert torch.equal(keep, reference.select_rows(*case))
        assert torch.equal(keep, cpu.select_rows(*case))


@each_device
@pytest.mark.parametrize("pair", [(0.1, 0.1), (0.1, 0.3), (33.3, 33.300003)])
def test_equal_deltas_and_halves(device: str, pair: tuple[float, float]) -> None:
    for n in (2, 6, 22, 254, 256):
        rows = make_rows([n], share=1.0, gap=3)
        delta = torch.tensor(pair).repeat(n // 2)
        one = torch.tensor([1])
        case = (delta, rows.masked, rows.positions, rows.starts, one, one * 5000, n)
        assert torch.equal(run(case, device), reference.select_rows(*case))


@each_device
@pytest.mark.parametrize("sequences", [0, 2])
def test_nothing(device: str, sequences: int) -> None:
    starts, none = torch.zeros(sequences + 1).int(), torch.zeros(sequences).long()
    for rows in (0, 3):
        masked = torch.ones(rows, dtype=torch.bool)
        keep = run((torch.ones(rows), masked, masked.long(), starts, none, none, 4), device)
        assert torch.equal(keep, torch.zeros(rows, dtype=torch.bool))
