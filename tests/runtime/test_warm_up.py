"""A warm-up prepares what decoding runs, and leaves nothing of itself in any answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.errors import OptionError
from focus_compile.runtime import dispatch
from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.warm_up import buckets_within
from tests.compiled import compiled, run_call
from tests.oracle import Oracle
from tests.runtime.tiny import MASK, OPTIONS, assert_own, decided, prompt, shared, tiny_model


def test_buckets_of_every_count() -> None:
    assert buckets_within(5000, None, 32768, "cuda") == (32, 64, 96, 128, 192, 256)
    assert buckets_within(70, None, 32768, "cuda") == (32, 64, 96)
    assert buckets_within(9, None, 12, "cpu") == (8, 12)
    assert buckets_within(9, (4, 10), 12, "cpu") == (4, 10)


class AsItIs(DeviceGraphs):
    """Captures nothing, but counts as enabled."""

    def run(self, key: Any, work: Any) -> Any:
        return work()


@pytest.mark.parametrize("logits", ["all", "response"])
@pytest.mark.parametrize("all_buckets", [False, True])
def test_decoding_after_a_warm_up_follows_the_oracle(
    monkeypatch: pytest.MonkeyPatch, logits: str, all_buckets: bool
) -> None:
    """With the buckets of a GPU too, whose graphs run as they are here."""
    if all_buckets:
        monkeypatch.setattr(
            dispatch, "DeviceGraphs", lambda _, failed, device: AsItIs(True, failed, device)
        )
    model = tiny_model()
    focus = compiled(model, **OPTIONS, logits=logits)
    for seed in range(2):
        (done,) = focus_compile.warmup(focus, prompt(masks=6, seed=9 + seed))
        assert done.buckets == ((8, 12) if all_buckets and logits == "all" else (8,))
        assert done.graphs == 0
        oracle, ids = Oracle(model, **OPTIONS, logits=logits), prompt(masks=6, seed=seed)
        for _ in range(6):
            expected = oracle.call(ids)
            found, record = run_call(focus, ids)
            assert record.program == expected.program
            first = oracle.rows_returned(record.program)
            assert not found[:, :first].any()
            torch.testing.assert_close(
                found[:, first:], expected.logits[:, first:], rtol=1e-4, atol=1e-4
            )
            ids = decided(ids)


def test_the_call_after_it_starts_anew_even_with_the_same_ids() -> None:
    model, ids = tiny_model(), prompt()
    focus = shared(model)
    run_call(focus, ids)
    focus_compile.warmup(focus, ids)
    logits, record = run_call(focus, ids)
    assert record.program == "refresh"
    assert record.why.startswith("new trajectory: ids changed")
    assert_own(logits, model, ids)


def test_nothing_is_compiled_after_it() -> None:
    focus, ids = compiled(tiny_model(), **OPTIONS), prompt()
    (done,) = focus_compile.warmup(focus, ids)
    assert done.compile_seconds >= 0
    with focus_compile.record() as history, torch.no_grad():
        for _ in range(4):
            focus(ids)
            ids = decided(ids)
    assert [record.compile_seconds for record in history] == [0] * 4


def test_a_call_that_runs_exactly_prepares_nothing() -> None:
    full = prompt(masks=1)
    full[full == MASK] = 1
    with pytest.raises(OptionError, match="warmup: nothing was prepared: no mask token"):
        focus_compile.warmup(shared(tiny_model()), full)
    with pytest.raises(OptionError, match="not compiled by focus_compile"):
        focus_compile.warmup(tiny_model(), prompt())
