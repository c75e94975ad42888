"""The equation of `attention`, one query head of one sequence at a time, in float64.

out = softmax(scale * q k^T + mask) v
"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See op.py. float64 inputs give a float64 result."""
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    if mask is not None:
        mask = mask.expand(batch, heads, rows, k.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b in range(batch):
        for h in range(heads):
            logits = scale * q[b, h].double() @ k[b, h // group].double().T  # [R, T]
            weights = softmax_or_zero(logits, None if mask is None else mask[b, h])
            out[b, h] = (weights @ v[b, h // group].double()).to(q.dtype)
    return out


def softmax_or_zero(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis of the masked logits; a row with no key left is all zeros."""
    if mask is not None and mask.dtype == torch.bool:
        logits = torch.where(mask, logits, -torch.inf)
    elif mask is not None:
        logits = logits + mask.double()
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.where(empty, 0.0, logits.softmax(-1))
