"""The equation of `ragged_select_blocks`, one sequence at a time, in float64.

kept = the first blocks, then those of highest relevance (see block_selection/reference.py)
"""

import torch
from torch import Tensor

from focus_compile.kernels.block_selection.reference import highest, relevance


def ragged_select_blocks(
    q: Tensor,
    weight: Tensor,
    summaries: Tensor,
    slot: Tensor,
    starts: Tensor,
    candidates: Tensor,
    keep: Tensor,
    sinks: int,
    max_rows: int,
) -> Tensor:
    """See op.py."""
    kept = torch.full((starts.shape[0] - 1, summaries.shape[2]), -1, device=q.device)
    for s in range(starts.shape[0] - 1):
        rows, limit = slice(int(starts[s]), int(starts[s + 1])), int(candidates[s])
        scores = relevance(q[None, :, rows], weight[None, rows], summaries[slot[s]][None])[0]
        first = list(range(min(sinks, limit)))
        rest = highest(scores[len(first) : limit].tolist(), int(keep[s]) - len(first))
        chosen = first + [len(first) + at for at in rest]
        kept[s, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return kept
