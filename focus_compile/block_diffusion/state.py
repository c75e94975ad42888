"""What is known of every sequence's current block, on the device, and how a step changes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from focus_compile.block_diffusion.programs import KeyChoice, RowList
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
    padded: bool = False
    """Lists are [S, R], each sequence's rows padded to as many, for a graph of S sequences; else
    [1, R], one sequence after another, for a graph of one."""
    key_block: int | None = None
    """Tokens of a key block, where some layers choose keys."""

    @classmethod
    def allocate(
        cls,
        slots: int,
        block_length: int,
        max_length: int,
        mask_token_id: int,
        device: torch.device,
        padded: bool = False,
        key_block: int | None = None,
    ) -> BlockState:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        tokens = torch.full_like(zeros(slots, block_length), mask_token_id)
        return cls(
            mask_token_id, max_length, tokens, torch.ones_like(tokens, dtype=torch.bool),
            zeros(slots), zeros(slots) - 1, zeros(slots), Yield(zeros(slots), zeros(slots)),
            padded, key_block,
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return self.tokens.shape[0]

    @property
    def block_length(self) -> int:
        return self.tokens.shape[1]

    def enter(self, tokens: Tensor, begin: int) -> None:
        """All sequences enter the block `tokens` [S, B] at position `begin`."""
        self.tokens.copy_(tokens)
        self.uncached.fill_(True)
        self.begin.fill_(begin)
        self.progress.fill_(-1)
        self.phase.fill_(DECODE)
        self.decoded.total.zero_()
        self.decoded.steps.zero_()

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

    def listing(
        self, rows: int, *, everything: bool, commit_all: bool, keep_ratio: float = 1.0
    ) -> Listing:
        """The rows of the next step, padded to `rows`: those whose K/V are not final.

        everything: the whole block of every sequence instead; commit_all: of those that commit;
        keep_ratio: share of the finished key blocks that sparse layers read, but where a sequence
        commits: K/V that are final must come from all keys.
        """
        working = (self.phase > IDLE)[:, None]
        whole = (self.phase == COMMIT)[:, None] & commit_all
        listed = working & (self.uncached | whole | everything)
        index, real, starts = self._list(listed, rows)
        owners = torch.arange(self.slots, device=index.device)
        ids, masked = self.tokens.flatten()[index], self.masked().flatten()[index] & real
        row_list = self._row_list(index, real, ids, owners, starts, self._visible(listed))
        if self.key_block is not None:
            candidates = torch.where(self.phase > IDLE, self.begin // self.key_block, 0)
            keep = (candidates.double() * keep_ratio).ceil().long()
            keep = torch.where(self.phase == COMMIT, candidates, keep)
            keys = KeyChoice(self._weights(masked), candidates, keep)
            row_list = replace(row_list, keys=keys)
        return Listing(row_list, index, real, masked)

    def narrowed(self, listing: Listing, keep: Tensor, rows: int) -> tuple[Listing, Tensor]:
        """The kept rows of a listing, padded to `rows`, and their indices into it [b, rows]."""
        if self.padded:
            chosen, real = _packed((keep & listing.real).view(self.slots, -1), rows)
            per_sequence = listing.index.shape[0] // self.slots
            flat = (chosen + _firsts(self.slots, per_sequence, chosen.device)).flatten()
            real = real.flatten()
            starts = _starts(self.slots, rows, flat.device)
        else:
            flat, starts = compact_rows(keep, listing.rows.starts, rows)
            chosen = flat[None]
            real = torch.arange(rows, device=flat.device) < starts[-1]
        index = listing.index[flat]
        kept = self._spread(index, real, real, False)
        listed = listing.rows
        row_list = self._row_list(
            index, real, listed.row_ids.flatten()[flat], listed.owners, starts, self._visible(kept)
        )
        masked = listing.masked[flat] & real
        keys = None if listed.keys is None else replace(listed.keys, weights=self._weights(masked))
        return Listing(replace(row_list, keys=keys), index, real, masked), chosen

    def _weights(self, masked: Tensor) -> Tensor:
        """Of the rows' queries in the choice of keys [b, R]: undecided ones count, each once."""
        return masked.float().view(self.slots if self.padded else 1, -1)

    def _list(self, listed: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """index, real and starts of the rows listed [S, B], padded to `rows`."""
        block_length, device = self.block_length, listed.device
        starts = _starts(self.slots, block_length, device)
        if self.padded:
            local, real = _packed(listed, rows)
            index = local + _firsts(self.slots, block_length, device)
            return index.flatten(), real.flatten(), _starts(self.slots, rows, device)
        index, starts = compact_rows(listed.flatten(), starts, rows)
        return index, torch.arange(rows, device=device) < starts[-1], starts

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
    ) -> RowList:
        slot, local = index // self.block_length, index % self.block_length
        position = self.begin[slot] + local
        batch = self.slots if self.padded else 1
        return RowList(
            row_ids=ids.view(batch, -1),
            rows=position.view(batch, -1),
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
        score = self._spread(scored.index, scored.masked, probability, -1.0)
        guess = self._spread(scored.index, scored.masked, token, 0)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        decode = (rank == 0) | (score >= threshold) if counts is None else rank < counts[:, None]
        decode &= score >= 0
        self.computed(computed)
        self.tokens.copy_(torch.where(decode, guess, self.tokens))
        self.decoded.add(decode.sum(1))
        self._enter_next_block(self.phase == COMMIT)

    def computed(self, listing: Listing) -> None:
        """These rows, with the tokens as they are, went through all layers."""
        self.computed_at(self.spread(listing))

    def computed_at(self, seen: Tensor) -> None:
        """The same for positions bool [S, B]."""
        self.uncached.logical_and_(~(ready(self.masked()) & seen))
        self.progress.copy_(torch.maximum(self.progress, last_true(seen)))

    def spread(self, listing: Listing) -> Tensor:
        """Which positions the rows of a listing are at, bool [S, B]."""
        return self._spread(listing.index, listing.real, listing.real, False)

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


def _starts(sequences: int, rows: int, device: torch.device) -> Tensor:
    """Where sequences of `rows` rows each start, int64 [S + 1]."""
    return torch.arange(sequences + 1, device=device) * rows


def _firsts(sequences: int, rows: int, device: torch.device) -> Tensor:
    """The same as a column [S, 1], without the end."""
    return _starts(sequences, rows, device)[:-1, None]


def _packed(flags: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Positions of the True flags of each row of [S, N], padded to [S, rows] by the first (0 where
    there is none), and which of them are real."""
    upto = flags.long().cumsum(1)
    slots = torch.arange(rows, device=flags.device)
    real = slots < upto[:, -1:]
    at = torch.searchsorted(upto, (slots + 1).expand(flags.shape[0], -1).contiguous())
    at = torch.where(real, at, at[:, :1]).clamp(max=flags.shape[1] - 1)
    return at, real
