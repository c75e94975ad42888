"""`ragged_attention` in plain torch: `attention` of one sequence at a time, the cache in place."""

import torch
from torch import Tensor

from focus_compile.kernels.attention.cpu import attention


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_rows: int,
    scale: float,
) -> Tensor:
    """See op.py. Waits for the host on CUDA, where only float64 comes here.

    A sequence's keys are a view of its slot, so that none is copied and none is masked.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    bounds = starts.tolist()
    for first, end, owned, length in zip(
        bounds[:-1], bounds[1:], slot.tolist(), lengths.tolist(), strict=True
    ):
        if end > first and length > 0:
            rows, keys = slice(first, end), slice(0, length)
            key, value = k[owned, None, :, keys], v[owned, None, :, keys]
            out[:, rows] = attention(q[None, :, rows], key, value, None, scale)[0]
    return out
