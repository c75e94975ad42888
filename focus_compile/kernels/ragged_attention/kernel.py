"""`ragged_attention` in Triton: the split-KV loop, told on the device how far to go.

A program takes a tile of (row, query head of the group) pairs of one sequence and one kv head, and
one share of the sequence's keys; `split_kv` joins the shares. Grid, shares and compiled code depend
on shapes alone, so a call can be captured in a CUDA graph: each share is cut from lengths[s] on the
device, and tiles past a sequence's rows end at once. What is read is the first keys of the slot, or
[kept blocks][tail] of `KeyBlocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_compile.kernels.split_kv import (
    LOG2_E,
    _attend_tile,
    _block_ids,
    _count_kept,
    _launch_join,
    _tokens,
)
from focus_compile.kernels.tiling import Tiling, choose_tiling, device_limits, padded

_ROWS = 64  # of a tile: all that a sequence has left, as a rule, once rows were evicted


@dataclass(frozen=True)
class KeyBlocks:
    """The keys of `ragged_sparse_attention`: blocks [S, any] and candidates [S], contiguous."""

    blocks: Tensor
    candidates: Tensor
    key_block: int


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_rows: int,
    scale: float,
    tiling: Tiling | None = None,
) -> Tensor:
    """See op.py. tiling: in place of `tiling_for`'s."""
    return attend(q, k, v, slot, starts, lengths, max_rows, scale, None, tiling)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_rows: int,
    scale: float,
    keys: KeyBlocks | None,
    tiling: Tiling | None,
) -> Tensor:
    """`ragged_attention`, or with `keys` `ragged_sparse_attention`; see their op.py."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if starts.shape[0] == 1:
        return out.zero_()
    if out.numel() == 0:
        return out
    tiling = tiling or tiling_for(q, k, starts, max_rows)
    if scale < 0:  # the kernel takes the highest score before it scales
        q, scale = -q, -scale
    with torch.cuda.device_of(q):
        if tiling.splits == 1:
            _launch(q, k, v, slot, starts, lengths, max_rows, scale, keys, out, None, tiling)
            return out
        shape = (tiling.splits, 1, *q.shape[:2])
        parts = q.new_empty((*shape, q.shape[2]), dtype=torch.float32)
        sums = q.new_empty((2, *shape), dtype=torch.float32)
        _launch(q, k, v, slot, starts, lengths, max_rows, scale, keys, parts, sums, tiling)
        _launch_join(parts, sums, out, None)
    return out


def tiling_for(q: Tensor, k: Tensor, starts: Tensor, max_rows: int) -> Tiling:
    """For one tile of rows a sequence: what lies beyond is seldom there."""
    kv_heads, length, width = k.shape[1:]
    return choose_tiling(
        (starts.shape[0] - 1) * kv_heads,
        min(q.shape[0] // kv_heads * max_rows, _ROWS),
        length,
        width,
        q.element_size(),
        False,
        device_limits(q.device),
    )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_rows: int,
    scale: float,
    keys: KeyBlocks | None,
    out: Tensor,
    sums: Tensor | None,
    tiling: Tiling,
) -> None:
    heads, rows, width = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    sequences, group = starts.shape[0] - 1, heads // kv_heads
    row_tiles = triton.cdiv(group * min(max_rows, rows), tiling.block_m)
    _attend_share[(row_tiles, tiling.splits, sequences * kv_heads)](
        *(q, k, v, slot, starts.contiguous(), lengths),
        *((None, None) if keys is None else (keys.blocks, keys.candidates)),
        *(out, sums),
        *(*q.stride(), *k.stride(), *v.stride(), slot.stride(0), lengths.stride(0)),
        *(rows, length, 0 if keys is None else keys.blocks.shape[1], kv_heads, scale),
        GROUP=group,
        HEAD_DIM=width,
        BLOCK_D=padded(width),
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        KEY_BLOCK=0 if keys is None else keys.key_block,
        SHARED=sums is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


# fmt: off
@triton.jit(do_not_specialize=["rows", "length", "block_slots", "kv_heads"])
def _attend_share(  # type: ignore[no-untyped-def]
    q, k, v, slot, starts, lengths, blocks, candidates, out, sums,
    q_h, q_t, q_d, k_s, k_h, k_n, k_d, v_s, v_h, v_n, v_d, slot_s, lengths_s,
    rows, length, block_slots, kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Attend from one tile of a sequence's pairs to one share of its keys; clear some padding.
    KEY_BLOCK 0: all of its keys.

    out [splits, H, T, d] receives the share's own result. If SHARED, sums [2, splits, H, T]
    receives the highest score, in base 2, and the sum of exp2(score - highest).
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    s = tl.program_id(2) // kv_heads
    sequences = tl.num_programs(2) // kv_heads
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    pair = tl.arange(0, BLOCK_M)
    plane = (kv_heads * GROUP).to(tl.int64) * rows
    out += split * plane * HEAD_DIM + d[None, :]
    if SHARED:
        sums += split * plane

    end = tl.load(starts + sequences).to(tl.int64)
    tiles = sequences * tl.num_programs(0)
    for empty in range(s * tl.num_programs(0) + tl.program_id(0),
                      tl.cdiv(GROUP * (rows - end), BLOCK_M), tiles):
        packed = empty * BLOCK_M + pair
        row, head = end + packed // GROUP, kv_head * GROUP + packed % GROUP
        place, real = head * rows + row, row < rows
        nothing = tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty)
        tl.store(out + place[:, None] * HEAD_DIM, nothing, mask=real[:, None] & inside[None, :])
        if SHARED:
            tl.store(sums + place, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=real)
            tl.store(sums + splits * plane + place, tl.zeros([BLOCK_M], tl.float32), mask=real)

    first = tl.load(starts + s).to(tl.int64)
    count = (tl.load(starts + s + 1) - first).to(tl.int32)
    if tl.program_id(0) * BLOCK_M >= GROUP * count:
        return
    packed = tl.program_id(0) * BLOCK_M + pair
    real = packed < GROUP * count
    row, head = first + packed // GROUP, kv_head * GROUP + packed % GROUP
    query = tl.load(
        q + (head * q_h + row * q_t)[:, None] + d[None, :] * q_d,
        mask=real[:, None] & inside[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    factor = scale * LOG2_E
    owned = tl.load(slot + s * slot_s)
    k += owned * k_s + kv_head * k_h + d[None, :] * k_d
    v += owned * v_s + kv_head * v_h + d[None, :] * v_d
    seen = tl.minimum(tl.maximum(tl.load(lengths + s * lengths_s), 0), length).to(tl.int32)
    kept, tail, listed = 0, 0, seen
    if KEY_BLOCK > 0:
        blocks += s.to(tl.int64) * block_slots
        kept = _count_kept(blocks, block_slots)
        tail = tl.minimum(tl.load(candidates + s) * KEY_BLOCK, seen).to(tl.int32)
        listed = kept * KEY_BLOCK + seen - tail
    key_tiles = tl.cdiv(listed, BLOCK_N)
    from_tile, to_tile = split * key_tiles // splits, (split + 1) * key_tiles // splits
    full = tl.maximum(tl.minimum(to_tile, listed // BLOCK_N), from_tile)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = (from_tile * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    ids = _block_ids(n, blocks, kept, KEY_BLOCK)
    for _ in range(from_tile, full):
        ahead = _block_ids(n + BLOCK_N, blocks, kept, KEY_BLOCK)
        tokens = _tokens(n, ids, kept, tail, KEY_BLOCK)
        top, total, acc = _attend_tile(
            query, factor, k, v, None, tokens, n >= 0, real, inside, top, total, acc,
            k_n, v_n, 0, "none", PRECISION, HEAD_DIM < BLOCK_D, False,
        )  # fmt: skip
        n += BLOCK_N  # carried, as in `split_kv`
        ids = ahead
    for tile in tl.range(full, to_tile, num_stages=1):  # the last tile, where not full
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        tokens = _tokens(n, _block_ids(n, blocks, kept, KEY_BLOCK), kept, tail, KEY_BLOCK)
        top, total, acc = _attend_tile(
            query, factor, k, v, None, tokens, n < listed, real, inside, top, total, acc,
            k_n, v_n, 0, "none", PRECISION, HEAD_DIM < BLOCK_D, True,
        )  # fmt: skip

    place = head * rows + row
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    where = out + place[:, None] * HEAD_DIM
    tl.store(where, acc.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])
    if SHARED:
        tl.store(sums + place, top, mask=real)
        tl.store(sums + splits * plane + place, total, mask=real)
