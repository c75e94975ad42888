"""`confidence` in Triton: programs reduce slices of the vocabulary, a second kernel joins them.

A slice is held in registers, so that every logit is read once and exponentiated once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLICE = 8192  # logits a program reduces
_SMALLEST_SLICE = 1024
_PROGRAMS = 128  # at least so many, where the logits suffice


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See op.py."""
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    probability = torch.empty(shape, dtype=torch.float32, device=logits.device)
    token = torch.empty(shape, dtype=torch.int64, device=logits.device)
    count = probability.numel()
    if count == 0:
        return probability, token
    rows = _with_three_axes(logits)
    size = _slice_size(count, vocabulary)
    slices = triton.cdiv(vocabulary, size)
    highest = torch.empty((2, count, slices), dtype=torch.float32, device=logits.device)
    best = torch.empty((count, slices), dtype=torch.int32, device=logits.device)
    with torch.cuda.device_of(logits):
        _reduce_kernel[(count, slices)](
            rows,
            highest[0],
            highest[1],
            best,
            rows.shape[1],
            vocabulary,
            *rows.stride(),
            SLICE=size,
            num_warps=min(max(size // 1024, 1), 8),
        )
        _join_kernel[(count,)](
            highest[0],
            highest[1],
            best,
            probability,
            token,
            slices,
            SLICES=triton.next_power_of_2(slices),
            num_warps=min(max(triton.next_power_of_2(slices) // 128, 1), 8),
        )
    return probability, token


def _with_three_axes(logits: Tensor) -> Tensor:
    """Logits [outer, inner, V]: a view unless there are more axes whose strides do not merge."""
    if logits.dim() <= 3:
        return logits.view((1,) * (3 - logits.dim()) + logits.shape)
    return logits.reshape(-1, *logits.shape[-2:])


def _slice_size(rows: int, vocabulary: int) -> int:
    size = min(triton.next_power_of_2(vocabulary), _SLICE)
    while size > _SMALLEST_SLICE and rows * triton.cdiv(vocabulary, size) < _PROGRAMS:
        size //= 2
    return size


@triton.jit
def _reduce_kernel(
    logits_ptr: tl.tensor,
    highest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inner: tl.tensor,
    vocabulary: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    stride: tl.tensor,
    SLICE: tl.constexpr,
) -> None:
    """One slice of one row: its highest logit, the sum of exp(logit - highest), and the token."""
    row = tl.program_id(0)  # the axis of a grid that takes more than 65,535
    token = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    row_ptr = logits_ptr + (row // inner).to(tl.int64) * outer_stride
    row_ptr += (row % inner).to(tl.int64) * inner_stride
    logits = tl.load(
        row_ptr + token.to(tl.int64) * stride, mask=token < vocabulary, other=-float("inf")
    )
    highest, best, total = _join(logits.to(tl.float32), 1.0, token)
    place = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(highest_ptr + place, highest)
    tl.store(total_ptr + place, total)
    tl.store(best_ptr + place, best)


@triton.jit
def _join_kernel(
    highest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    best_ptr: tl.tensor,
    probability_ptr: tl.tensor,
    token_ptr: tl.tensor,
    slices: tl.tensor,
    SLICES: tl.constexpr,
) -> None:
    """One row: its slices joined."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SLICES)
    place = row * slices + part
    inside = part < slices
    highest = tl.load(highest_ptr + place, mask=inside, other=-float("inf"))
    total = tl.load(total_ptr + place, mask=inside, other=0.0)
    best = tl.load(best_ptr + place, mask=inside, other=0)
    highest, best, total = _join(highest, total, best)
    probability = tl.where(highest == -float("inf"), float("nan"), 1.0 / total)
    tl.store(probability_ptr + row, probability)
    tl.store(token_ptr + row, best.to(tl.int64))


@triton.jit
def _join(highest: tl.tensor, total: tl.tensor, token: tl.tensor) -> tl.tensor:
    """(highest, its lowest token, sum of total * exp(. - highest)) of several such triples.

    The highest of nothing finite is -inf, with a sum of 0; a NaN is the highest and spoils the sum.
    """
    unknown = highest != highest
    any_unknown = tl.max(unknown.to(tl.int32), 0)
    most = tl.max(tl.where(unknown, -float("inf"), highest), 0)
    holds = unknown | ((highest == most) & (any_unknown == 0))
    best = tl.min(tl.where(holds, token, 0x7FFFFFFF), 0)
    base = tl.where(most == -float("inf"), 0.0, most)
    total = tl.sum(total * tl.exp(highest - base), 0)
    return tl.where(any_unknown > 0, float("nan"), most), best, total
