"""Buckets and packing: every active row once, padded by rows that are active already."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.runtime.buckets import bucket_for, pack_rows

quick = settings(max_examples=200, deadline=None, derandomize=True)
ladders = st.none() | st.sets(st.integers(2, 40), min_size=1, max_size=4).map(
    lambda counts: tuple(sorted(counts))
)


@quick
@given(rows=st.integers(1, 5000), ladder=ladders)
def test_a_bucket_holds_the_rows(rows: int, ladder: tuple[int, ...] | None) -> None:
    bucket = bucket_for(rows, ladder, 10**6, "cpu")
    assert bucket >= rows
    assert bucket <= max(8, 2 * rows) or ladder is not None
    assert bucket_for(bucket, ladder, 10**6, "cpu") == bucket
    assert bucket_for(rows, ladder, rows, "cpu") == max(2, rows)


@quick
@given(ladder=ladders)
def test_larger_counts_never_get_smaller_buckets(ladder: tuple[int, ...] | None) -> None:
    buckets = [bucket_for(rows, ladder, 10**6, "cpu") for rows in range(1, 600)]
    assert buckets == sorted(buckets)
    assert len(set(buckets)) < 320


@pytest.mark.parametrize(
    ("rows", "ladder", "bucket", "device"),
    [
        (1, None, 8, "cpu"), (8, None, 8, "cpu"), (9, None, 16, "cpu"), (64, None, 64, "cpu"),
        (65, None, 96, "cpu"), (256, None, 256, "cpu"), (257, None, 512, "cpu"),
        (3, (4, 10), 4, "cpu"), (10, (4, 10), 10, "cpu"), (11, (4, 10), 20, "cpu"),
        (1, None, 32, "cuda"), (65, None, 96, "cuda"), (129, None, 192, "cuda"),
        (257, None, 512, "cuda"),
    ],
)  # fmt: skip
def test_ladders(rows: int, ladder: tuple[int, ...] | None, bucket: int, device: str) -> None:
    assert bucket_for(rows, ladder, 4096, device) == bucket


@st.composite
def active_sets(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(active, focus): bool [batch, length], at least one active row each, focus among them."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    active, focus = torch.zeros(2, batch, length, dtype=torch.bool)
    for b in range(batch):
        rows = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=length, unique=True))
        active[b, rows] = True
        focus[b, draw(st.lists(st.sampled_from(rows), unique=True))] = True
    return active, focus


@quick
@given(sets=active_sets(), ladder=ladders)
def test_packing_keeps_the_sets(
    sets: tuple[Tensor, Tensor], ladder: tuple[int, ...] | None
) -> None:
    active, focus = sets
    bucket = bucket_for(int(active.sum(1).max()), ladder, active.shape[1], "cpu")
    packed = pack_rows(active, focus, bucket)
    assert packed.rows.shape == packed.row_weight.shape == packed.focus_weight.shape
    assert 2 <= packed.rows.shape[1] <= max(2, active.shape[1])
    for b, rows in enumerate(packed.rows):
        counted = rows[packed.row_weight[b] > 0].tolist()
        assert counted == active[b].nonzero()[:, 0].tolist()
        assert set(rows.tolist()) == set(counted)
        chosen = rows[packed.focus_weight[b] > 0].tolist()
        expected = focus[b] if focus[b].any() else active[b]
        assert sorted(chosen) == expected.nonzero()[:, 0].tolist()


def test_one_token_is_padded_to_two_rows() -> None:
    """A size of one would be specialised by the compiler."""
    one = torch.ones(1, 1, dtype=torch.bool)
    packed = pack_rows(one, one, bucket_for(1, None, 1, "cpu"))
    assert packed.rows.tolist() == [[0, 0]]
    assert packed.row_weight.tolist() == packed.focus_weight.tolist() == [[1.0, 0.0]]
