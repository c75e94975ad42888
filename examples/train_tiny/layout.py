"""Where the tokens of a training sequence stand, and which of them each may read.

A diffusion model is trained on clean and noisy copies side by side: [noisy copy 1 .. noisy copy K,
clean copy]. A noisy block reads itself and the clean blocks before it, which is exactly what it
reads while it is decoded; the clean copy reads block-causally, as the finished blocks do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """The sequence that one example of `length` tokens becomes."""

    length: int
    """Tokens of the clean copy."""
    block: int
    """Tokens per decode block; divides `length`."""
    noisy: int = 0
    """The last this many tokens of the example are in each noisy copy; a multiple of `block`."""
    copies: int = 0
    """Noisy copies K. 0: the clean copy alone."""

    @property
    def noisy_rows(self) -> int:
        """Tokens of all noisy copies."""
        return self.noisy * self.copies

    @property
    def rows(self) -> int:
        """Tokens of the whole sequence."""
        return self.noisy_rows + self.length

    def positions(self) -> Tensor:
        """[rows] int64: each token's position in the example."""
        clean = torch.arange(self.length)
        return torch.cat([clean[self.length - self.noisy :].repeat(self.copies), clean])

    def mask(self) -> Tensor:
        """[1, 1, rows, rows] bool: what the token of each row reads."""
        block = self.positions() // self.block
        copy = torch.zeros(self.rows, dtype=torch.int64)
        copy[: self.noisy_rows] = 1 + torch.arange(self.noisy_rows) // max(self.noisy, 1)
        clean = copy == 0
        same_copy = copy[:, None] == copy[None, :]
        before = block[None, :] < block[:, None]
        same = same_copy & (block[:, None] == block[None, :])
        return (same | (before & clean[None, :]))[None, None]


def block_causal_mask(length: int, block: int) -> Tensor:
    """[1, 1, length, length] bool: each token reads all of its own and of earlier blocks."""
    return Layout(length, block).mask()
