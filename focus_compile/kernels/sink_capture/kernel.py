"""`capture_sinks` in Triton: a program sums the probabilities of some keys in registers, over rows
and heads and without atomics; then the highest sums are chosen (see `top_k`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_compile.kernels.mask_view import mask_view
from focus_compile.kernels.tiling import padded
from focus_compile.kernels.top_k import choose_highest

_SHARED_MEMORY = 200 * 1024  # of one program on an H100
_PROGRAMS = 256  # at least so many, where keys and heads suffice


def capture_sinks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    count: int,
    scale: float,
) -> Tensor:
    """See op.py."""
    batch, length = k.shape[0], k.shape[2]
    if batch == 0 or length == 0 or count == 0:
        return limit.new_full((batch, count), -1)
    with torch.cuda.device_of(q):
        parts = attention_received(q, k, lse, weight, mask, limit, scale)
        return choose_highest(parts, limit, count, count)


def sink_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    scale: float,
) -> Tensor:
    """See op.py."""
    if k.shape[0] == 0 or k.shape[2] == 0:
        return torch.zeros((k.shape[0], k.shape[2]), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        return attention_received(q, k, lse, weight, mask, limit, scale).sum(1)


def keep_sinks(scores: Tensor, limit: Tensor, count: int) -> Tensor:
    """See op.py."""
    batch, length = scores.shape
    if batch == 0 or length == 0 or count == 0:
        return limit.new_full((batch, count), -1)
    with torch.cuda.device_of(scores):
        return choose_highest(scores.contiguous()[:, None], limit, count, count)


def attention_received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    scale: float,
) -> Tensor:
    """Attention received by every position below the limit, [B, P, T] float32.

    Summed over rows and over the heads of each of P parts. Beyond the limit it may be 0 instead.
    """
    return _received(q, k, lse, weight, mask, limit, None, scale)[0]


def attention_received_and_given(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    to: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention_received` by all positions, and what each row gives to the positions of `to`, bool
    [B, T]: [B, H, R] float32, not weighted."""
    everything = torch.full((q.shape[0],), k.shape[2], device=q.device)
    received, given = _received(q, k, lse, weight, mask, everything, to, scale)
    return received, given.sum(0)


