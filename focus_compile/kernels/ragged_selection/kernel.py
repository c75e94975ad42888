"""`ragged_select_blocks` in Triton: the two programs of `select_blocks` over padded queries."""

from __future__ import annotations

import torch
from torch import Tensor

from focus_compile.kernels.block_selection.kernel import score
from focus_compile.kernels.ragged import padded_rows
from focus_compile.kernels.top_k import choose_highest


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
    sequences, kv_heads, blocks = starts.shape[0] - 1, summaries.shape[1], summaries.shape[2]
    if sequences == 0 or blocks == 0:
        return candidates.new_empty((sequences, blocks))
    parts = q.new_zeros((sequences, kv_heads, blocks), dtype=torch.float32)
    with torch.cuda.device_of(q):
        if q.shape[1] > 0:
            row, real = padded_rows(starts, q.shape[1], min(max_rows, q.shape[1]))
            # What padding rows hold must not count, not even as 0 * nan.
            queries = torch.where(real[None, ..., None], q[:, row], 0.0).transpose(0, 1)
            score(queries, torch.where(real, weight[row], 0.0), summaries, parts, slot)
        parts[:, :, :sinks] = torch.inf
        return choose_highest(parts, candidates, keep.clamp(min=sinks), blocks)
