"""The equations of the attention ops, one query head of one sequence at a time, in float64.

out = softmax(scale * q k^T + mask) v;   lse = log sum exp(scale * q k^T + mask)
"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See op.py. float64 inputs give a float64 result."""
    out, _ = attention_with_lse(q, k, v, mask, scale)
    return out


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    if mask is not None:
        mask = mask.expand(batch, heads, rows, k.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for b in range(batch):
        for h in range(heads):
            logits = scale * q[b, h].double() @ k[b, h // group].double().T  # [R, T]
            hidden = None if mask is None else mask[b, h]
            out[b, h] = (softmax_or_zero(logits, hidden) @ v[b, h // group].double()).to(q.dtype)
            lse[b, h] = masked(logits, hidden).logsumexp(-1)
    return out, lse


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The logits, -inf where a bool mask is False, or with a floating mask added."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return torch.where(mask, logits, -torch.inf)
    return logits + mask.double()


def softmax_or_zero(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis of the masked logits; a row with no key left is all zeros."""
    logits = masked(logits, mask)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.where(empty, 0.0, logits.softmax(-1))
