"""`ragged_attention` in Triton: interpreted in float32, or compiled on CUDA.

pytest -m gpu tests/kernels/test_ragged_attention_kernel.py
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.devices import DOT_DTYPES, each_device, moved
from tests.kernels.ragged import laid_out, make_rows
from tests.kernels.strategies import lay_out
from tests.kernels.test_ragged_attention import Case, assert_accurate, cases, poisoned

pytest.importorskip("triton")
from focus_compile.kernels.ragged_attention import kernel
from focus_compile.kernels.tiling import H100, Tiling

SMALL_TILES = (None, Tiling(16, 16, 1, 4, 2), Tiling(16, 32, 3, 4, 3), Tiling(32, 16, 5, 4, 2))
few = settings(deadline=None, max_examples=8)


def run(case: Case, device: str, tiling: Tiling | None = None) -> Tensor:
    arguments = [moved(a, device) if isinstance(a, Tensor) else a for a in case.arguments]
    return kernel.ragged_attention(*arguments, tiling=tiling).cpu()


@each_device
@few
@given(data=st.data())
def test_is_as_accurate_as_plain_attention(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtypes=DOT_DTYPES[device]))
    found = run(case, device, data.draw(st.sampled_from(SMALL_TILES)))
    assert_accurate(found, case)


@each_device
@few
@given(data=st.data())
def test_reads_visible_keys_only(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtypes=DOT_DTYPES[device]))
    found = run(poisoned(case), device, data.draw(st.sampled_from(SMALL_TILES)))
    assert_accurate(found, case)


def made(heads: int, kv_heads: int, width: int, length: int, dtype: torch.dtype) -> Case:
    """Whole blocks and single rows, empty and short contexts, padding of several tiles."""
    torch.manual_seed(width)
    rows = make_rows([32, 0, 1, 9, 32, 3], padding=70)
    k, v = torch.randn(2, 8, kv_heads, length, width).to(dtype)
    return Case(
        q=laid_out(torch.randn(heads, rows.total, width).to(dtype), "heads-inside"),
        k=lay_out(k, "heads-inside"),
        v=v,
        slot=torch.tensor([7, 0, 3, 2, 5, 6]),
        rows=rows,
        lengths=torch.tensor([length, 3, length - 1, 1, 0, 64]),
        scale=width**-0.5,
    )


@each_device
@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(8, 2, 128), (4, 4, 64), (7, 1, 80), (2, 1, 256)]
)
def test_shapes_of_models(
    device: str, heads: int, kv_heads: int, width: int, splits: int | None
) -> None:
    """Groups that are no power of two, head dimensions that are none; the tiling of each call."""
    for dtype in DOT_DTYPES[device]:
        case = made(heads, kv_heads, width, 203 if device == "cpu" else 1511, dtype)
        tiling = kernel.tiling_for(case.q, case.k, case.rows.starts, case.rows.max_rows)
        if splits is not None:
            tiling = replace(tiling, splits=splits)
        assert_accurate(run(case, device, tiling), case)


@each_device
@pytest.mark.parametrize("splits", [1, 3])
def test_longer_lengths_than_the_cache_are_cut(device: str, splits: int) -> None:
    case = made(4, 2, 16, 75, torch.float32)
    tiling = Tiling(16, 16, splits, 4, 2)
    found = run(replace(case, lengths=case.lengths + 10**10), device, tiling)
    assert_accurate(found, replace(case, lengths=torch.full((6,), 75)))


@each_device
@pytest.mark.parametrize("splits", [1, 2])
def test_padding_alone(device: str, splits: int) -> None:
    case = made(4, 2, 16, 75, torch.float32)
    empty = replace(case, rows=replace(case.rows, starts=torch.zeros(7, dtype=torch.int64)))
    found = run(empty, device, Tiling(16, 16, splits, 4, 2))
    assert torch.equal(found, torch.zeros(case.q.shape))


@each_device
@pytest.mark.parametrize("sequences", [0, 2])
def test_nothing(device: str, sequences: int) -> None:
    rows = make_rows([0] * sequences)
    for total in (0, 3):
        case = Case(
            q=torch.ones(2, total, 4),
            k=torch.ones(2, 1, 5, 4),
            v=torch.ones(2, 1, 5, 4),
            slot=torch.zeros(sequences).long(),
            rows=rows,
            lengths=torch.full((sequences,), 5),
            scale=1.0,
        )
        assert torch.equal(run(case, device), torch.zeros(2, total, 4))


@pytest.mark.parametrize(
    ("sequences", "length", "splits"), [(1, 8192, 15), (4, 8192, 4), (16, 8192, 1), (256, 1024, 1)]
)
def test_splits_fill_the_device(sequences: int, length: int, splits: int) -> None:
    """SDAR-8B's heads: one tile of 64 pairs a sequence and kv head, whatever the block."""
    q = torch.empty(32, 64, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(sequences, 8, length, 128, dtype=torch.bfloat16, device="meta")
    tiling = kernel.tiling_for(q, k, torch.empty(sequences + 1), 64)
    assert (tiling.block_m, tiling.splits) == (64, splits)
    shared = (tiling.block_m + 2 * tiling.stages * tiling.block_n) * 256
    assert shared <= H100.shared_memory
