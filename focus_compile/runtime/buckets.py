"""Buckets: the padded row counts of a step, and active sets as index tensors of that size."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ActiveRows", "bucket_for", "pack_rows"]

FINEST = 8
LEAST = 2
"""A size of 0 or 1 would be specialised by the compiler."""


def bucket_for(rows: int, ladder: tuple[int, ...] | None) -> int:
    """The smallest bucket that holds `rows`.

    Default ladder: multiples of 8 to 64, of 32 to 256, powers of two beyond. Above a ladder's last
    entry: multiples of it.
    """
    if ladder is not None:
        if rows <= ladder[-1]:
            return ladder[bisect_left(ladder, rows)]
        return -(-rows // ladder[-1]) * ladder[-1]
    if rows <= 64:
        return max(FINEST, -(-rows // 8) * 8)
    if rows <= 256:
        return -(-rows // 32) * 32
    return 1 << (rows - 1).bit_length()


@dataclass(frozen=True)
class ActiveRows:
    """The active set of one step, padded by repeating each sequence's first active row.

    rows int64 [batch, bucket]; row_weight and focus_weight fp32 [batch, bucket]: 1 for the first
    occurrence of an active (focus) row, else 0; count: distinct active rows over the batch.
    """

    rows: Tensor
    row_weight: Tensor
    focus_weight: Tensor
    count: int


def pack_rows(active: Tensor, focus: Tensor, ladder: tuple[int, ...] | None) -> ActiveRows:
    """Index tensors of a step.

    Args:
        active: bool [batch, length], at least one row per sequence.
        focus: bool [batch, length], a subset of active; a sequence without focus rows lets all of
            its active rows choose keys.
        ladder: bucket sizes, or None for the default ladder.
    """
    length = active.shape[1]
    per_sequence = active.sum(1)
    largest = int(per_sequence.max())
    bucket = max(LEAST, min(bucket_for(largest, ladder), max(length, largest)))
    sequence, position = active.nonzero(as_tuple=True)
    first_slot = per_sequence.cumsum(0) - per_sequence
    slot = torch.arange(len(position), device=active.device) - first_slot[sequence]
    rows = position[first_slot][:, None].repeat(1, bucket)
    rows[sequence, slot] = position
    real = torch.arange(bucket, device=active.device) < per_sequence[:, None]
    chosen = focus.gather(1, rows) & real
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, real)
    return ActiveRows(rows, real.float(), chosen.float(), int(per_sequence.sum()))