def _received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    to: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention received [B, P, T], and given to `to` by key tile [tiles, B, H, R] (else empty)."""
    batch, heads, rows, width = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group = heads // kv_heads
    channels = padded(width)
    keys, row_tile = _tiles(channels * q.element_size(), length, group * rows)
    tiles = triton.cdiv(length, keys)
    heads_a_part = triton.cdiv(kv_heads, min(kv_heads, triton.cdiv(_PROGRAMS, batch * tiles)))
    parts = triton.cdiv(kv_heads, heads_a_part)
    out = torch.empty((batch, parts, length), dtype=torch.float32, device=q.device)
    given = out.new_empty((tiles, batch, heads, rows) if to is not None else 0)
    counted = out if to is None else to.contiguous().view(torch.uint8)
    kind, viewed = mask_view(mask, q, length)
    mask = q if viewed is None else viewed
    shared = kind == "none" or mask.stride(1) == mask.stride(2) == 0
    stage = (keys + row_tile) * channels * q.element_size()  # in bytes
    stage += 0 if shared else keys * row_tile * mask.element_size()
    _received_kernel[(tiles, parts, batch)](
        q, k, lse, weight, mask, limit, counted, out, given,
        rows, length, kv_heads, heads_a_part, scale * 1.4426950408889634,
        *q.stride(), *k.stride(), *lse.stride(), *weight.stride(), *mask.stride(), limit.stride(0),
        GROUP=group,
        WIDTH=width,
        MASK=kind,
        ONE_ROW_MASK=shared,
        GIVEN=to is not None,
        D=channels,
        ROWS=row_tile,
        KEYS=keys,
        STAGES=min(max(_SHARED_MEMORY // stage, 1), 3),
        num_warps=8 if keys * row_tile >= 8192 else 4,
    )  # fmt: skip
    return out, given


def _tiles(size: int, length: int, rows: int) -> tuple[int, int]:
    """(keys, rows) of a tile for rows of `size` bytes: at most 32 KiB of either, as powers of 2."""
    most = max(min(32768 // size, 128), 16)
    keys = min(max(triton.next_power_of_2(length), 16), most)
    return keys, min(max(triton.next_power_of_2(rows), 16), most)


@triton.jit
def _received_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    to_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    given_ptr: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    kv_heads: tl.tensor,
    heads_a_part: tl.tensor,
    scale: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_r: tl.tensor,
    q_d: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_t: tl.tensor,
    k_d: tl.tensor,
    lse_b: tl.tensor,
    lse_h: tl.tensor,
    lse_r: tl.tensor,
    weight_b: tl.tensor,
    weight_r: tl.tensor,
    mask_b: tl.tensor,
    mask_h: tl.tensor,
    mask_r: tl.tensor,
    mask_t: tl.tensor,
    limit_b: tl.tensor,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    ONE_ROW_MASK: tl.constexpr,
    GIVEN: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """KEYS positions of one sequence, over `heads_a_part` kv heads and their packed query rows.

    The scale, the mask and the log-sum-exps are in powers of two. Rows without keys and rows that
    pad a tile have a log-sum-exp of +inf: their probabilities are 0.
    """
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * KEYS
    key = start + tl.arange(0, KEYS)
    channel = tl.arange(0, D)
    k_ptr += b * k_b + start.to(tl.int64) * k_t
    mask_ptr += b * mask_b + start.to(tl.int64) * mask_t
    key_place = tl.arange(0, KEYS)[:, None] * k_t + channel[None, :] * k_d
    key_inside = (key < length)[:, None] & (channel < WIDTH)[None, :]
    if ONE_ROW_MASK:
        if MASK != "none":
            places = tl.arange(0, KEYS).to(tl.int64) * mask_t
            key_bias = bias(mask_ptr + places, key < length, MASK)[:, None]

    if GIVEN:
        counts = tl.load(to_ptr + b * length + key, mask=key < length, other=0).to(tl.float32)
        given_ptr += (
            (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + b) * kv_heads * GROUP * rows
        )
    packed_rows = GROUP * rows
    row_tiles = tl.cdiv(packed_rows, ROWS)
    work = tl.minimum(heads_a_part, kv_heads - part * heads_a_part) * row_tiles
    limit = tl.load(limit_ptr + b * limit_b)
    work = tl.where(start < limit, work, 0)
    received = tl.zeros([KEYS], tl.float32)
    for step in tl.range(0, work, num_stages=STAGES):
        kv_head = part * heads_a_part + step // row_tiles
        packed = step % row_tiles * ROWS + tl.arange(0, ROWS)
        real = packed < packed_rows
        head = kv_head * GROUP + packed // rows
        row = packed % rows
        keys = tl.load(k_ptr + kv_head.to(tl.int64) * k_h + key_place, mask=key_inside, other=0.0)
        queries = tl.load(
            q_ptr
            + b * q_b
            + (head.to(tl.int64) * q_h + row.to(tl.int64) * q_r)[:, None]
            + channel[None, :] * q_d,
            mask=real[:, None] & (channel < WIDTH)[None, :],
            other=0.0,
        )
        lse_place = b * lse_b + head * lse_h + row * lse_r
        lse = tl.load(lse_ptr + lse_place, mask=real, other=float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), base_2(lse))
        weight = tl.load(weight_ptr + b * weight_b + row * weight_r, mask=real, other=0.0)
        logits = tl.dot(keys, tl.trans(queries), input_precision="tf32x3") * scale
        if MASK != "none":
            if ONE_ROW_MASK:
                logits += key_bias
            else:
                of_row = head.to(tl.int64) * mask_h + row.to(tl.int64) * mask_r
                places = tl.arange(0, KEYS).to(tl.int64)[:, None] * mask_t + of_row[None, :]
                inside = (key < length)[:, None] & real[None, :]
                logits += bias(mask_ptr + places, inside, MASK)
        probability = tl.exp2(logits - lse[None, :])
        received += tl.sum(probability * weight.to(tl.float32)[None, :], 1)
        if GIVEN:
            given = tl.sum(probability * counts[:, None], 0)
            tl.store(given_ptr + head * rows + row, given, mask=real)
    place = (b * tl.num_programs(1) + part) * length + key
    tl.store(parts_ptr + place, received, mask=key < length)


@triton.jit
def bias(mask_ptr: tl.tensor, inside: tl.tensor, MASK: tl.constexpr) -> tl.tensor:
    """What a mask adds to logits in powers of two."""
    value = tl.load(mask_ptr, mask=inside, other=0)
    if MASK == "bool":
        return tl.where(value != 0, 0.0, -float("inf"))
    value = value.to(tl.float32)
    return tl.where(value == -float("inf"), value, base_2(value))


@triton.jit
def base_2(value: tl.tensor) -> tl.tensor:
    """Finite logits in powers of two. Masks reach down to finfo.min, which must stay finite."""
    return tl.maximum(value * 1.4426950408889634, -3.0e38)
