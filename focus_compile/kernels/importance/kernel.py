"""`importance` in Triton: a program scores the rows of one sequence for a few query heads on the
matrix units; a second kernel adds the heads, always in one order.

Masked rows are not gathered into a list. The pooled score of a key is the highest of three
products: with itself, and with the masked keys before and after it, wherever they are. So a tile is
never shifted inside registers, at the price of three products of at most 256 keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_compile.kernels.importance import cpu
from focus_compile.kernels.split_kv import LOG2_E
from focus_compile.kernels.tiling import SCRATCH, device_limits, padded

_SUMMED = 4096  # partial results that a program of the second kernel holds


def importance(
    q: Tensor, k: Tensor, masked: Tensor, starts: Tensor, max_rows: int, scale: float
) -> Tensor:
    """See op.py."""
    heads, rows, width = q.shape
    kv_heads, sequences = k.shape[0], starts.shape[0] - 1
    out = torch.empty(rows, dtype=torch.float32, device=q.device)
    if rows == 0 or sequences == 0 or heads == 0:
        return out.zero_()
    keys, queries, warps = _tile(max_rows, q)
    limits = device_limits(q.device)
    tiles = (3 * keys + queries) * padded(width) * q.element_size()
    if tiles + SCRATCH > limits.shared_memory:
        return cpu.importance(q, k, masked, starts, max_rows, scale)
    # Heads that share keys go to one program where the sequences alone fill the device.
    group = heads // kv_heads
    shared = group if sequences * kv_heads >= 2 * limits.multiprocessors else 1
    shares = heads // shared
    parts = torch.empty((shares, rows), dtype=torch.float32, device=q.device)
    masked, starts = masked.view(torch.uint8), starts.contiguous()
    with torch.cuda.device_of(q):
        _score_kernel[(shares, sequences)](
            q, k, masked, starts, parts,
            *q.stride(), *k.stride(), masked.stride(0), rows, scale,
            HEADS=shared,
            GROUP=group,
            WIDTH=width,
            D=padded(width),
            KEYS=keys,
            QUERIES=queries,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=warps,
            num_stages=1,
        )  # fmt: skip
        together = triton.next_power_of_2(shares)
        block = max(_SUMMED // together, 16)
        _sum_kernel[(triton.cdiv(rows, block),)](
            parts, masked, starts, out, masked.stride(0), rows, sequences, shares,
            SHARES=together,
            BLOCK=block,
            num_warps=4,
        )  # fmt: skip
    return out


def _tile(max_rows: int, q: Tensor) -> tuple[int, int, int]:
    """(keys, queries, warps) of a tile.

    float32 is multiplied outside the matrix units, from registers, which hold 4 scores a thread.
    """
    keys = padded(max_rows)
    if q.element_size() == 4:
        return keys, 16, min(max(keys // 8, 4), 16)
    return keys, min(keys, 64) if keys < 256 else 32, 4 if keys <= 64 else 8


@triton.jit(do_not_specialize=["rows"])
def _score_kernel(  # type: ignore[no-untyped-def]
    q, k, masked, starts, parts,
    q_h, q_t, q_d, k_h, k_t, k_d, masked_t, rows, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts [H / HEADS, T]: the importance of one sequence's masked rows to HEADS query heads."""
    share, s = tl.program_id(0), tl.program_id(1)
    first = tl.load(starts + s).to(tl.int64)
    count = (tl.load(starts + s + 1) - first).to(tl.int32)
    masked += first * masked_t
    j = tl.arange(0, KEYS)
    real = tl.load(masked + j * masked_t, mask=j < count, other=0) != 0
    left = tl.load(masked + (j - 1) * masked_t, mask=(j > 0) & (j <= count), other=0) != 0
    right = tl.load(masked + (j + 1) * masked_t, mask=j + 1 < count, other=0) != 0
    before = tl.associative_scan(tl.where(left, j - 1, -1), 0, _higher)
    after = tl.associative_scan(tl.where(right, j + 1, KEYS), 0, _lower, reverse=True)
    has_before, has_after = real & (before >= 0), real & (after < KEYS)

    d = tl.arange(0, D)
    inside = d < WIDTH
    k += (share * HEADS // GROUP).to(tl.int64) * k_h + first * k_t + d[None, :] * k_d
    own = _load_rows(k, j, k_t, real, inside)
    earlier = _load_rows(k, before, k_t, has_before, inside)
    later = _load_rows(k, after, k_t, has_after, inside)
    factor = scale * LOG2_E
    total = tl.zeros([KEYS], tl.float32)
    for h in range(HEADS):
        queries = q + (share * HEADS + h).to(tl.int64) * q_h + first * q_t + d[None, :] * q_d
        for start in range(0, count, QUERIES):
            i = start + tl.arange(0, QUERIES)
            asks = tl.load(masked + i * masked_t, mask=i < count, other=0) != 0
            query = _load_rows(queries, i, q_t, asks, inside)
            pooled = _scores(query, own, factor, real, PRECISION)
            pooled = tl.maximum(pooled, _scores(query, earlier, factor, has_before, PRECISION))
            pooled = tl.maximum(pooled, _scores(query, later, factor, has_after, PRECISION))
            highest = tl.max(pooled, 1)
            base = tl.where(highest == -float("inf"), 0.0, highest)  # nothing is masked
            weights = tl.exp2(pooled - base[:, None])
            divisor = tl.where(asks, tl.sum(weights, 1), 1.0)
            weights = tl.where(asks[:, None], weights / divisor[:, None], 0.0)
            total += tl.sum(weights, 0)
    tl.store(parts + share.to(tl.int64) * rows + first + j, total, mask=real)


@triton.jit
def _load_rows(pointers, row, stride, valid, inside):  # type: ignore[no-untyped-def]
    """[rows, D] from pointers [1, D]; zeros where a row is not `valid`."""
    pointers += row.to(tl.int64)[:, None] * stride
    return tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    query, keys, factor, valid, PRECISION: tl.constexpr
):
    """[queries, keys] in base 2; -inf where a key is not `valid`."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * factor
    return tl.where(valid[None, :], scores, -float("inf"))


@triton.jit
def _higher(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b)


@triton.jit
def _lower(a, b):  # type: ignore[no-untyped-def]
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["rows", "sequences", "shares"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    parts, masked, starts, out, masked_t, rows, sequences, shares,
    SHARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T] = the sum of parts [shares, T] in masked rows, 0 in others and in padding."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(starts + sequences)
    counts = (tl.load(masked + t * masked_t, mask=t < rows, other=0) != 0) & (t < end)
    share = tl.arange(0, SHARES)
    found = tl.load(
        parts + share.to(tl.int64)[:, None] * rows + t[None, :],
        mask=(share < shares)[:, None] & counts[None, :],
        other=0.0,
    )
    tl.store(out + t, tl.sum(found, 0), mask=t < rows)
