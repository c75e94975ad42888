"""How many rows a step is padded to, and what lies in place between the parts of a step."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from focus_compile.block_diffusion.programs import KeyChoice, RowList

__all__ = [
    "LADDER",
    "HeldRows",
    "PromptBlock",
    "all_scored",
    "listed_blocks",
    "padded_rows",
    "scored_rows",
]

PromptBlock = tuple[int, int, list[int]]
"""A block of a prompt: its slot, its first position, its tokens."""
LADDER = (*range(8, 65, 8), *range(128, 513, 64), *range(640, 2049, 128))
"""Row counts that a list is padded to; multiples of `COARSE` beyond."""
COARSE = 256


def padded_rows(rows: int) -> int:
    """The smallest rung of the ladder that holds `rows`."""
    if rows > LADDER[-1]:
        return math.ceil(rows / COARSE) * COARSE
    return LADDER[bisect_left(LADDER, rows)]


def scored_rows(undecided: int, rows: int) -> int:
    """Rows of which a step of `rows` computes logits: few sizes, as each is a graph of its own."""
    quarter = math.ceil(rows / 4)
    return min(max(math.ceil(undecided / quarter), 1) * quarter, rows)


def all_scored(rows: int) -> list[int]:
    """What `scored_rows` makes of any number of undecided rows."""
    return sorted({scored_rows(undecided, rows) for undecided in range(rows + 1)})


@dataclass
class HeldRows:
    """Tensors that stay where they are, so that CUDA graphs of any number of rows can hand rows to
    one another: each value is copied to the start of its buffer, which has room for `max_rows`."""

    max_rows: int
    _buffers: list[Tensor] = field(default_factory=list)

    def hold(self, rows: int, values: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous copies of values that are made of `rows` rows each, or of fewer numbers."""
        if not self._buffers:
            scale = math.ceil(self.max_rows / rows)
            self._buffers = [value.new_empty(value.numel() * scale) for value in values]
        held = []
        for buffer, value in zip(self._buffers, values, strict=True):
            held.append(buffer[: value.numel()].view(value.shape))
            held[-1].copy_(value)
        return held


def listed_blocks(
    blocks: Sequence[PromptBlock],
    block_length: int,
    max_length: int,
    key_block: int | None,
    device: torch.device,
) -> RowList:
    """All rows of whole blocks, padded to a power of two of them; a sequence's blocks in order.

    max_length: a place that no cache has; key_block: tokens of a key block where some are chosen.
    """
    length = block_length
    count = 1 << (len(blocks) - 1).bit_length()

    def tensor(values: list[int], fill: int, size: int) -> Tensor:
        return torch.tensor(values + [fill] * (size - len(values)), device=device)

    ids = [token for _, _, tokens in blocks for token in tokens]
    at = [begin + i for _, begin, _ in blocks for i in range(length)]
    rows = count * length
    begins = [begin for _, begin, _ in blocks]
    keys = None
    if key_block is not None:  # all of them: what a prompt computes is final
        candidates = tensor([begin // key_block for begin in begins], 0, count)
        keys = KeyChoice(torch.zeros((1, rows), device=device), candidates, candidates)
    return RowList(
        row_ids=tensor(ids, ids[-1], rows)[None],
        rows=tensor(at, at[-1], rows)[None],
        slots=tensor([slot for slot, _, _ in blocks for _ in range(length)], 0, rows),
        places=tensor(at, max_length, rows),
        owners=tensor([slot for slot, _, _ in blocks], 0, count),
        starts=torch.arange(count + 1, device=device).clamp(max=len(blocks)) * length,
        lengths=tensor([begin + length for begin in begins], 0, count),
        keys=keys,
    )
