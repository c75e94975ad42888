"""`importance` in Triton: interpreted in float32, or compiled on CUDA.

pytest -m gpu tests/kernels/test_importance_kernel.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.devices import DOT_DTYPES, each_device, few, moved
from tests.kernels.ragged import laid_out, make_rows, permuted
from tests.kernels.test_importance import Case, assert_accurate, cases

pytest.importorskip("triton")
from focus_compile.kernels.importance import kernel
from focus_compile.kernels.tiling import Device


def run(case: Case, device: str) -> Tensor:
    rows, q, k, scale = case
    given = [moved(tensor, device) for tensor in (q, k, rows.masked, rows.starts)]
    found = kernel.importance(*given, rows.max_rows, scale)
    assert found.is_contiguous()
    return found.cpu()


@each_device
@few
@given(data=st.data())
def test_matches_reference(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtypes=DOT_DTYPES[device], most=40))
    assert_accurate(run(case, device), case)


@each_device
@pytest.mark.parametrize("most", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 1, 128), (3, 3, 64), (14, 2, 80)])
def test_blocks_of_models(device: str, most: int, heads: int, kv_heads: int, width: int) -> None:
    """Whole blocks, none, one and two masked rows, widths that are no power of two."""
    torch.manual_seed(most)
    dtypes = DOT_DTYPES[device] if device == "cuda" or most <= 64 or heads == 4 else ()
    for dtype in dtypes:
        rows = make_rows([most, 0, 1, 2, most // 2 + 1], padding=5, seed=most)
        rows.masked[most : most + 3] = torch.tensor([False, True, True])
        shape = (rows.total, width)
        q, k = torch.randn(heads, *shape).to(dtype), torch.randn(kv_heads, *shape).to(dtype)
        case = rows, laid_out(q, "heads-inside"), laid_out(k, "window"), width**-0.5
        assert_accurate(run(case, device), case)


@each_device
def test_heads_together(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes a whole group where the sequences alone fill the device."""
    torch.manual_seed(0)
    rows = make_rows([9, 17, 4], padding=3)
    case = rows, torch.randn(8, rows.total, 16), torch.randn(2, rows.total, 16), 0.25
    apart = run(case, device)
    small = Device(multiprocessors=1, shared_memory=166912)
    monkeypatch.setattr(kernel, "device_limits", lambda _: small)
    together = run(case, device)
    assert_accurate(together, case)
    torch.testing.assert_close(together, apart)


@each_device
def test_tiles_that_do_not_fit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = make_rows([9, 17, 4], padding=3)
    case = rows, torch.randn(8, rows.total, 16), torch.randn(2, rows.total, 16), 0.25
    monkeypatch.setattr(kernel, "device_limits", lambda _: Device(100, 5000))
    assert_accurate(run(case, device), case)


@each_device
def test_the_same_bits(device: str) -> None:
    """Again, in another order of the sequences, and whatever other rows hold."""
    torch.manual_seed(0)
    rows = make_rows([31, 7, 0, 64], padding=9)
    q, k = torch.randn(8, rows.total, 64), torch.randn(2, rows.total, 64)
    found = run((rows, q, k, 0.125), device)
    assert torch.equal(run((rows, q, k, 0.125), device), found)
    other, source = permuted(rows, [3, 1, 0, 2])
    assert torch.equal(run((other, q[:, source], k[:, source], 0.125), device), found[source])
    counts = rows.masked & (torch.arange(rows.total) < rows.starts[-1])
    poisoned = [values.where(counts[:, None], torch.nan) for values in (q, k)]
    assert torch.equal(run((rows, *poisoned, 0.125), device), found)


@each_device
@pytest.mark.parametrize("sequences", [0, 2])
def test_nothing(device: str, sequences: int) -> None:
    starts = torch.zeros(sequences + 1, dtype=torch.int32).to(device)
    for rows in (0, 3):
        q, masked = torch.ones(2, rows, 4).to(device), torch.ones(rows, dtype=torch.bool)
        found = kernel.importance(q, q, masked.to(device), starts, 4, 1.0)
        assert torch.equal(found.cpu(), torch.zeros(rows))
