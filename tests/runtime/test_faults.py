"""Whatever fails inside a call, the next one starts from a refresh: nothing torn survives."""

from __future__ import annotations

import inspect
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.exc import InductorError

import focus_compile
from focus_compile.errors import RefusalError
from focus_compile.fallback import FocusWarning, forget
from focus_compile.lowering import program as lowering
from focus_compile.lowering.program import Program
from focus_compile.runtime import dispatch
from focus_compile.runtime.latest_rows import LatestRows
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.store import STORE
from tests import versions
from tests.compiled import run_call
from tests.runtime.tiny import assert_own, decided, prompt, shared, tiny_model


class FailsOnce:
    """Stands in for a method: runs it, then raises at the n-th call."""

    def __init__(self, method: Any, error: BaseException, at: int = 1) -> None:
        self.method, self.error, self.left = method, error, at

    def __get__(self, instance: Any, owner: Any) -> Any:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        self.left -= 1
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("owner", "method"), [(Programs, "run_step"), (Program, "__call__"), (LatestRows, "write")]
)
def test_a_step_that_fails(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, owner: Any, method: str
) -> None:
    model = tiny_model()
    focus, ids = shared(model), prompt()
    run_call(focus, ids)
    ids = decided(ids)
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, FailsOnce(getattr(owner, method), error))
        with pytest.raises(type(error)):
            run_call(focus, ids)
        assert STORE.nbytes == 0
    logits, record = run_call(focus, ids)
    assert (record.program, record.why) == ("refresh", "new trajectory: first call")
    assert_own(logits, model, ids)
    assert run_call(focus, decided(ids))[1].program == "step"


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
@pytest.mark.parametrize("first", [True, False])
def test_a_refresh_that_fails(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, first: bool
) -> None:
    model = tiny_model()
    focus, ids = shared(model), prompt(masks=6)
    if not first:
        run_call(focus, ids)
        ids = decided(ids, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "__call__", FailsOnce(Program.__call__, error))
        with pytest.raises(type(error)):
            run_call(focus, ids)
        assert STORE.nbytes == 0
    logits, record = run_call(focus, ids)
    assert (record.program, record.why) == ("refresh", "new trajectory: first call")
    assert_own(logits, model, ids)


