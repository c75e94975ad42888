"""The equation of `importance`, one sequence, head and query at a time, in float64.

importance_j = sum over heads and queries of softmax_j(max of the scores j - 1, j and j + 1)
"""

from itertools import pairwise

import torch
from torch import Tensor


def importance(
    q: Tensor, k: Tensor, masked: Tensor, starts: Tensor, max_rows: int, scale: float
) -> Tensor:
    """See op.py."""
    return exact(q, k, masked, starts, scale).float()


def exact(q: Tensor, k: Tensor, masked: Tensor, starts: Tensor, scale: float) -> Tensor:
    """[T] float64."""
    heads, rows, _ = q.shape
    group = heads // k.shape[0]
    out = torch.zeros(rows, dtype=torch.float64, device=q.device)
    bounds = starts.tolist()
    for first, end in pairwise(bounds):
        chosen = [t for t in range(first, end) if masked[t]]
        for h in range(heads):
            for i in chosen:
                scores = scale * k[h // group, chosen].double() @ q[h, i].double()  # [n]
                around = [scores[max(j - 1, 0) : j + 2].max() for j in range(len(chosen))]
                out[chosen] += torch.stack(around).softmax(0)
    return out
