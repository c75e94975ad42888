"""Focus-dLLM (arXiv 2602.02159): rows by past confidence, in windows; sparse keys in the suffix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from focus_compile.policies.base import Selection, StepView, windows_around

__all__ = ["FocusDllm"]


@dataclass(frozen=True)
class FocusDllm:
    """Focus rows: the `expansion` x n most confident masks of the current block, where n is the
    number of tokens that the previous call's logits decided (at least 1). Active rows: windows of
    `window` tokens around them.
    """

    expansion: int
    window: int

    def select(self, view: StepView) -> Selection:
        candidates = view.masked & view.in_current_block()
        decided = view.changed.sum(1).clamp(min=1)
        wanted = torch.minimum(decided * self.expansion, candidates.sum(1))
        scores = view.confidence.masked_fill(~candidates, -1.0)
        most = int(wanted.max())
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = torch.arange(most, device=order.device) < wanted[:, None]
        focus = torch.zeros_like(candidates).scatter(1, order, chosen)
        return Selection(windows_around(focus, self.window), focus)
