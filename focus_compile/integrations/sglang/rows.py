"""Batches of some rows of a block, in SGLang's terms."""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from focus_compile.block_diffusion.state import BlockState, Listing

__all__ = ["BlockBatch"]


class BlockBatch:
    """A block of every request of a batch [S, B], of which any rows can be forwarded.

    SGLang takes the rows of a forward for the last ones of their sequence. Block diffusion is not
    causal within a block, and keys carry their position, so the slots of a block may stand in any
    order: here those that are read from the cache come first. Leaving the context puts them back.
    """

    def __init__(self, batch: Any, model_runner: Any, tokens: Tensor) -> None:
        self._batch, self._slots = batch, model_runner.req_to_token_pool.req_to_token
        self._places = batch.out_cache_loc.view(tokens.shape)
        self._ids = batch.positions.view(tokens.shape)
        self.begin = self._ids[:, 0].long()
        """Position of the first row of each block, int64 [S]."""
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        self._columns = self.begin[:, None] + offsets
        self._requests = batch.req_pool_indices[:, None].expand(tokens.shape).long()

    def __enter__(self) -> BlockBatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._order(self._places)

    def _order(self, places: Tensor) -> None:
        self._slots[self._requests, self._columns] = places.to(self._slots.dtype)

    def of(self, state: BlockState, listing: Listing) -> Any:
        """A batch of these rows alone."""
        made = copy.copy(self._batch)
        self.put(made, state, listing)
        return made

    def put(self, batch: Any, state: BlockState, listing: Listing) -> None:
        """Make `batch` one of these rows; of sequences without any there is nothing in it."""
        rows = state.spread(listing)
        seen = (listing.rows.lengths - self.begin)[:, None]
        offsets = torch.arange(rows.shape[1], device=rows.device)
        rank = torch.where(offsets >= seen, 2, rows.long())
        self._order(self._places.gather(1, rank.argsort(dim=1, stable=True)))
        counts, some = rows.sum(1), rows.any(1)
        lengths, counts = listing.rows.lengths[some], counts[some]

        def like(value: Tensor, values: Tensor) -> Tensor:
            return values.to(dtype=value.dtype, device=value.device)

        old = self._batch
        batch.batch_size = int(some.sum())
        batch.input_ids = like(old.input_ids, listing.rows.row_ids.flatten())
        batch.positions = like(old.positions, listing.rows.rows.flatten())
        batch.out_cache_loc = self._places.flatten()[listing.index]
        batch.req_pool_indices = old.req_pool_indices[some]
        batch.seq_lens = like(old.seq_lens, lengths)
        batch.extend_seq_lens = like(old.extend_seq_lens, counts)
        batch.extend_prefix_lens = like(old.extend_prefix_lens, lengths - counts)
        batch.extend_start_loc = like(old.extend_start_loc, counts.cumsum(0) - counts)
        batch.seq_lens_cpu = lengths.cpu()
        batch.extend_seq_lens_cpu = counts.tolist()
        batch.extend_prefix_lens_cpu = (lengths - counts).tolist()
        batch.seq_lens_sum = int(lengths.sum())
        batch.extend_num_tokens = listing.index.shape[0]
