"""CUDA graphs, as far as a machine without a GPU shows: what happens where none can be captured."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.fallback import FocusWarning
from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.dispatch import Dispatcher
from focus_compile.runtime.trajectory import Trajectory
from tests.compiled import run_call
from tests.runtime.tiny import OPTIONS, assert_own, decided, prompt, shared, tiny_model

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="captures there")


def test_work_runs_as_it_is_where_graphs_are_off() -> None:
    graphs, calls = DeviceGraphs(False, pytest.fail), []
    assert [graphs.run("key", lambda: calls.append(1) or len(calls)) for _ in range(3)] == [1, 2, 3]
    assert graphs.captured == 0


@without_a_gpu
def test_a_capture_that_fails_is_told_once_and_the_work_is_done() -> None:
    reasons: list[str] = []
    graphs, calls = DeviceGraphs(True, reasons.append), []
    assert [graphs.run("key", lambda: calls.append(1) or len(calls)) for _ in range(4)] == [
        1, 2, 3, 4,
    ]  # fmt: skip
    assert len(reasons) == 1
    assert not graphs.enabled


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trajectories that try to capture graphs whatever the device."""
    allocate = Trajectory.allocate.__func__  # type: ignore[attr-defined]

    def enabled(cls: Any, *given: Any) -> Any:
        next(value for value in given if isinstance(value, DeviceGraphs)).enabled = True
        return allocate(cls, *given)

    monkeypatch.setattr(Trajectory, "allocate", classmethod(enabled))


@without_a_gpu
@pytest.mark.usefixtures("forced")
def test_a_model_decodes_without_graphs_and_says_so() -> None:
    torch.compiler.reset()
    model = tiny_model()
    everything: dict[str, Any] = OPTIONS | {"window": 64, "keep_ratio": 1.0, "block_length": 16}
    focus, ids = shared(model, **everything), prompt()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", FocusWarning)
        for number in range(4):
            with torch.no_grad(), focus_compile.record() as history:
                logits = focus(ids)
            assert history[0].program == ("step" if number else "refresh")
            assert_own(logits, model, ids)
            ids = decided(ids)
    told = [str(warning.message) for warning in seen if warning.category is FocusWarning]
    assert len(told) == 1
    assert "one by one: a step could not be captured" in told[0]


@without_a_gpu
@pytest.mark.usefixtures("forced")
def test_strict_raises_where_no_graph_can_be_captured() -> None:
    torch.compiler.reset()
    focus, ids = shared(tiny_model(), strict=True), prompt()
    run_call(focus, ids)
    run_call(focus, decided(ids))
    with pytest.raises(focus_compile.RefusalError, match="cuda_graphs=False"):
        run_call(focus, decided(ids, 2))


def test_inputs_on_several_devices_are_not_captured() -> None:
    """A graph holds one device's work, and numbers of the CPU as they were."""
    told: list[str] = []

    class Asked:
        config = focus_compile.FocusConfig()
        _no_graphs = staticmethod(told.append)

    def on(*devices: str) -> tuple[Any, ...]:
        return tuple(SimpleNamespace(device=torch.device(name)) for name in devices)

    def captures(ids: str, guarded: tuple[Any, ...], weights: tuple[Any, ...]) -> bool:
        call = SimpleNamespace(ids=on(ids)[0], guarded=guarded, weights=weights)
        return Dispatcher._captures(Asked(), call)  # type: ignore[arg-type]

    assert captures("cuda:1", on("cuda:1"), on("cuda:1", "cuda:1"))
    assert not captures("cpu", (), on("cpu"))
    assert not told
    assert not captures("cuda:0", on("cpu"), on("cuda:0", "cuda:1"))
    assert told == ["the ids are on cuda:0, other inputs or weights on cpu, cuda:1"]
