"""What a policy decides: when to refresh, and which rows a step computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Policy", "Selection", "StepView", "windows_around"]


@dataclass(frozen=True)
class StepView:
    """What a policy may look at, all on the device; masks are bool [batch, length].

    masked: still undecided; changed: decided since the last call; confidence fp32
    [batch, length]; block int64 [batch]: the current block's index, -1 if finished; block_start
    int64 [batch]: its first position.
    """

    masked: Tensor
    changed: Tensor
    confidence: Tensor
    block: Tensor
    block_start: Tensor
    block_length: int

    def in_current_block(self) -> Tensor:
        """Positions of each unfinished sequence's current block, bool [batch, length]."""
        return self._from_block_start() & (self._positions() < self._block_end())

    def from_current_block(self) -> Tensor:
        """Positions at or after the current block's start, bool [batch, length]."""
        return self._from_block_start()

    def block_positions(self) -> tuple[Tensor, Tensor]:
        """Positions of the current block, int64 [batch, width], and which of them are real.

        width is block_length, or the sequence's length if that is less. Where a block reaches
        past the end, or a sequence is finished, positions are clipped and not real.
        """
        length = self.masked.shape[1]
        offsets = torch.arange(min(self.block_length, length), device=self.masked.device)
        positions = self.block_start[:, None] + offsets
        real = (positions >= 0) & (positions < length) & (self.block >= 0)[:, None]
        return positions.clamp(0, length - 1), real

    def _positions(self) -> Tensor:
        return torch.arange(self.masked.shape[1], device=self.masked.device)

    def _block_end(self) -> Tensor:
        return (self.block_start + self.block_length)[:, None]

    def _from_block_start(self) -> Tensor:
        started = self._positions() >= self.block_start[:, None]
        return started & (self.block >= 0)[:, None]


@dataclass(frozen=True)
class Selection:
    """Rows of a step, bool [batch, length]: those recomputed, and those that choose the keys.

    `focus` is also what recall is measured against: the positions predicted to be decided.
    """

    active: Tensor
    focus: Tensor


class Policy(Protocol):
    """Pure functions from a view of the trajectory to masks; no state of its own."""

    def select(self, view: StepView) -> Selection:
        """The rows of this step. The runtime adds changed rows and never leaves a sequence out."""
        ...


def windows_around(centres: Tensor, width: int) -> Tensor:
    """Union of windows of total `width` around the True positions of a bool [batch, length].

    A window spans [i - (width - 1) // 2, i + width // 2], clipped to the sequence.
    """
    length = centres.shape[1]
    before, after = min((width - 1) // 2, length), min(width // 2, length)
    counts = torch.nn.functional.pad(centres.to(torch.int32).cumsum(1, dtype=torch.int32), (1, 0))
    positions = torch.arange(length, device=centres.device)
    upto = (positions + before + 1).clamp(max=length)
    since = (positions - after).clamp(min=0)
    return counts[:, upto] > counts[:, since]
