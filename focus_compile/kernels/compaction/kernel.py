"""`compact_rows` in Triton, in one launch: a program a sequence, none of which waits for another.

Each counts the kept rows before its own by itself. That reads the list once a sequence, a byte a
row, all from the L2 cache; a scan handed from program to program would take longer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COUNTED = 4096  # rows that a program counts at a time
_PLACED = 256  # rows that it places, or slots that it fills


def compact_rows(keep: Tensor, starts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """See op.py."""
    index = torch.empty(capacity, dtype=torch.int64, device=keep.device)
    new_starts = torch.empty(starts.shape, dtype=starts.dtype, device=keep.device)
    keep = keep.view(torch.uint8)
    with torch.cuda.device_of(keep):
        _compact_kernel[(starts.shape[0],)](
            keep, starts.contiguous(), index, new_starts, keep.stride(0), capacity,
            COUNTED=min(max(triton.next_power_of_2(keep.shape[0]), 128), _COUNTED),
            PLACED=_PLACED,
            num_warps=4,
        )  # fmt: skip
    return index, new_starts


@triton.jit(do_not_specialize=["capacity"])
def _compact_kernel(  # type: ignore[no-untyped-def]
    keep, starts, index, new_starts, keep_t, capacity,
    COUNTED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Program s: new_starts[s], and the kept rows of sequence s; the last program: the filling."""
    s, sequences = tl.program_id(0), tl.num_programs(0) - 1
    first = tl.load(starts + s).to(tl.int64)
    counts = tl.zeros([COUNTED], tl.int32)
    last = tl.zeros([COUNTED], tl.int64)
    for start in range(0, first, COUNTED):
        row = start + tl.arange(0, COUNTED)
        kept = tl.load(keep + row * keep_t, mask=row < first, other=0) != 0
        counts += kept.to(tl.int32)
        last = tl.where(kept, row, last)
    count = tl.sum(counts, 0)
    new_start = tl.minimum(count, capacity)
    tl.store(new_starts + s, new_start.to(new_starts.dtype.element_ty))
    place = tl.arange(0, PLACED)
    if s < sequences:
        end = tl.load(starts + s + 1).to(tl.int64)
        for start in range(first, end, PLACED):
            row = start + place
            kept = (tl.load(keep + row * keep_t, mask=row < end, other=0) != 0).to(tl.int32)
            slot = count + tl.cumsum(kept, 0) - 1
            tl.store(index + slot, row, mask=(kept > 0) & (slot < capacity))
            count += tl.sum(kept, 0)
    else:
        filler = tl.max(last, 0)
        for from_slot in range(new_start, capacity, PLACED):
            slot = from_slot + place
            tl.store(index + slot, tl.zeros([PLACED], tl.int64) + filler, mask=slot < capacity)
