"""Buckets: the padded row counts of a step, and active sets as index tensors of that size."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ActiveRows", "bucket_for", "default_ladder", "pack_rows"]

FINE = (*range(8, 65, 8), *range(96, 257, 32))
COARSE = (32, 64, 96, 128, 192, 256)
"""On a GPU a step of few rows is bound by reading weights: padding is nearly free, and every bucket
is a CUDA graph of its own."""
LEAST = 2
"""A size of 0 or 1 would be specialised by the compiler."""


def default_ladder(device_type: str) -> tuple[int, ...]:
    """Bucket sizes up to 256 for a kind of device; powers of two beyond."""
    return COARSE if device_type == "cuda" else FINE


def bucket_for(rows: int, ladder: tuple[int, ...] | None, length: int, device_type: str) -> int:
    """The smallest bucket that holds `rows`, at most `length` unless that is too few.

    Above a ladder's last entry: multiples of it; above the default ladder's (None) powers of two.
    """
    if ladder is None:
        ladder = default_ladder(device_type)
        bucket = _within(rows, ladder) or 1 << (rows - 1).bit_length()
    else:
        bucket = _within(rows, ladder) or -(-rows // ladder[-1]) * ladder[-1]
    return max(LEAST, rows, min(bucket, length))


def _within(rows: int, ladder: tuple[int, ...]) -> int | None:
    return ladder[bisect_left(ladder, rows)] if rows <= ladder[-1] else None


@dataclass(frozen=True)
class ActiveRows:
    """The active set of one step, padded by repeating each sequence's first active row.

    rows int64 [batch, bucket]; row_weight and focus_weight fp32 [batch, bucket]: 1 for the first
    occurrence of an active (focus) row, else 0.
    """

    rows: Tensor
    row_weight: Tensor
    focus_weight: Tensor


def pack_rows(active: Tensor, focus: Tensor, bucket: int) -> ActiveRows:
    """Index tensors of a step, made without waiting for the device.

    Args:
        active: bool [batch, length], between one row per sequence and `bucket` of them.
        focus: bool [batch, length], a subset of active; a sequence without focus rows lets all of
            its active rows choose keys.
        bucket: rows per sequence of the result.
    """
    upto = active.cumsum(1)
    slots = torch.arange(bucket, device=active.device)
    real = slots < upto[:, -1:]
    # The row in slot s is the first position with s + 1 active rows up to it.
    rows = torch.searchsorted(upto, (slots + 1).expand(active.shape[0], -1).contiguous())
    rows = torch.where(real, rows, rows[:, :1])
    chosen = focus.gather(1, rows) & real
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, real)
    return ActiveRows(rows, real.float(), chosen.float())
