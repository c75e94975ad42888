"""`select_blocks` in Triton: a program pools the queries of one kv head and streams a share of its
summaries past them, then one program a sequence chooses (see `top_k`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_compile.kernels.top_k import choose_highest

_PROGRAMS = 264  # score at a time: two for each multiprocessor of an H100
_WARPS = 4
_TILE_BYTES = 8192  # of summaries that a program asks for at once
_STAGES = 4


def select_blocks(
    q: Tensor, weight: Tensor, summaries: Tensor, candidates: Tensor, keep: Tensor
) -> Tensor:
    """See op.py."""
    batch, kv_heads, blocks, _ = summaries.shape
    if batch == 0 or blocks == 0:
        return candidates.new_empty((batch, blocks))
    parts = torch.empty((batch, kv_heads, blocks), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        score(q, weight, summaries, parts)
        return choose_highest(parts, candidates, keep, blocks)


def block_relevance(q: Tensor, weight: Tensor, summaries: Tensor) -> Tensor:
    """See op.py."""
    batch, kv_heads, blocks, _ = summaries.shape
    parts = torch.empty((batch, kv_heads, blocks), dtype=torch.float32, device=q.device)
    if batch and blocks:
        with torch.cuda.device_of(q):
            score(q, weight, summaries, parts)
    return parts.sum(1)


def keep_blocks(relevance: Tensor, candidates: Tensor, keep: Tensor) -> Tensor:
    """See op.py."""
    batch, blocks = relevance.shape
    if batch == 0 or blocks == 0:
        return candidates.new_empty((batch, blocks))
    with torch.cuda.device_of(relevance):
        return choose_highest(relevance.contiguous()[:, None], candidates, keep, blocks)


def score(
    q: Tensor, weight: Tensor, summaries: Tensor, parts: Tensor, slot: Tensor | None = None
) -> None:
    """Relevance of every block to each kv head's queries, into parts [B, Hkv, NB] float32.

    slot: [B] int64, where each sequence's summaries are; None: at its own index."""
    batch, heads, rows, width = q.shape
    _, kv_heads, blocks, wide = summaries.shape
    group = heads // kv_heads
    padded = triton.next_power_of_2(width)
    tile = max(_TILE_BYTES // (padded * q.element_size() * (wide // width)), 1)
    tiles = triton.cdiv(blocks, tile)
    shares = min(triton.cdiv(_PROGRAMS, batch * kv_heads), tiles)
    _score_kernel[(shares, kv_heads, batch)](
        q, weight, summaries, parts, None if slot is None else slot.contiguous(),
        rows, blocks, triton.cdiv(tiles, shares) * tile,
        *q.stride(), *weight.stride(), *summaries.stride(),
        GROUP=group,
        WIDTH=width,
        BOUND=wide != width,
        D=padded,
        ROWS=min(max(triton.next_power_of_2(group * rows), 1), max(4096 // padded, 1)),
        BLOCKS=tile,
        STAGES=_STAGES,
        num_warps=_WARPS,
    )  # fmt: skip


@triton.jit
def _score_kernel(
    q_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    summaries_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    slot_ptr: tl.tensor | None,
    rows: tl.tensor,
    blocks: tl.tensor,
    share: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_r: tl.tensor,
    q_d: tl.tensor,
    weight_b: tl.tensor,
    weight_r: tl.tensor,
    summaries_b: tl.tensor,
    summaries_h: tl.tensor,
    summaries_j: tl.tensor,
    summaries_d: tl.tensor,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BOUND: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Relevance of a share of the blocks to one kv head's queries, into parts [B, Hkv, NB]."""
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D)
    positive = tl.zeros([ROWS, D], tl.float32)
    negative = tl.zeros([ROWS, D], tl.float32)
    head_ptr = q_ptr + b * q_b + head.to(tl.int64) * GROUP * q_h
    for start in tl.range(0, GROUP * rows, ROWS):
        packed = start + tl.arange(0, ROWS)
        real = packed < GROUP * rows
        row = packed % rows
        query = tl.load(
            head_ptr
            + ((packed // rows).to(tl.int64) * q_h + row.to(tl.int64) * q_r)[:, None]
            + channel[None, :] * q_d,
            mask=real[:, None] & (channel < WIDTH)[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = tl.load(weight_ptr + b * weight_b + row * weight_r, mask=real, other=0.0)
        weight = weight.to(tl.float32)[:, None]
        if BOUND:
            positive += weight * tl.maximum(query, 0.0)
            negative += weight * tl.minimum(query, 0.0)
        else:
            positive += weight * query

    pooled = tl.sum(positive, 0)[None, :]
    if BOUND:
        pooled_negative = tl.sum(negative, 0)[None, :]
    heads = tl.num_programs(1)
    sequence_ptr = parts_ptr + b * heads * blocks
    owned = b
    if slot_ptr is not None:
        owned = tl.load(slot_ptr + b)
    summary_ptr = summaries_ptr + owned * summaries_b + head.to(tl.int64) * summaries_h
    summary_ptr += channel[None, :] * summaries_d
    first_block = tl.program_id(0) * share
    for start in tl.range(
        first_block, tl.minimum(first_block + share, blocks), BLOCKS, num_stages=STAGES
    ):
        block = start + tl.arange(0, BLOCKS)
        place = block.to(tl.int64)[:, None] * summaries_j
        inside = (block < blocks)[:, None] & (channel < WIDTH)[None, :]
        summary = tl.load(summary_ptr + place, mask=inside, other=0.0)
        product = summary.to(tl.float32) * pooled
        if BOUND:
            lowest_ptr = summary_ptr + WIDTH * summaries_d
            lowest = tl.load(lowest_ptr + place, mask=inside, other=0.0)
            product += lowest.to(tl.float32) * pooled_negative
        tl.store(sequence_ptr + head * blocks + block, tl.sum(product, 1), mask=block < blocks)
