"""`record()`: one StepRecord per call, for whoever asked."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.fallback import FocusWarning
from tests.runtime.tiny import MASK, decided, prompt, shared, tiny_model


@torch.no_grad()
def test_a_decode_in_records() -> None:
    focus: Any = shared(tiny_model(), strict=True)
    ids = prompt(masks=6)
    with focus_compile.record() as history:
        for _ in range(7):
            focus(ids)
            ids = decided(ids)
    assert [entry.program for entry in history] == (
        ["refresh", "step", "step", "step", "refresh", "step", "exact"]
    )
    assert [entry.why for entry in history][::2] == (
        ["new trajectory: first call", "continues the trajectory", "block entry",
         "no mask token in the input"]
    )  # fmt: skip
    assert all(entry.rows == 12 for entry in history if entry.program != "step")
    for entry in history:
        assert entry.milliseconds > 0
        assert entry.compile_seconds >= 0
        assert (entry.bucket is not None) == (entry.program == "step")
        if entry.program == "step":
            assert 1 <= entry.rows <= entry.bucket
            assert entry.keys == {"sink-capture": 12, "sparse-suffix": 12 - 3 * 2 + 2 * 2 - 1 + 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        history[0].rows = 3


@torch.no_grad()
def test_recall_is_the_share_of_decided_positions_that_were_predicted() -> None:
    focus: Any = shared(tiny_model(), policy="dual-cache")
    ids = prompt(masks=8)
    with focus_compile.record() as history:
        focus(ids)
        ids[0, 5] = 1
        focus(ids)
        ids[0, 4], ids[0, 9] = 1, 1
        focus(ids)
        focus(ids)
    assert [entry.recall for entry in history] == [None, None, 0.5, None]


@torch.no_grad()
def test_records_nest_and_end() -> None:
    focus: Any = shared(tiny_model())
    with focus_compile.record() as outer:
        focus(prompt())
        with focus_compile.record() as inner:
            focus(prompt())
        focus(prompt())
    focus(prompt())
    assert (len(outer), len(inner)) == (2, 1)


@torch.no_grad()
def test_another_thread_records_for_itself() -> None:
    focus: Any = shared(tiny_model())
    with focus_compile.record() as history:
        thread = threading.Thread(target=torch.no_grad()(lambda: focus(prompt())))
        thread.start()
        thread.join()
    assert history == []


def test_refused_graphs_are_recorded_too() -> None:
    focus: Any = shared(tiny_model(), mask_token_id=None)
    with torch.no_grad(), focus_compile.record() as history:
        with pytest.warns(FocusWarning, match="no mask_token_id"):
            focus(prompt())
        focus(prompt().where(prompt() != MASK, 1))
    assert [entry.program for entry in history] == ["exact", "exact"]
    assert history[0].rows == 12
    assert "no mask_token_id" in history[0].why
