"""Focus-dLLM with FlexAttention: a BlockMask names the sparse layers' keys, nothing is gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.suite.loop import Canvas
from benchmarks.suite.peers.focus_eager import FocusEager
from benchmarks.suite.policy import FocusSettings

__all__ = ["FocusFlex"]

QUERY_TILE = 128
KERNEL_OPTIONS: list[dict[str, Any]] = [
    {},
    {"BLOCK_M": 64, "BLOCK_N": 32},
    {"FORCE_USE_FLEX_ATTENTION": True, "BLOCK_M": 64, "BLOCK_N": 32},
]
"""Tried in this order until one compiles: its tiles must divide the key blocks."""


class FocusFlex(FocusEager):
    """(f) As (e); rows are padded to a multiple of 32, so that few shapes compile."""

    letter = "f"
    row_multiple = 32

    def __init__(self, model: nn.Module, settings: FocusSettings):
        super().__init__(model, settings)
        self.options: dict[str, Any] | None = None
        self.compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)

    def release(self) -> None:
        super().release()
        self.masks: dict[int, BlockMask] = {}

    def begin(self, canvas: Canvas) -> None:
        super().begin(canvas)
        size = self.settings.key_block
        starts = torch.arange(0, canvas.length, size, device=canvas.ids.device)
        self.tail_blocks = starts >= self.tail_start
        # A last block that is cut off by the end of the sequence must be masked token by token.
        self.cut_off = starts + size > canvas.length
        self.kept = torch.empty_like(self.in_tail)

    def _sparse(
        self, q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, sinks: Tensor
    ) -> Tensor:
        self.kept.copy_(self._kept_tokens(blocks, sinks))
        whole = self.tail_blocks & ~self.cut_off
        whole[blocks] = True
        partial = self.tail_blocks & self.cut_off
        partial[sinks // self.settings.key_block] = True
        partial &= ~whole
        mask = self._mask(q.shape[2], len(whole))
        _fill(mask.full_kv_num_blocks, mask.full_kv_indices, whole)
        _fill(mask.kv_num_blocks, mask.kv_indices, partial)
        return self._flex(q, keys, values, mask)

    def _mask(self, rows: int, blocks: int) -> BlockMask:
        """The mask of this many rows, made once and filled in place."""
        if rows not in self.masks:
            kept = self.kept

            def is_kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return kept[key]

            tiles = -(-rows // QUERY_TILE)
            counts = [torch.ones(1, 1, tiles, device=kept.device, dtype=torch.int32)] * 2
            order = torch.arange(blocks, device=kept.device, dtype=torch.int32)
            indices = [order.expand(1, 1, tiles, -1)] * 2
            self.masks[rows] = BlockMask.from_kv_blocks(
                counts[0].clone(),
                indices[0].clone(),
                counts[1].clone(),
                indices[1].clone(),
                BLOCK_SIZE=(QUERY_TILE, self.settings.key_block),
                mask_mod=is_kept,
                seq_lengths=(rows, len(kept)),
            )
        return self.masks[rows]

    def _flex(self, q: Tensor, keys: Tensor, values: Tensor, mask: BlockMask) -> Tensor:
        grouped = q.shape[1] != keys.shape[1]
        if not q.is_cuda:
            return flex_attention(q, keys, values, block_mask=mask, enable_gqa=grouped)
        tried = KERNEL_OPTIONS if self.options is None else [self.options]
        for options in tried:
            try:
                out = self.compiled(
                    q,
                    keys,
                    values,
                    block_mask=mask,
                    enable_gqa=grouped,
                    kernel_options=options,
                )
            except Exception:  # a kernel that does not compile fails in many ways: try the next
                if options is tried[-1]:
                    raise
                continue
            self.options = options
            return out
        raise AssertionError("no kernel options")


def _fill(count: Tensor, indices: Tensor, listed: Tensor) -> None:
    """Write the True positions of `listed` [blocks] into a mask's list, the rest after them."""
    count.copy_(listed.sum())
    indices.copy_((~listed).to(torch.int8).argsort(stable=True))
