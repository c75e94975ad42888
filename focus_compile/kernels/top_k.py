"""Triton: the highest of many scores a sequence, without sorting and without a host sync.

Scores become unsigned integers of the same order; a search two bits at a time finds the lowest one
to keep; a cumulative sum numbers what is kept, in ascending order, and cuts ties at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 4096
"""Scores that one program holds in registers."""


def choose_highest(parts: Tensor, limit: Tensor, count: Tensor | int, width: int) -> Tensor:
    """The `count` highest sums over parts [B, P, N] among positions below `limit`.

    Of equal sums the lowest position comes first; -0 equals 0, and NaN counts as infinity. Parts
    are added in the same order for every position, so equal parts give equal sums.

    Args:
        parts: [B, P, N] float32, contiguous, B >= 1, P >= 1.
        limit: [B] int64, any strides.
        count: [B] int64, any strides, or one number for all; at most `width`, or N.
        width: columns of the result.

    Returns:
        [B, width] int64: positions ascending, then -1.
    """
    batch, _, length = parts.shape
    out = limit.new_empty((batch, width))
    if width == 0:
        return out
    if length > WIDE and (isinstance(count, Tensor) or count > WIDE // 2):
        return _by_sorting(parts, limit, count, width)
    ids: Tensor | None = None
    while length > WIDE:  # the highest of each segment, then the highest of those
        assert isinstance(count, int)
        segments = triton.cdiv(length, WIDE)
        kept = limit.new_empty((batch, segments * count))
        scores = parts.new_empty((batch, 1, segments * count))
        _launch(parts, ids, limit, count, kept, scores, segments)
        parts, ids, length = scores, kept, segments * count
    _launch(parts, ids, limit, count, out, None, 1)
    return out


def _block_of(length: int) -> int:
    """Width of the register vector that holds `length` scores, or a segment of them."""
    return min(max(triton.next_power_of_2(length), 16), WIDE)


def _tile_of(parts: int, block: int, warps: int) -> int:
    """How many parts are loaded at once: 64 scores a thread."""
    return min(triton.next_power_of_2(parts), max(64 * 32 * warps // block, 1))


def _launch(
    parts: Tensor,
    ids: Tensor | None,
    limit: Tensor,
    count: Tensor | int,
    out: Tensor,
    scores: Tensor | None,
    segments: int,
) -> None:
    block = _block_of(parts.shape[2])
    warps = min(max(block // 128, 1), 16)
    _choose_kernel[(segments, parts.shape[0])](
        parts,
        parts if ids is None else ids,
        limit,
        count,
        out,
        out if scores is None else scores,
        parts.shape[1],
        parts.shape[2],
        out.shape[1] // segments,
        limit.stride(0),
        count.stride(0) if isinstance(count, Tensor) else 0,
        TILE=_tile_of(parts.shape[1], block, warps),
        HAS_IDS=ids is not None,
        HAS_SCORES=scores is not None,
        COUNTS=isinstance(count, Tensor),
        BLOCK=block,
        num_warps=warps,
    )


def _by_sorting(parts: Tensor, limit: Tensor, count: Tensor | int, width: int) -> Tensor:
    """`choose_highest` of more scores than a program holds, in plain torch that does not sync."""
    batch, _, length = parts.shape
    scores = torch.zeros((batch, length), dtype=parts.dtype, device=parts.device)
    for part in parts.unbind(1):  # one by one: every column in the same order
        scores += part
    position = torch.arange(length, device=parts.device)
    scores.nan_to_num_(torch.inf, torch.inf, -torch.inf)
    scores.masked_fill_(position >= limit[:, None], -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    wanted = limit.clamp(0, length)
    wanted = wanted.minimum(count) if isinstance(count, Tensor) else wanted.clamp(max=count)
    order = order.masked_fill(position >= wanted[:, None], length).sort(1).values[:, :width]
    order = torch.nn.functional.pad(order, (0, max(width - length, 0)), value=length)
    return order.masked_fill(order == length, -1)


@triton.jit
def _choose_kernel(
    parts_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    count_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    parts: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    limit_stride: tl.tensor,
    count_stride: tl.tensor,
    TILE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: the `count` highest of a segment of BLOCK scores, as ids and as scores.

    HAS_IDS: scores are of the given ids [B, N], where -1 is no candidate; else of positions 0 to N,
    of which those below the limit are candidates.
    """
    segment = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    position = segment * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    score = _sum_parts(parts_ptr + b * parts * length, position, inside, parts, length, TILE, BLOCK)
    if HAS_IDS:
        ids = tl.load(ids_ptr + b * length + position, mask=inside, other=-1)
        valid = ids >= 0
    else:
        ids = position.to(tl.int64)
        valid = inside & (ids < tl.load(limit_ptr + b * limit_stride))
    if COUNTS:
        count = tl.load(count_ptr + b * count_stride)
    else:
        count = count_ptr
    row = b * tl.num_programs(0) + segment
    _store_highest(
        score,
        ids,
        valid,
        count,
        out_ptr + row * width,
        scores_ptr + row * width,
        width,
        HAS_SCORES,
        BLOCK,
    )


