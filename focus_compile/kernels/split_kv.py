"""Attention of few query rows over a long cache, split over the keys, in Triton.

One program takes a tile of query rows of one kv head and one share of its keys, so that a handful
of rows still occupies the whole device ("flash decoding"); a second kernel joins the shares. The
rows of all query heads that share a kv head form one axis of M = H // Hkv * R rows: packed row m is
row m // group of query head kv_head * group + m % group. K and V are read where they lie, once a
tile of rows. What is read is a list of N positions that only the device knows: all T tokens, or
[kept blocks][tail][sinks] of a `KeyList`. Grid, shares and compiled code depend on shapes alone, so
a call can be captured in a CUDA graph. After FlashAttention-2 (arXiv 2307.08691).
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_compile.kernels.mask_view import mask_view
from focus_compile.kernels.tiling import Tiling, choose_tiling, device_limits, padded

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Float masks reach down to finfo.min, which must stay finite in base 2; only -inf hides a key.
LOWEST = tl.constexpr(-2.0e38)
COUNT_CHUNK = tl.constexpr(1024)
SINK_TILE = tl.constexpr(16)
SINK_CHUNK = tl.constexpr(128)


@dataclass(frozen=True)
class KeyList:
    """The keys of `sparse_attention`: blocks [B, NB], sinks [B, any] and candidates [B], int64."""

    blocks: Tensor
    sinks: Tensor
    candidates: Tensor
    key_block: int


def tiling_for(q: Tensor, k: Tensor, mask: Tensor | None) -> Tiling:
    """What `attend` takes for these tensors."""
    batch, heads, rows, width = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    return choose_tiling(
        batch * kv_heads,
        heads // kv_heads * rows,
        length,
        width,
        q.element_size(),
        mask is not None,
        device_limits(q.device),
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    keys: KeyList | None = None,
    lse: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """`attention`, or with `keys` `sparse_attention`; see their op.py.

    Args:
        lse: contiguous [B, H, R] float32 to receive what `attention_with_lse` returns.
        tiling: in place of `tiling_for`'s.

    Returns:
        [B, H, R, d], dtype of q, contiguous.
    """
    batch, heads, rows, width = q.shape
    out = q.new_empty(q.shape)
    if batch * heads * rows == 0:
        return out
    tiling = tiling or tiling_for(q, k, mask)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if tiling.splits == 1:
            _launch(q, k, v, mask, scale, keys, out, None, lse, tiling)
            return out
        shape = (tiling.splits, batch, heads, rows)
        parts = q.new_empty((*shape, width), dtype=torch.float32)
        sums = q.new_empty((2, *shape), dtype=torch.float32)
        _launch(q, k, v, mask, scale, keys, parts, sums, None, tiling)
        _launch_join(parts, sums, out, lse)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    keys: KeyList | None,
    out: Tensor,
    sums: Tensor | None,
    lse: Tensor | None,
    tiling: Tiling,
) -> None:
    batch, heads, rows, width = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    if scale < 0:  # the kernel takes the highest score before it scales
        q, scale = -q, -scale
    kind, mask = mask_view(mask, q, length)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    blocks = sinks = candidates = None
    block_slots = sink_slots = key_block = 0
    if keys is not None:
        blocks, sinks = keys.blocks.contiguous(), keys.sinks.contiguous()
        candidates = keys.candidates.contiguous()
        block_slots, sink_slots, key_block = blocks.shape[1], sinks.shape[1], keys.key_block
    row_tiles = triton.cdiv(heads // kv_heads * rows, tiling.block_m)
    _attend_share[(row_tiles, tiling.splits, batch * kv_heads)](
        *(q, k, v, mask, blocks, sinks, candidates, out, sums, lse),
        *(*q.stride(), *k.stride(), *v.stride(), *mask_strides),
        *(rows, length, block_slots, sink_slots, kv_heads, scale),
        GROUP=heads // kv_heads,
        HEAD_DIM=width,
        BLOCK_D=padded(width),
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        KEY_BLOCK=key_block,
        MASK=kind,
        SHARED=sums is not None,
        WANT_LSE=lse is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def _launch_join(parts: Tensor, sums: Tensor, out: Tensor, lse: Tensor | None) -> None:
    splits, width = parts.shape[0], parts.shape[4]
    rows = sums[0, 0].numel()
    block_d = padded(width)
    block_rows = max(1, 512 // block_d)
    _join_shares[(triton.cdiv(rows, block_rows),)](
        *(parts, sums, out, lse, rows),
        SPLITS=splits,
        HEAD_DIM=width,
        BLOCK_D=block_d,
        BLOCK_ROWS=block_rows,
        WANT_LSE=lse is not None,
        num_warps=4,
    )


# fmt: off
@triton.jit(do_not_specialize=[
    "m_b", "m_h", "m_r", "rows", "length", "block_slots", "sink_slots", "kv_heads",
])
def _attend_share(  # type: ignore[no-untyped-def]
    q, k, v, mask, blocks, sinks, candidates, out, sums, lse,
    q_b, q_h, q_r, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, m_b, m_h, m_r, m_t,
    rows, length, block_slots, sink_slots, kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr,
    MASK: tl.constexpr, SHARED: tl.constexpr, WANT_LSE: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Attend from one tile of packed rows to one share of the keys. KEY_BLOCK 0: all T tokens.

    out [splits, B, H, R, d] receives the share's own result. If SHARED, sums [2, splits, B, H, R]
    receives the highest score, in base 2, and the sum of exp2(score - highest).
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = packed < GROUP * rows
    row, head = (packed // GROUP).to(tl.int64), kv_head * GROUP + packed % GROUP
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    query = tl.load(
        q + batch * q_b + (head * q_h + row * q_r)[:, None] + d[None, :] * q_d,
        mask=real[:, None] & inside[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    factor = scale * LOG2_E
    k += batch * k_b + kv_head * k_h + d[None, :] * k_d
    v += batch * v_b + kv_head * v_h + d[None, :] * v_d
    if MASK != "none":
        mask += batch * m_b + (head * m_h + row * m_r)[:, None]

    kept, tail, listed = 0, 0, length
    if KEY_BLOCK > 0:
        blocks += batch * block_slots
        sinks += batch * sink_slots
        kept = _count_kept(blocks, block_slots)
        tail = tl.maximum(tl.minimum(tl.load(candidates + batch) * KEY_BLOCK, length), 0)
        tail = tail.to(tl.int32)
        listed = kept * KEY_BLOCK + length - tail
    sink_tiles = tl.cdiv(sink_slots, SINK_TILE)
    tiles = sink_tiles + tl.cdiv(listed, BLOCK_N)
    first, last = split * tiles // splits, (split + 1) * tiles // splits
    start, end = tl.maximum(first - sink_tiles, 0), tl.maximum(last - sink_tiles, 0)
    full = tl.maximum(tl.minimum(end, listed // BLOCK_N), start)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = start * BLOCK_N + tl.arange(0, BLOCK_N)
    ids = _block_ids(n, blocks, kept, KEY_BLOCK)
    for _ in range(start, full):
        ahead = _block_ids(n + BLOCK_N, blocks, kept, KEY_BLOCK)  # a tile before K waits for it
        tokens = _tokens(n, ids, kept, tail, KEY_BLOCK)
        top, total, acc = _attend_tile(
            query, factor, k, v, mask, tokens, n >= 0, real, inside, top, total, acc,
            k_t, v_t, m_t, MASK, PRECISION, HEAD_DIM < BLOCK_D, False,
        )  # fmt: skip
        n += BLOCK_N  # carried: from the tile's number, Triton 3.9 would not pipeline the loop
        ids = ahead
    for tile in tl.range(full, end, num_stages=1):  # the last tile of the list, where not full
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tokens = _tokens(n, _block_ids(n, blocks, kept, KEY_BLOCK), kept, tail, KEY_BLOCK)
        top, total, acc = _attend_tile(
            query, factor, k, v, mask, tokens, n < listed, real, inside, top, total, acc,
            k_t, v_t, m_t, MASK, PRECISION, HEAD_DIM < BLOCK_D, True,
        )  # fmt: skip
    if KEY_BLOCK > 0:
        for tile in tl.range(first, tl.minimum(last, sink_tiles), num_stages=1):
            slot = tile * SINK_TILE + tl.arange(0, SINK_TILE)
            tokens = tl.load(sinks + slot, mask=slot < sink_slots, other=-1)
            new = _is_new(tokens, slot, sinks, sink_slots, blocks, kept, tail, KEY_BLOCK)
            top, total, acc = _attend_tile(
                query, factor, k, v, mask, tokens, new, real, inside, top, total, acc,
                k_t, v_t, m_t, MASK, PRECISION, HEAD_DIM < BLOCK_D, True,
            )  # fmt: skip

    shared_rows = (tl.num_programs(2) * GROUP).to(tl.int64) * rows
    place = (batch * kv_heads * GROUP + head) * rows + row + split * shared_rows
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    where = place[:, None] * HEAD_DIM + d[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])
    if SHARED:
        tl.store(sums + place, top, mask=real)
        tl.store(sums + splits * shared_rows + place, total, mask=real)
    if WANT_LSE:
        found = tl.where(total > 0, (top + tl.log2(divisor)) * LN_2, -float("inf"))
        tl.store(lse + place, found, mask=real)


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    query, factor, k, v, mask, tokens, valid, real, inside, top, total, acc, k_t, v_t, m_t,
    MASK: tl.constexpr, PRECISION: tl.constexpr, PADDED: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Fold the keys `tokens` [BLOCK_N], where `valid` (looked at if PARTIAL), into the softmax."""
    keys = _load_rows(k + tokens[:, None] * k_t, valid, inside, PADDED, PARTIAL)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASK == "none" and not PARTIAL:
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_top[:, None])
        shrink = tl.exp2(top - new_top)
    else:
        scores = scores * factor
        if MASK == "bool":
            seen = real[:, None] & valid[None, :]
            shown = tl.load(mask + tokens[None, :] * m_t, mask=seen, other=0)
            scores = tl.where(shown != 0, scores, -float("inf"))
        if MASK == "float":
            seen = real[:, None] & valid[None, :]
            bias = tl.load(mask + tokens[None, :] * m_t, mask=seen, other=0.0).to(tl.float32)
            hidden = bias == -float("inf")
            scores += tl.where(hidden, bias, tl.maximum(bias, LOWEST) * LOG2_E)
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row without keys so far
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    values = _load_rows(v + tokens[:, None] * v_t, valid, inside, PADDED, PARTIAL)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    pointers, valid, inside, PADDED: tl.constexpr, PARTIAL: tl.constexpr
):
    """[BLOCK_N, BLOCK_D]; zeros, not memory's contents, where a key is not `valid`."""
    if PARTIAL:
        return tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0)
    elif PADDED:
        return tl.load(pointers, mask=inside[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _count_kept(blocks, slots):  # type: ignore[no-untyped-def]
    """How many of the ids are not negative."""
    count = tl.zeros([COUNT_CHUNK], tl.int32)
    for start in range(0, slots, COUNT_CHUNK):
        slot = start + tl.arange(0, COUNT_CHUNK)
        count += (tl.load(blocks + slot, mask=slot < slots, other=-1) >= 0).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _block_ids(n, blocks, kept, KEY_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The kept block that position n of the list lies in; 0 beyond the kept blocks."""
    if KEY_BLOCK > 0:
        place = n // KEY_BLOCK
        return tl.load(blocks + place, mask=place < kept, other=0)
    else:
        return n


@triton.jit
def _tokens(n, ids, kept, tail, KEY_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The cache position, int64, of position n of [kept blocks][tail]."""
    if KEY_BLOCK > 0:
        after = n - kept * KEY_BLOCK
        return tl.where(after < 0, ids * KEY_BLOCK + n % KEY_BLOCK, (tail + after).to(tl.int64))
    else:
        return n.to(tl.int64)


@triton.jit
def _is_new(  # type: ignore[no-untyped-def]
    sink, slot, sinks, sink_slots, blocks, kept, tail, KEY_BLOCK: tl.constexpr
):
    """Whether a sink is one, and in no kept block, not in the tail and not the same as earlier."""
    chunk = tl.arange(0, SINK_CHUNK)
    known = tl.zeros([SINK_TILE, SINK_CHUNK], tl.int32)
    for start in range(0, kept, SINK_CHUNK):
        ids = tl.load(blocks + start + chunk, mask=start + chunk < kept, other=-1)
        known |= ((sink // KEY_BLOCK)[:, None] == ids[None, :]).to(tl.int32)
    before = tl.minimum(tl.max(slot), sink_slots)
    for start in range(0, before, SINK_CHUNK):
        earlier = start + chunk[None, :] < slot[:, None]
        other = tl.load(sinks + start + chunk, mask=start + chunk < before, other=-1)
        known |= (earlier & (sink[:, None] == other[None, :])).to(tl.int32)
    return (sink >= 0) & (sink < tail) & (tl.max(known, 1) == 0)


@triton.jit(do_not_specialize=["rows"])
def _join_shares(  # type: ignore[no-untyped-def]
    parts, sums, out, lse, rows,
    SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, WANT_LSE: tl.constexpr,
):  # fmt: skip
    """out [B H R, d] = the mean of parts [splits, B H R, d], weighted as `sums` say."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = row < rows
    d = tl.arange(0, BLOCK_D)
    keep = real[:, None] & (d < HEAD_DIM)[None, :]
    where = row[:, None] * HEAD_DIM + d[None, :]
    step = rows.to(tl.int64)
    top = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        highest = tl.load(sums + split * step + row, mask=real, other=-float("inf"))
        top = tl.maximum(top, highest)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for split in tl.static_range(SPLITS):
        highest = tl.load(sums + split * step + row, mask=real, other=-float("inf"))
        weight = tl.load(sums + (SPLITS + split) * step + row, mask=real, other=0.0)
        weight *= tl.exp2(highest - base)
        part = tl.load(parts + split * step * HEAD_DIM + where, mask=keep, other=0.0)
        total += weight
        acc += weight[:, None] * part
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=keep)
    if WANT_LSE:
        found = tl.where(total > 0, (base + tl.log2(divisor)) * LN_2, -float("inf"))
        tl.store(lse + row, found, mask=real)
