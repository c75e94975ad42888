"""`select_rows` in Triton: one program a sequence, which ranks its rows by comparing them in pairs.

What a row needs of another comes from a reduction, a scan or the inputs, never from memory that the
program wrote itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SHORT = tl.constexpr(1 - 2.0**-40)  # as in cpu.py
_FAR = tl.constexpr(1 << 62)  # a position that no row has
_PAIRED = tl.constexpr(16)  # rows that all are compared to at once


def select_rows(
    delta: Tensor,
    masked: Tensor,
    positions: Tensor,
    starts: Tensor,
    target: Tensor,
    progress: Tensor,
    max_rows: int,
) -> Tensor:
    """See op.py."""
    rows, sequences = delta.shape[0], starts.shape[0] - 1
    out = torch.empty(rows, dtype=torch.bool, device=delta.device)
    if rows == 0 or sequences == 0:
        return out.zero_()
    masked, block = masked.view(torch.uint8), max(triton.next_power_of_2(max_rows), 16)
    with torch.cuda.device_of(delta):
        _select_kernel[(sequences,)](
            delta, masked, positions, starts.contiguous(), target, progress, out.view(torch.uint8),
            delta.stride(0), masked.stride(0), positions.stride(0),
            target.stride(0), progress.stride(0), rows,
            BLOCK=block,
            num_warps=max(block // 32, 1),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _select_kernel(  # type: ignore[no-untyped-def]
    delta, masked, positions, starts, target, progress, out,
    delta_t, masked_t, positions_t, target_s, progress_s, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, and its share of the padding."""
    s, sequences = tl.program_id(0), tl.num_programs(0)
    first = tl.load(starts + s).to(tl.int64)
    count = (tl.load(starts + s + 1) - first).to(tl.int32)
    r = tl.arange(0, BLOCK)
    real = r < count
    row = first + r
    hidden = real & (tl.load(masked + row * masked_t, mask=real, other=0) != 0)
    value = tl.load(delta + row * delta_t, mask=hidden, other=0.0)
    position = tl.load(positions + row * positions_t, mask=real, other=0)
    budget = tl.load(target + s * target_s)

    n = tl.sum(hidden.to(tl.int32), 0)
    exact = value.to(tl.float64)
    distance = tl.where(hidden, n * exact - tl.sum(exact, 0), 0.0)
    squares = distance * distance
    outlier = hidden & (distance >= 0) & (n * squares >= tl.sum(squares, 0) * _SHORT)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, _PAIRED):
        o = start + tl.arange(0, _PAIRED)
        other = tl.load(delta + (first + o) * delta_t, mask=o < count, other=0.0)
        counts = tl.load(masked + (first + o) * masked_t, mask=o < count, other=0) != 0
        level = (other[None, :] == value[:, None]) & (o[None, :] < r[:, None])
        above = (other[None, :] > value[:, None]) | level
        rank += tl.sum((above & counts[None, :]).to(tl.int32), 1)
    enough = tl.sum(outlier.to(tl.int32), 0) >= budget
    chosen = hidden & ((n <= budget) | (enough & outlier) | ((rank < budget) & (enough == 0)))

    # The first position at or after a row's that was chosen: its own, or the next one's, or later.
    nearest = tl.associative_scan(tl.where(chosen, position, _FAR), 0, _lower, reverse=True)
    kept = chosen | (hidden & (nearest - position == 1))
    kept = kept | (hidden & (tl.max(kept.to(tl.int32), 0) == 0))
    last = tl.max(tl.where(kept, position, -_FAR), 0)
    passed = (position < last) & (position > tl.load(progress + s * progress_s))
    kept = kept | (hidden & passed)
    tl.store(out + row, (kept | (hidden == 0)).to(tl.uint8), mask=real)

    end = tl.load(starts + sequences).to(tl.int64)
    for start in range(end + s * BLOCK, rows, sequences * BLOCK):
        tl.store(out + start + r, tl.zeros([BLOCK], tl.uint8), mask=start + r < rows)


@triton.jit
def _lower(a, b):  # type: ignore[no-untyped-def]
    return tl.minimum(a, b)
