"""A graph that always runs exactly: refused, asked for, or with gradients."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from focus_compile.runtime.record import StepRecord, active_history

__all__ = ["ExactOnly"]


class ExactOnly:
    """Calls `run` and records why nothing smarter could be done."""

    def __init__(self, run: Callable[..., Any], why: str) -> None:
        self.run, self.why = run, why

    def __call__(self, *args: Any) -> Any:
        history = active_history()
        if history is None:
            return self.run(*args)
        started = time.perf_counter()
        outputs = self.run(*args)
        elapsed = (time.perf_counter() - started) * 1e3
        history.append(StepRecord("exact", self.why, _rows(args), milliseconds=elapsed))
        return outputs


def _rows(args: tuple[Any, ...]) -> int:
    """Tokens in the call: the elements of its first integer matrix."""
    for value in args:
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            return value.numel()
    return 0
