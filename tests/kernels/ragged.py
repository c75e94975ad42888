"""Random ragged lists of rows (see `focus_compile.kernels.ragged`)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.strategies import lay_out


@dataclass(frozen=True)
class Rows:
    """starts [S + 1], masked [T], rising positions [T]; padding at the end looks like rows."""

    starts: Tensor
    masked: Tensor
    positions: Tensor
    max_rows: int

    @property
    def total(self) -> int:
        return self.masked.shape[0]

    @property
    def slices(self) -> list[slice]:
        """The rows of each sequence."""
        return [slice(first, end) for first, end in pairwise(self.starts.tolist())]

    @property
    def hidden(self) -> list[int]:
        """Masked rows of each sequence."""
        return [int(self.masked[rows].sum()) for rows in self.slices]


@st.composite
def ragged_rows(draw: st.DrawFn, *, most: int = 20, sequences: int = 5) -> Rows:
    """Up to `sequences` of 0 to `most` rows, none to all of them masked, then padding."""
    counts = draw(st.lists(st.integers(0, most), max_size=sequences))
    return make_rows(
        counts,
        padding=draw(st.integers(0, 9)),
        share=draw(st.sampled_from((0.0, 0.2, 0.7, 1.0))),
        gap=draw(st.sampled_from((1, 2, 4))),
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        spare=draw(st.integers(0, 7)),
    )


def make_rows(
    counts: list[int],
    *,
    padding: int = 0,
    share: float = 0.7,
    gap: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.int64,
    spare: int = 0,
) -> Rows:
    """Rows that are masked with probability `share`, 1 to `gap` positions apart."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *counts]).cumsum(0).to(dtype)
    total = sum(counts) + padding
    positions = torch.randint(1, gap + 1, (total,), generator=generator).cumsum(0)
    rows = Rows(
        starts=starts,
        masked=torch.rand(total, generator=generator) < share,
        positions=positions,
        max_rows=max([1, *counts]) + spare,
    )
    for part in rows.slices:  # from the start of a block, or from anywhere
        if part.stop > part.start:
            from_block = bool(torch.rand((), generator=generator) < 0.5)
            positions[part] -= positions[part.start] - int(not from_block) * 1000
    return rows


def permuted(rows: Rows, order: list[int]) -> tuple[Rows, Tensor]:
    """The same sequences in another order, and where each row of that list was in the first."""
    parts = [torch.arange(total.start, total.stop) for total in rows.slices]
    end = int(rows.starts[-1])
    source = torch.cat([*(parts[s] for s in order), torch.arange(end, rows.total)])
    counts = torch.tensor([0, *(parts[s].shape[0] for s in order)])
    moved = Rows(
        starts=counts.cumsum(0).to(rows.starts.dtype),
        masked=rows.masked[source],
        positions=rows.positions[source],
        max_rows=rows.max_rows,
    )
    return moved, source


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """`lay_out` for [H, T, d]."""
    return lay_out(tensor[None], layout)[0]


def strided(values: Tensor, odd: bool) -> Tensor:
    """The same [N] values, every other element of a storage if `odd`."""
    if not odd:
        return values
    room = torch.zeros((values.shape[0], 2), dtype=values.dtype)
    room[:, 0] = values
    return room[:, 0]