def test_an_interrupted_first_run_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    focus = shared(tiny_model())
    with monkeypatch.context() as patch:
        interrupted = FailsOnce(dispatch.check_plan, KeyboardInterrupt())
        patch.setattr(dispatch, "check_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_call(focus, prompt())
    counted = FailsOnce(dispatch.check_plan, RuntimeError("unused"), at=100)
    monkeypatch.setattr(dispatch, "check_plan", counted)
    run_call(focus, prompt())
    assert counted.left == 99


def test_out_of_memory_keeps_torchs_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for K/V: the old state is given back first, and the error says what was asked."""
    model = tiny_model()
    focus, ids = shared(model), prompt()
    run_call(focus, ids)

    def allocate(programs: Programs, args: Any) -> Any:
        assert STORE.nbytes == 0
        return torch.empty(2**60, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "allocate", allocate)
        with pytest.raises(RuntimeError, match=r"allocate memory|out of memory"):
            run_call(focus, prompt(seed=1, length=16))
    assert STORE.nbytes == 0
    logits, record = run_call(focus, ids)
    assert record.program == "refresh"
    assert_own(logits, model, ids)


def test_an_error_of_the_exact_program_leaves_the_trajectory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    focus, ids = shared(tiny_model()), prompt()
    run_call(focus, ids)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "__call__", FailsOnce(Program.__call__, RuntimeError("injected")))
        with pytest.raises(RuntimeError, match="injected"):
            run_call(focus, decided(ids, 4))
    with focus_compile.record() as history, torch.no_grad():
        focus(decided(ids))
    assert history[0].program == "step"


def out_of_memory(name: str) -> Any:
    """A stand-in for `Program.__call__` in which one program has no memory."""
    call = Program.__call__

    def failing(program: Program, *args: Any) -> Any:
        outputs = call(program, *args)
        if program.name == name:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return outputs

    return failing


@contextmanager
def lines() -> Iterator[list[str]]:
    """What is said inside, with nothing said before."""
    forget()
    said: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in seen if w.category is FocusWarning]


@torch.no_grad()
@torch._dynamo.config.patch(specialize_float=True)
@pytest.mark.parametrize("name", ["refresh", "step"])
def test_out_of_memory_is_answered_exactly(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From then on no call of that size or larger tries again; smaller ones do."""
    torch.compiler.reset()
    model = tiny_model()
    focus, ids = shared(model, dynamic=True), prompt()
    with (
        monkeypatch.context() as patch,
        lines() as said,
        focus_compile.record() as history,
    ):
        patch.setattr(Program, "__call__", out_of_memory(name))
        for _ in range(3):
            assert_own(focus(ids), model, ids)
            ids = decided(ids)
        assert STORE.nbytes == 0
    assert [entry.program for entry in history][-2:] == ["exact"] * 2
    assert ["ran out of memory with 12 tokens" in line for line in said] == [True]
    assert run_call(focus, prompt(length=16))[1].program == "exact"
    small = prompt(length=8)
    assert run_call(focus, small)[1].program == "refresh"
    assert run_call(focus, decided(small))[1].program == "step"
    torch.compiler.reset()
    assert run_call(focus, prompt())[1].program == "refresh"


@torch.no_grad()
def test_strict_says_so_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    focus = shared(tiny_model(), strict=True)
    monkeypatch.setattr(Program, "__call__", out_of_memory("refresh"))
    for _ in range(2):
        with pytest.raises(RefusalError, match=r"ran out of memory .*strict=True"):
            focus(prompt())
        assert STORE.nbytes == 0
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", ["refresh", "step"])
def test_a_program_that_inductor_cannot_compile(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The exact program serves all calls, and the reason is said once."""
    torch.compiler.reset()
    model, ids = tiny_model(), prompt()
    compile_program = Program._compile_with_inductor

    def failing(program: Program, sizes: Any, args: Any) -> Any:
        if program.name == name:
            raise AssertionError("no such kernel\nand more lines")
        return lowering._Artifact(program.graph, None, lowering.ShapeEnv())

    monkeypatch.setattr(Program, "_compile_with_inductor", failing)
    focus = shared(model, lowering="inductor")
    with lines() as said, focus_compile.record() as history:
        for _ in range(3):
            assert_own(focus(ids), model, ids)
            ids = decided(ids)
        assert STORE.nbytes == 0
    assert [entry.program for entry in history] == ["exact"] * 3
    (line,) = said
    assert f"Inductor failed on the {name} program (AssertionError: no such kernel). " in line
    assert history[-1].why in line
    strict = shared(tiny_model(), lowering="inductor", strict=True)
    with pytest.raises(RefusalError, match=f"Inductor failed on the {name} program"):
        strict(prompt())
    assert compile_program is not Program._compile_with_inductor
    torch.compiler.reset()


@torch.no_grad()
@torch._dynamo.config.patch(specialize_float=True)
def test_memory_that_runs_out_while_compiling_says_nothing_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shorter call may have room. Inductor wraps what it meets in an error of its own."""
    torch.compiler.reset()

    def failing(program: Program, sizes: Any, args: Any) -> Any:
        artifact = lowering._Artifact(program.graph, None, lowering.ShapeEnv())
        if program.name == "refresh" and 12 in sizes:
            raise InductorError(torch.OutOfMemoryError("injected"), inspect.currentframe())
        return artifact

    monkeypatch.setattr(Program, "_compile_with_inductor", failing)
    focus = shared(tiny_model(), lowering="inductor", dynamic=True)
    with lines() as said, focus_compile.record() as history:
        focus(prompt())
    assert [entry.program for entry in history] == ["exact"]
    assert ["ran out of memory with 12 tokens" in line for line in said] == [True]
    assert run_call(focus, prompt(length=8))[1].program == "refresh"
    torch.compiler.reset()


def test_an_exact_program_that_inductor_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to fall back to: the compiler's own error."""

    def failing(program: Program, sizes: Any, args: Any) -> Any:
        raise AssertionError("no such kernel")

    torch.compiler.reset()
    monkeypatch.setattr(Program, "_compile_with_inductor", failing)
    focus = shared(tiny_model(), lowering="inductor")
    with pytest.raises(AssertionError, match="no such kernel"):
        run_call(focus, prompt(masks=0))
    torch.compiler.reset()


# What a caller does to the model between two calls


def half(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def other_weights(model: nn.Module) -> None:
    model.load_state_dict(tiny_model(1).state_dict())


def assigned_weights(model: nn.Module) -> None:
    model.load_state_dict(tiny_model(1).state_dict(), assign=True)


def trained(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def reset(model: nn.Module) -> None:
    torch.compiler.reset()


CHANGES = [
    pytest.param(half, marks=versions.recast_weights),
    other_weights,
    assigned_weights,
    trained,
    reset,
]


@pytest.mark.parametrize(
    "change",
    [pytest.param(half, marks=versions.recast_weights), *CHANGES],
    ids=lambda c: c.__name__,
)
def test_a_model_that_changes_amid_a_response(change: Any) -> None:
    """The next call is the changed model's own answer, and steps go on from it."""
    model = tiny_model()
    focus, ids = shared(model), prompt(masks=6)
    for _ in range(2):
        run_call(focus, ids)
        ids = decided(ids)
    change(model)
    logits, record = run_call(focus, ids)
    assert record.program == "refresh"
    with torch.no_grad():
        own = model(ids)
    assert logits.dtype == own.dtype
    torch.testing.assert_close(logits.float(), own.float(), rtol=3e-2, atol=3e-2)
    assert run_call(focus, decided(ids, 1))[1].program in ("step", "refresh")


def test_a_forked_child_goes_on_by_itself() -> None:
    """Parent and child decode different tokens from the same trajectory."""
    model = tiny_model()
    focus, ids = shared(model, window=4096, keep_ratio=1.0, block_length=64), prompt()
    run_call(focus, ids)
    run_call(focus, decided(ids))
    ours, theirs = decided(ids, 2), decided(ids)
    theirs[0, -1] = 2
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads may hold locks
        child = os.fork()
    if child == 0:
        try:
            logits, record = run_call(focus, theirs)
            os.write(write, pickle.dumps((logits.numpy(), record.program)))
        finally:
            os._exit(0)
    os.close(write)
    logits, record = run_call(focus, ours)
    assert record.program == "step"
    assert_own(logits, model, ours)
    with os.fdopen(read, "rb") as answer:
        found, program = pickle.loads(answer.read())
    os.waitpid(child, 0)
    assert program == "step"
    assert_own(torch.from_numpy(found), model, theirs)
