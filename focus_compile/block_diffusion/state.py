"""What is known of every sequence's current block, on the device, and how a step changes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_compile.block_diffusion.programs import RowList
from focus_compile.kernels.compaction.op import compact_rows
from focus_compile.policies.focus_evict import Yield, last_true, ready

__all__ = ["COMMIT", "DECODE", "IDLE", "BlockState", "Listing"]

IDLE, DECODE, COMMIT = 0, 1, 2


@dataclass(frozen=True)
class Listing:
    """The rows of one step. chosen: of the list [R], or of a part of it.

    index int64 [R]: slot * B + position in the block; real bool [R]: no padding; masked bool [R].
    """

    rows: RowList
    index: Tensor
    real: Tensor
    masked: Tensor


@dataclass(frozen=True)
class BlockState:
    """Tensors of S slots with a block of B tokens each, all updated in place.

    tokens int64 [S, B]; uncached bool [S, B]: K/V not final; begin int64 [S]: absolute position of
    the block; progress int64 [S]: last position of the block computed in all layers, -1 at first;
    phase int64 [S]: IDLE, DECODE or COMMIT (the finished block is computed once more).
    """

    mask_token_id: int
    max_length: int
    tokens: Tensor
    uncached: Tensor
    begin: Tensor
    progress: Tensor
    phase: Tensor
    decoded: Yield

    @classmethod
    def allocate(
        cls,
        slots: int,
        block_length: int,
        max_length: int,
        mask_token_id: int,
        device: torch.device,
    ) -> BlockState:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        tokens = torch.full_like(zeros(slots, block_length), mask_token_id)
        return cls(
            mask_token_id, max_length, tokens, torch.ones_like(tokens, dtype=torch.bool),
            zeros(slots), zeros(slots) - 1, zeros(slots), Yield(zeros(slots), zeros(slots)),
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return self.tokens.shape[0]

    @property
    def block_length(self) -> int:
        return self.tokens.shape[1]

    def start(self, slot: int, tokens: Tensor, begin: int) -> None:
        """A sequence enters `slot` with the block `tokens` [B] at position `begin`."""
        self.tokens[slot] = tokens
        self.uncached[slot] = True
        self.begin[slot] = begin
        self.progress[slot] = -1
        self.decoded.total[slot] = 0
        self.decoded.steps[slot] = 0

    def masked(self) -> Tensor:
        """Undecided positions, bool [S, B]."""
        return self.tokens == self.mask_token_id

    def listing(self, rows: int, *, everything: bool, commit_all: bool) -> Listing:
        """The rows of the next step, padded to `rows`: those whose K/V are not final.

        everything: the whole block of every sequence instead; commit_all: of those that commit.
        """
        working = (self.phase > IDLE)[:, None]
        whole = (self.phase == COMMIT)[:, None] & commit_all
        listed = working & (self.uncached | whole | everything)
        starts = torch.arange(self.slots + 1, device=self.tokens.device) * self.block_length
        index, starts = compact_rows(listed.flatten(), starts, rows)
        visible = self._visible(listed)
        real = torch.arange(rows, device=index.device) < starts[-1]
        masked = self.masked().flatten()[index] & real
        owners = torch.arange(self.slots, device=index.device)
        ids = self.tokens.flatten()[index]
        return Listing(
            self._row_list(index, real, ids, owners, starts, visible), index, real, masked
        )

    def narrowed(self, listing: Listing, keep: Tensor, rows: int) -> tuple[Listing, Tensor]:
        """The kept rows of a listing, padded to `rows`, and their indices into it [1, rows]."""
        chosen, starts = compact_rows(keep, listing.rows.starts, rows)
        index = listing.index[chosen]
        real = torch.arange(rows, device=index.device) < starts[-1]
        kept = self._spread(index, real, real, False)
        masked = listing.masked[chosen] & real
        ids = listing.rows.row_ids[0]
        rows_of = self._row_list(
            index, real, ids, listing.rows.owners, starts, self._visible(kept),
            at=listing.rows.rows,
        )  # fmt: skip
        return Listing(rows_of, index, real, masked), chosen[None]

    def _visible(self, computed: Tensor) -> Tensor:
        """Keys that each sequence sees: up to its last row that is computed or final."""
        last = last_true(computed | ~self.uncached)
        return torch.where(self.phase > IDLE, self.begin + last + 1, 0)

    def _row_list(
        self,
        index: Tensor,
        real: Tensor,
        ids: Tensor,
        owners: Tensor,
        starts: Tensor,
        lengths: Tensor,
        at: Tensor | None = None,
    ) -> RowList:
        slot, local = index // self.block_length, index % self.block_length
        position = self.begin[slot] + local
        return RowList(
            row_ids=ids[None],
            rows=position[None] if at is None else at,
            slots=slot,
            places=torch.where(real, position, self.max_length),
            owners=owners,
            starts=starts,
            lengths=lengths,
        )

    def advance(
        self,
        computed: Listing,
        scored: Listing,
        probability: Tensor,
        token: Tensor,
        threshold: float,
        counts: Tensor | None = None,
    ) -> None:
        """Decode what a step computed: all rows at or above the threshold, and the best one.

        Then mark K/V as final, count what was decoded, and let committed sequences enter their next
        block.

        Args:
            computed: the rows that went through all layers.
            scored: those that have logits; probability float32, token int64 [K]: of its rows.
            counts: int64 [S], decode the best so many of each sequence instead.
        """
        masked = self.masked()
        score = self._spread(scored.index, scored.masked, probability, -1.0)
        guess = self._spread(scored.index, scored.masked, token, 0)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        decode = (rank == 0) | (score >= threshold) if counts is None else rank < counts[:, None]
        decode &= score >= 0
        seen = self._spread(computed.index, computed.real, computed.real, False)
        self.uncached.logical_and_(~(ready(masked) & seen))
        self.progress.copy_(torch.maximum(self.progress, last_true(seen)))
        self.tokens.copy_(torch.where(decode, guess, self.tokens))
        self.decoded.add(decode.sum(1))
        self._enter_next_block(self.phase == COMMIT)

    def _spread(self, index: Tensor, where: Tensor, values: Tensor, rest: float) -> Tensor:
        """Values of those rows of a list that are `where`, in their places [S, B]; else `rest`."""
        size = self.tokens.numel()
        # Padding repeats a row, whose value it must not overwrite: it goes past the end.
        at = torch.where(where, index, size)
        out = torch.full((size + 1,), rest, dtype=values.dtype, device=values.device)
        return out.scatter(0, at, values)[:size].view_as(self.tokens)

    def _enter_next_block(self, where: Tensor) -> None:
        self.tokens.masked_fill_(where[:, None], self.mask_token_id)
        self.uncached.logical_or_(where[:, None])
        self.begin.add_(where * self.block_length)
        self.progress.masked_fill_(where, -1)
        self.decoded.reset(where)
        self.phase.copy_(torch.where(where, DECODE, self.phase))

    def counts(self) -> Tensor:
        """Uncached and undecided positions of each slot, int64 [2, S]: what the host plans by."""
        return torch.stack([self.uncached.sum(1), self.masked().sum(1)])
