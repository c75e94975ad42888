"""The equation of `ragged_sparse_attention`, one sequence and query head at a time, in float64.

keys = kept blocks + tail (a set);   out = softmax(scale * q K^T) V over keys
"""

import torch
from torch import Tensor

from focus_compile.kernels.attention.reference import softmax_or_zero
from focus_compile.kernels.sparse_attention.reference import key_set


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
    """See op.py. float64 inputs give a float64 result."""
    heads = q.shape[0]
    group = heads // k.shape[1]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for s in range(starts.shape[0] - 1):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        tail, length = int(candidates[s]) * key_block, min(int(lengths[s]), k.shape[2])
        keys = key_set(blocks[s].tolist(), [], tail, key_block, length)
        for h in range(heads):
            key, value = (cache[slot[s], h // group, keys].double() for cache in (k, v))
            weights = softmax_or_zero(scale * q[h, rows].double() @ key.T, None)
            out[h, rows] = (weights @ value).to(q.dtype)
    return out
