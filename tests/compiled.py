"""Running compiled models in tests: op by op unless asked otherwise, and seen from inside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import focus_compile
from focus_compile.fallback import FocusWarning
from focus_compile.runtime.programs import Programs
from tests.models.network import logits_of

__all__ = ["SeenStep", "compiled", "run_call", "seen_steps", "shared_graphs"]


def compiled(model: nn.Module, **options: Any) -> Any:
    """The focus-compiled model in a clean Dynamo; options default to the eager lowering, and to
    sparse keys whatever they cost."""
    torch._dynamo.reset()
    dynamic = options.pop("dynamic", False)
    defaults = {"lowering": "eager", "dense_if_faster": False}
    return focus_compile.compile(model, **(defaults | options), dynamic=dynamic)


@contextmanager
def shared_graphs(recompile_limit: int) -> Iterator[None]:
    """One thread, as tensors of tests only wait for a second one, and graphs that all tests inside
    share, not verified anew."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    with (
        torch._dynamo.config.patch(recompile_limit=recompile_limit),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("FOCUS_COMPILE_VERIFY", "0")
        yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


def run_call(model: Any, ids: Tensor, **inputs: Any) -> tuple[Tensor, focus_compile.StepRecord]:
    """(logits [B, T, V], the call's record), without gradients."""
    with torch.no_grad(), focus_compile.record() as history, warnings.catch_warnings():
        warnings.simplefilter("ignore", FocusWarning)
        logits = logits_of(model(ids, **inputs))
    return logits, history[-1]


@dataclass
class SeenStep:
    """What one step really computed. rows, focus: bool [B, T]; the rest per sequence."""

    rows: Tensor
    focus: Tensor
    sinks: list[set[int]]
    keys: list[list[list[int]]]
    """keys[site][sequence]: ascending key positions."""


@contextmanager
def seen_steps() -> Iterator[list[SeenStep]]:
    """Every step program that runs inside is interpreted node by node and written down."""
    seen: list[SeenStep] = []
    original = Programs.run_step

    def run_step(
        self: Programs,
        args: Any,
        active: Any,
        candidates: Any,
        keep: Any,
        state: Any,
        again: bool = False,
    ):
        program = self.again if again and self.again is not None else self.step
        watcher = _Watcher(program.graph)
        given = (active.rows, active.row_weight, active.focus_weight, candidates, keep)
        result = watcher.run(*args, *given, *state)
        ids = args[self.plan.ids.position]
        seen.append(_describe(self, watcher, ids, active, candidates))
        return result

    Programs.run_step = run_step  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Programs.run_step = original  # type: ignore[method-assign]


class _Watcher(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.blocks: list[Tensor] = []
        self.sinks: Tensor | None = None

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.focus_compile.sparse_attention.default:
            self.blocks.append(args[3])
            self.sinks = args[4]
        return super().call_function(target, args, kwargs)


def _describe(
    programs: Programs, watcher: _Watcher, ids: Tensor, active: Any, candidates: Tensor
) -> SeenStep:
    batch, length = ids.shape
    rows = torch.zeros(ids.shape, dtype=torch.bool).scatter(1, active.rows, True)
    focus = torch.zeros(ids.shape)
    focus.scatter_reduce_(1, active.rows, active.focus_weight, "amax")
    sinks = [set() for _ in range(batch)]
    if watcher.sinks is not None:
        sinks = [{int(s) for s in row if s >= 0} for row in watcher.sinks]
    blocks = iter(watcher.blocks)
    size = programs.plan.key_block
    keys = []
    for site in programs.plan.sites:
        if site.region != "sparse-suffix":
            keys.append([list(range(length)) for _ in range(batch)])
            continue
        chosen = next(blocks)
        keys.append(
            [
                sorted(
                    {
                        p
                        for j in chosen[b]
                        if j >= 0
                        for p in range(int(j) * size, int(j + 1) * size)
                    }
                    | sinks[b]
                    | set(range(int(candidates[b]) * size, length))
                )
                for b in range(batch)
            ]
        )
    return SeenStep(rows, focus > 0, sinks, keys)
