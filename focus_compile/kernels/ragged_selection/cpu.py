"""`ragged_select_blocks` in plain torch: one sequence at a time, none where all blocks are kept."""

import torch
from torch import Tensor

from focus_compile.kernels.block_selection.cpu import highest, relevance


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
    """See op.py. Waits for the host on CUDA, where only float64 comes here."""
    bounds = starts.tolist()
    kept = candidates.new_full((len(bounds) - 1, summaries.shape[2]), -1)
    lists = zip(slot.tolist(), candidates.tolist(), keep.tolist(), strict=True)
    for s, (owned, limit, count) in enumerate(lists):
        if count >= limit:
            kept[s, :limit] = torch.arange(limit, device=q.device)
            continue
        rows = slice(bounds[s], bounds[s + 1])
        scores = relevance(q[None, :, rows], weight[None, rows], summaries[owned, None, :, :limit])[
            0
        ]
        scores[:sinks] = torch.inf
        chosen = highest(scores, max(count, min(sinks, limit)))
        kept[s, : chosen.shape[0]] = chosen
    return kept
