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
        positions, inside = view.block_positions()
        candidates = view.masked.gather(1, positions) & inside
        decided = view.changed.sum(1).clamp(min=1)
        wanted = torch.minimum(decided * self.expansion, candidates.sum(1))
        scores = view.confidence.gather(1, positions).masked_fill(~candidates, -1.0)
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        chosen = (rank < wanted[:, None]).to(torch.int8)
        focus = torch.zeros_like(view.masked, dtype=torch.int8)
        focus = focus.scatter_reduce_(1, positions, chosen, "amax").bool()
        return Selection(windows_around(focus, self.window), focus)
