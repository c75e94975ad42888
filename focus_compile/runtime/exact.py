"""A graph that always runs exactly: refused, asked for, or with gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.runtime.inspection import Source, active_inspector
from focus_compile.runtime.record import StepRecord, is_watched, note

__all__ = ["ExactOnly", "tokens_of"]


class ExactOnly:
    """Calls `run` and records why nothing smarter could be done."""

    def __init__(
        self,
        run: Callable[..., Any],
        why: str,
        config: FocusConfig,
        inputs: Sequence[str | None] = (),
    ) -> None:
        """inputs: what the caller calls each of them, None for a weight."""
        self.run, self.why, self.config, self.inputs = run, why, config, inputs

    def __call__(self, *args: Any) -> Any:
        inspector = active_inspector()
        if inspector is None and not is_watched():
            return self.run(*args)
        ids = tokens_of(args)
        started = time.perf_counter()
        if inspector is not None and ids is not None:
            inspector.begin(ids)
        outputs = self.run(*args)
        elapsed = (time.perf_counter() - started) * 1e3
        rows = 0 if ids is None else ids.numel()
        record = StepRecord("exact", self.why, rows, milliseconds=elapsed)
        note(record)
        if inspector is not None and ids is not None:
            named = {
                name: value
                for name, value in zip(self.inputs, args, strict=False)
                if name is not None and isinstance(value, Tensor)
            }
            name = next((n for n, value in named.items() if value is ids), "")
            source = Source(self.config, None, self.why)
            inspector.finish(record, source, name, named, _logits(outputs, ids))
        return outputs


def tokens_of(args: Sequence[Any]) -> Tensor | None:
    """The tokens of the call: its first integer matrix."""
    for value in args:
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            return value
    return None


def _logits(outputs: Any, ids: Tensor) -> list[Tensor] | None:
    """The first output that has a vector for each token."""
    for value in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == ids.shape:
            return [value]
    return None