@triton.jit
def _sum_parts(
    parts_ptr: tl.tensor,
    position: tl.tensor,
    inside: tl.tensor,
    parts: tl.tensor,
    length: tl.tensor,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Sum over [parts, length] float32 at `position` [BLOCK]."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, TILE):
        part = first + tl.arange(0, TILE)
        tile = tl.load(
            parts_ptr + part[:, None] * length + position[None, :],
            mask=(part < parts)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(tile, 0)
    return total


@triton.jit
def _store_highest(
    score: tl.tensor,
    ids: tl.tensor,
    valid: tl.tensor,
    count: tl.tensor,
    out_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    width: tl.tensor,
    HAS_SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store the ids (and scores) of the `count` highest valid scores in order, then ids -1.

    Writes columns 0 to `width` and no others, whatever the scores are.
    """
    total = tl.sum(valid.to(tl.int32), 0)
    count = tl.minimum(tl.maximum(count, 0), tl.minimum(total, width)).to(tl.int32)
    key = tl.where(valid, _ordered(score), 0)
    lowest = _threshold(key, count)
    above = (key > lowest).to(tl.int32)
    equal = (valid & (key == lowest)).to(tl.int32)
    ties = count - tl.sum(above, 0)
    before = tl.cumsum(above + (equal << 16), 0)  # both at once: neither exceeds WIDE
    tie = before >> 16
    place = (before & 0xFFFF) + tl.minimum(tie, ties) - 1
    chosen = (above > 0) | ((equal > 0) & (tie <= ties))
    tl.store(out_ptr + place, ids, mask=chosen)
    if HAS_SCORES:
        tl.store(scores_ptr + place, score, mask=chosen)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        empty = tl.full([BLOCK], -1, tl.int64)
        tl.store(out_ptr + column, empty, mask=(column >= count) & (column < width))


@triton.jit
def _ordered(score: tl.tensor) -> tl.tensor:
    """uint32 in the order of the float32 scores, never 0: -0 as 0, NaN as infinity."""
    score = tl.where(score == 0.0, 0.0, score)
    score = tl.where(score != score, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    signed = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (signed ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _threshold(key: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The `count`-th highest key (uint32), or above all keys if count is 0.

    Three counts share each 64-bit sum.
    """
    found = tl.full([], 0, tl.uint32)
    for step in tl.static_range(16):
        one = tl.full([], 1 << (30 - 2 * step), tl.uint32)
        reach = (key >= found + one).to(tl.int64)
        reach += (key >= found + one * 2).to(tl.int64) << 21
        reach += (key >= found + one * 3).to(tl.int64) << 42
        counts = tl.sum(reach, 0)
        digit = ((counts & 0x1FFFFF) >= count).to(tl.uint32)
        digit += (((counts >> 21) & 0x1FFFFF) >= count).to(tl.uint32)
        digit += ((counts >> 42) >= count).to(tl.uint32)
        found += digit * one
    return found
