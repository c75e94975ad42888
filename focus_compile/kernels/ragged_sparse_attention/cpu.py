"""`ragged_sparse_attention` in plain torch: one sequence at a time, its kept keys gathered once."""

import torch
from torch import Tensor

from focus_compile.kernels.attention.cpu import attention
from focus_compile.kernels.sparse_attention.cpu import gather_keys


def ragged_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    candidates: Tensor,
    key_block: int,
    max_rows: int,
    scale: float,
) -> Tensor:
    """See op.py. Waits for the host on CUDA, where only float64 comes here.

    A sequence that keeps all blocks reads its cache in place, as in `ragged_attention`.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    bounds, offsets = starts.tolist(), torch.arange(key_block, device=k.device)
    lists = zip(slot.tolist(), lengths.tolist(), blocks, candidates.tolist(), strict=True)
    for s, (owned, length, ids, limit) in enumerate(lists):
        rows, length = slice(bounds[s], bounds[s + 1]), min(length, k.shape[2])
        if rows.stop == rows.start or length <= 0:
            continue
        key, value = k[owned, None], v[owned, None]
        kept = ids[ids >= 0]
        if kept.shape[0] < limit:
            of_blocks = (kept[:, None] * key_block + offsets).flatten()
            after = torch.arange(limit * key_block, length, device=k.device)
            key, value = gather_keys(key, value, torch.cat([of_blocks, after])[None])
        else:
            key, value = key[:, :, :length], value[:, :, :length]
        out[:, rows] = attention(q[None, :, rows], key, value, None, scale)[0]
    return out
