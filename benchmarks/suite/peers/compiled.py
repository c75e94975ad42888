"""focus_compile's own arms: the compiled model, called like the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import focus_compile
from benchmarks.suite.loop import Canvas, Ran
from focus_compile.runtime.store import STORE

__all__ = ["Compiled"]


class Compiled:
    """(d) `policy="dual-cache"` or (g) `policy="focus-dllm"`.

    options: of `focus_compile.compile`. `history` collects the records of all calls.
    """

    def __init__(self, model: nn.Module, letter: str, **options: Any):
        self.letter = letter
        self.options = options
        self.model: Any = focus_compile.compile(model, **options)
        self.history: list[focus_compile.StepRecord] = []
        self.ran = Ran("exact", 0, 0)
        self._handed_out = torch.empty(0)

    def begin(self, canvas: Canvas) -> None:
        """The ids differ from the last canvas's, which begins a trajectory."""
        self._handed_out = torch.empty(0)

    def __call__(self, canvas: Canvas, block: slice) -> Tensor:
        self._handed_out = torch.empty(0)
        with torch.no_grad(), focus_compile.record() as history:
            logits = self.model(canvas.ids).logits[0, block]
        if len(history) != 1:
            raise RuntimeError(f"one model call made {len(history)} records: the graph was broken")
        last = history[0]
        self.history.append(last)
        if last.program == "exact":
            raise RuntimeError(f"a call ran the exact program: {last.why}")
        self.ran = Ran(
            last.program,
            last.rows,
            last.bucket or last.rows,
            last.compile_seconds,
            all_keys="sparse-suffix" not in last.keys,
        )
        self._handed_out = logits
        return logits

    def poison(self) -> None:
        self._handed_out.fill_(float("nan"))
        self._handed_out = torch.empty(0)

    def release(self) -> None:
        """Free the trajectory. What was compiled stays with Dynamo until it is reset."""
        self._handed_out = torch.empty(0)
        STORE.clear()
