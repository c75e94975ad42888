"""FOCUS (arXiv 2601.23278): which rows of a block are listed, and which stay past the cut.

Pure functions over one block of every sequence, bool [S, B] (masked: undecided; uncached: K/V not
yet final). A row is *listed* while it is uncached, *ready* once one forward has seen it and its
right neighbour decided, and *evicted* where its importance says that it will not decode now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_compile.kernels.row_selection.op import select_rows, targets

__all__ = ["Rank", "Yield", "keep_rows", "last_true", "ready"]

Rank = Callable[[Tensor, Tensor], Tensor]
"""(importance at the cut, importance before it) -> scores, all float32 [R]."""


def ready(masked: Tensor) -> Tensor:
    """Positions whose K/V of this forward are final: they and their right neighbour were decided
    before it. masked bool [S, B], of the forward's input. The block's last needs no neighbour."""
    decided = ~masked
    neighbour = torch.ones_like(decided)
    neighbour[:, :-1] = decided[:, 1:]
    return decided & neighbour


def last_true(flags: Tensor) -> Tensor:
    """The last True position of each row of [S, B], -1 where there is none, int64 [S]."""
    positions = torch.arange(flags.shape[1], device=flags.device)
    return torch.where(flags, positions, -1).amax(1)


@dataclass(frozen=True)
class Yield:
    """Tokens decoded per step in the current block, over the steps that decoded any.

    total, steps: int64 [S], tensors that are updated in place.
    """

    total: Tensor
    steps: Tensor

    def mean(self) -> Tensor:
        """float64 [S]; 1 before the first step."""
        return torch.where(self.steps > 0, self.total / self.steps.clamp(min=1), 1.0).double()

    def add(self, decoded: Tensor) -> None:
        """decoded int64 [S]: tokens decoded in a step."""
        self.total.add_(decoded)
        self.steps.add_((decoded > 0).long())

    def reset(self, where: Tensor) -> None:
        """Forget, for sequences bool [S] that enter a block."""
        self.total.masked_fill_(where, 0)
        self.steps.masked_fill_(where, 0)


def keep_rows(
    at_cut: Tensor,
    before: Tensor,
    masked: Tensor,
    local: Tensor,
    starts: Tensor,
    mean_yield: Tensor,
    progress: Tensor,
    alpha: float,
    block_length: int,
    rank: Rank = torch.sub,
) -> Tensor:
    """Rows of a list that go on, bool [R].

    The budget is ceil(alpha * mean yield); rows are ranked by the importance at the cut less that
    in the layer before it (FOCUS, dynamic budget and constraints).

    Args:
        at_cut, before: float32 [R] (see `importance`).
        masked: bool [R]; local: int64 [R], positions in the block; starts: [S + 1].
        mean_yield: float64 [S]; progress: int64 [S], the last position ever computed in all layers.
        rank: the scores float32 [R], of at_cut and before.
    """
    counts = _per_sequence(masked, starts)
    target = targets(counts, mean_yield, alpha)
    return select_rows(rank(at_cut, before), masked, local, starts, target, progress, block_length)


def _per_sequence(flags: Tensor, starts: Tensor) -> Tensor:
    """True rows of each sequence of a list, int64 [S]."""
    upto = torch.nn.functional.pad(flags.long().cumsum(0), (1, 0))
    at = upto[starts.long()]
    return at[1:] - at[:-1]
