"""Threads: one trajectory per model, in the thread that began it; everyone else is answered."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.fallback import FocusWarning
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.store import STORE
from tests.compiled import run_call
from tests.oracle import Oracle
from tests.runtime.tiny import OPTIONS, assert_own, decided, prompt, shared, tiny_model


@pytest.fixture
def other_thread() -> Iterator[Callable[..., Any]]:
    """`other_thread(f, *args)`: f's result, computed in a second thread that stays alive."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda f, *args: pool.submit(f, *args).result(timeout=120)


def test_a_second_thread_gets_exact_answers(other_thread: Callable[..., Any]) -> None:
    model = tiny_model()
    focus, ids = shared(model), prompt()
    run_call(focus, ids)
    ids = decided(ids)
    logits, record = other_thread(run_call, focus, ids)
    assert (record.program, record.why) == (
        "exact", "another thread owns the model's trajectory"
    )  # fmt: skip
    assert_own(logits, model, ids)
    assert run_call(focus, ids)[1].program == "step", "the owner goes on undisturbed"


@torch.no_grad()
def test_the_second_thread_is_told_once(other_thread: Callable[..., Any]) -> None:
    focus: Any = shared(tiny_model())
    focus(prompt())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            other_thread(torch.no_grad()(lambda: focus(prompt())))
    mine = [warning for warning in seen if warning.category is FocusWarning]
    assert len(mine) == 1
    assert "another thread owns the model's trajectory" in str(mine[0].message)


def test_strict_tells_the_second_thread_by_an_error(other_thread: Callable[..., Any]) -> None:
    focus = shared(tiny_model(), strict=True)
    run_call(focus, prompt())
    with pytest.raises(focus_compile.RefusalError, match="another thread owns"):
        other_thread(run_call, focus, prompt())
    assert run_call(focus, decided(prompt()))[1].program == "step"


def test_a_dead_owner_leaves_the_trajectory_to_the_next(other_thread: Callable[..., Any]) -> None:
    focus, records = shared(tiny_model()), []
    thread = threading.Thread(target=lambda: records.append(run_call(focus, prompt())[1]))
    thread.start()
    thread.join()
    assert records[0].program == "refresh"
    assert run_call(focus, decided(prompt()))[1].program == "step"
    assert run_call(focus, prompt(seed=1))[1].program == "refresh"
    assert other_thread(run_call, focus, prompt(seed=1))[1].program == "exact"


def test_a_call_during_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread arrives while the first is inside its step."""
    model = tiny_model()
    focus, ids = shared(model), prompt()
    run_call(focus, ids)
    inside, go_on, records = threading.Event(), threading.Event(), []
    run_step = Programs.run_step

    def slow(*args: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return run_step(*args)

    monkeypatch.setattr(Programs, "run_step", slow)
    owner = threading.Thread(target=lambda: records.append(run_call(focus, decided(ids))[1]))
    STORE.slot(model.embedding.weight).trajectory.thread = lambda: None
    owner.start()
    assert inside.wait(60)
    logits, record = run_call(focus, ids)
    go_on.set()
    owner.join()
    assert (record.program, record.why) == (
        "exact", "another thread is using the model's trajectory"
    )  # fmt: skip
    assert_own(logits, model, ids)
    assert records[0].program == "step"


def in_two_threads(work: Callable[[int], None]) -> None:
    """Run work(0) and work(1) at once; an exception of either is raised here."""
    start = threading.Barrier(2)

    def begin(at: int) -> None:
        start.wait()
        work(at)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(begin, at) for at in range(2)]:
            future.result(timeout=400)


def two_of_a_class(**options: Any) -> tuple[list[Any], list[Any]]:
    torch.compiler.reset()
    models = [tiny_model(seed) for seed in range(2)]
    return models, [shared(model, **options) for model in models]


def test_two_models_in_two_threads_follow_their_oracles() -> None:
    """They share one graph and no state."""
    models, focus = two_of_a_class()
    run_call(focus[0], prompt())
    calls, expected = [[prompt(masks=8, seed=at)] for at in range(2)], [[], []]
    for at, model in enumerate(models):  # here, since the oracle replaces functions of torch
        oracle = Oracle(model, **OPTIONS)
        for _ in range(8):
            expected[at].append(oracle.call(calls[at][-1]))
            calls[at].append(decided(calls[at][-1]))

    def decode(at: int) -> None:
        STORE.slot(models[at].embedding.weight).trajectory = None
        for ids, result in zip(calls[at], expected[at], strict=False):
            logits, record = run_call(focus[at], ids)
            assert record.program == result.program, record.why
            assert (logits - result.logits).abs().max() < 1e-4

    for _ in range(3):
        in_two_threads(decode)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_first_calls_at_once(lowering: str) -> None:
    """Whoever compiles, and however often: every answer is right."""
    everything = {"window": 4096, "keep_ratio": 1.0, "block_length": 64}
    models, focus = two_of_a_class(**everything, lowering=lowering)

    def decode(at: int) -> None:
        ids = prompt(masks=8, seed=at)
        for _ in range(8):
            logits, record = run_call(focus[at], ids)
            assert record.program in ("refresh", "step"), record.why
            assert_own(logits, models[at], ids)
            ids = decided(ids)

    in_two_threads(decode)
