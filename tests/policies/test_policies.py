"""Policies as pure functions: rows by set arithmetic, in plain Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.policies.base import StepView, windows_around
from focus_compile.policies.block_caches import DualCache, PrefixCache
from focus_compile.policies.focus_dllm import FocusDllm
from focus_compile.policies.presets import policy_for
from focus_compile.runtime.trajectory import Blocks

quick = settings(max_examples=150, deadline=None, derandomize=True)


def flags(rows: list[list[int]], length: int) -> Tensor:
    found = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, positions in zip(found, rows, strict=True):
        row[positions] = True
    return found


def sets(flags: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in flags]


def view_of(
    masked: list[list[int]],
    confidence: list[list[float]],
    *,
    changed: list[list[int]] | None = None,
    starts: list[int] | None = None,
    block_length: int = 4,
) -> StepView:
    """A step in which `masked` positions are left of responses that began at `starts`."""
    length = len(confidence[0])
    undecided = flags(masked, length)
    blocks = Blocks(torch.tensor(starts or [0] * len(masked)), block_length)
    block = blocks.current(undecided)
    return StepView(
        masked=undecided,
        changed=flags(changed or [[] for _ in masked], length),
        confidence=torch.tensor(confidence),
        block=block,
        block_start=blocks.start_of(block),
        block_length=block_length,
    )


@quick
@given(
    length=st.integers(1, 24),
    width=st.integers(1, 60),
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
)
def test_windows_are_unions_of_intervals(length: int, width: int, seed: int, batch: int) -> None:
    centres = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    expected = [
        {p for i in row for p in range(i - (width - 1) // 2, i + width // 2 + 1) if 0 <= p < length}
        for row in sets(centres)
    ]
    assert sets(windows_around(centres, width)) == expected


@pytest.mark.parametrize(
    ("width", "rows"), [(1, {4}), (2, {4, 5}), (3, {3, 4, 5}), (4, {3, 4, 5, 6})]
)
def test_an_even_window_reaches_further_right(width: int, rows: set[int]) -> None:
    assert sets(windows_around(flags([[4]], 8), width)) == [rows]


def test_focus_takes_the_most_confident_masks_of_the_current_block() -> None:
    view = view_of([[1, 2, 3, 5]], [[0.9, 0.2, 0.5, 0.4, 0.0, 0.99]], changed=[[0]])
    selection = FocusDllm(expansion=2, window=1).select(view)
    assert sets(selection.focus) == [{2, 3}]
    assert sets(selection.active) == [{2, 3}]


def test_ties_go_to_the_lowest_position() -> None:
    view = view_of([[0, 1, 2, 3]], [[0.5] * 8])
    assert sets(FocusDllm(2, 1).select(view).focus) == [{0, 1}]
    view = view_of([[1, 2, 3]], [[0.5, 0.1, 0.5, 0.5, 0.0, 0.0]])
    assert sets(FocusDllm(1, 1).select(view).focus) == [{2}]


@quick
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    length=st.integers(2, 16),
    expansion=st.integers(1, 30),
    block_length=st.integers(1, 20),
)
def test_focus_equals_a_sort(
    data: st.DataObject, batch: int, length: int, expansion: int, block_length: int
) -> None:
    """Ties, finished sequences, expansions and blocks beyond the sequence included."""
    positions = st.lists(st.integers(0, length - 1), unique=True)
    levels = st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=length, max_size=length)
    masked = [data.draw(positions) for _ in range(batch)]
    confidence = [data.draw(levels) for _ in range(batch)]
    changed = [sorted(set(data.draw(positions)) - set(row)) for row in masked]
    starts = [min(row, default=length) // 2 for row in masked]
    view = view_of(masked, confidence, changed=changed, starts=starts, block_length=block_length)
    focus = sets(FocusDllm(expansion, 1).select(view).focus)
    for b, row in enumerate(masked):
        if not row:
            assert focus[b] == set()
            continue
        block = (min(row) - starts[b]) // block_length
        members = [p for p in sorted(row) if (p - starts[b]) // block_length == block]
        order = sorted(members, key=lambda p: (-confidence[b][p], p))
        assert focus[b] == set(order[: expansion * max(1, len(changed[b]))])


def test_a_finished_sequence_has_no_rows_of_its_own() -> None:
    view = view_of([[2, 3], []], [[0.5] * 4, [0.5] * 4])
    for policy in (FocusDllm(4, 3), DualCache(), PrefixCache()):
        selection = policy.select(view)
        assert sets(selection.focus) == [{2, 3}, set()]
        assert sets(selection.active)[1] == set()


def test_everything_finished_selects_nothing() -> None:
    view = view_of([[], []], [[0.5] * 4, [0.5] * 4])
    for policy in (FocusDllm(4, 3), DualCache(), PrefixCache()):
        selection = policy.select(view)
        assert not selection.active.any()
        assert not selection.focus.any()


def test_block_caches_take_blocks() -> None:
    view = view_of([[6, 7, 8]], [[0.5] * 10], starts=[1], block_length=3)
    dual, prefix = DualCache().select(view), PrefixCache().select(view)
    assert sets(dual.active) == [{4, 5, 6}]
    assert sets(prefix.active) == [{4, 5, 6, 7, 8, 9}]
    assert sets(dual.focus) == sets(prefix.focus) == [{6}]


def test_the_last_block_ends_with_the_sequence() -> None:
    view = view_of([[8, 9]], [[0.5] * 10], starts=[0], block_length=4)
    assert sets(DualCache().select(view).active) == [{8, 9}]


def test_values_beyond_the_sequence_mean_everything() -> None:
    view = view_of([[3]], [[0.5] * 8])
    assert sets(FocusDllm(4096, 4096).select(view).active) == [set(range(8))]
    wide = replace(view, block_length=4096)
    assert sets(DualCache().select(wide).active) == [set(range(8))]


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("focus-dllm", FocusDllm),
        ("dual-cache", DualCache),
        ("prefix-cache", PrefixCache),
        ("exact", type(None)),
    ],
)
def test_policies_by_name(policy: str, kind: type) -> None:
    assert isinstance(policy_for(FocusConfig(policy=policy)), kind)
