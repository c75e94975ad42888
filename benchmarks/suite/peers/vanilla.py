"""Every row at every call: the model as it is, and compiled by Inductor."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.eurobert import modeling_eurobert

from benchmarks.suite.loop import Canvas, Ran
from focus_compile.kernels.attention.kernel import fastest_sdpa

__all__ = ["VanillaEager", "VanillaInductor"]


class VanillaEager:
    """(a) `model(ids).logits` in eager PyTorch, logits of all positions."""

    letter = "a"

    def __init__(self, model: nn.Module):
        self.model = model
        self.ran = Ran("vanilla", 0, 0)

    def begin(self, canvas: Canvas) -> None:
        self.ran = Ran("vanilla", canvas.length, canvas.length)

    def __call__(self, canvas: Canvas, block: slice) -> Tensor:
        with torch.no_grad():
            return self.model(canvas.ids).logits[0, block]

    def poison(self) -> None:
        """Nothing is kept."""

    def release(self) -> None:
        """Nothing is kept."""


class VanillaInductor(VanillaEager):
    """(b) The same compiled, with cuDNN's attention and the head on the block's rows only."""

    letter = "b"

    def __init__(self, model: nn.Module, backend: str = "inductor", dynamic: bool | None = False):
        super().__init__(model)

        def block_logits(ids: Tensor, rows: Tensor) -> Tensor:
            hidden = model.model(ids).last_hidden_state  # type: ignore[operator]
            return model.lm_head(hidden[0].index_select(0, rows))  # type: ignore[operator]

        self.compiled: Any = torch.compile(block_logits, backend=backend, dynamic=dynamic)

    def __call__(self, canvas: Canvas, block: slice) -> Tensor:
        rows = torch.arange(block.start, block.stop, device=canvas.ids.device)
        with torch.no_grad(), fastest_sdpa(canvas.ids.device), _no_mask():
            return self.compiled(canvas.ids, rows)


def _no_mask() -> contextlib.AbstractContextManager[Any]:
    """No mask where none was given, as in eager: traced, some versions of transformers make one of
    ones, length x length, which no fast attention takes."""
    return mock.patch.object(modeling_eurobert, "create_bidirectional_mask", _none)


def _none(**_: Any) -> None:
    """One function for all calls: torch.compile knows it again."""
