"""`compact_rows` in plain torch: count the kept rows, then look up where each count is reached."""

import torch
import torch.nn.functional as F
from torch import Tensor


def compact_rows(keep: Tensor, starts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """See op.py."""
    rows = torch.arange(keep.shape[0], device=keep.device)
    counts = F.pad((keep & (rows < starts[-1])).cumsum(0), (1, 0))  # below each row, [T + 1]
    wanted = torch.arange(1, capacity + 1, device=keep.device).minimum(counts[-1])
    index = torch.searchsorted(counts[1:], wanted)
    return index, counts[starts.long()].clamp(max=capacity).to(starts.dtype)
