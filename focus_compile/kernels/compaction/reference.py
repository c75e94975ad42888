"""What `compact_rows` says, one row at a time."""

import torch
from torch import Tensor


def compact_rows(keep: Tensor, starts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """See op.py."""
    bounds = starts.tolist()
    kept = [t for t in range(bounds[-1]) if keep[t]][:capacity]
    filler = kept[-1] if kept else 0
    index = kept + [filler] * (capacity - len(kept))
    counts = [sum(t < bound for t in kept) for bound in bounds]
    return (
        torch.tensor(index, dtype=torch.int64, device=keep.device),
        torch.tensor(counts, dtype=starts.dtype, device=keep.device),
    )
