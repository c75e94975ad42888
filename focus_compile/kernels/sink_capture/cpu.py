"""`capture_sinks` in plain torch, one kv head's float32 probabilities at a time."""

import torch
from torch import Tensor

from focus_compile.kernels.block_selection.cpu import highest


def capture_sinks(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    count: int,
    scale: float,
) -> Tensor:
    """See op.py."""
    sinks = limit.new_full((q.shape[0], count), -1)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    for b, end in enumerate(limit.tolist()):
        received = attention_received(
            q[b], k[b], weight[b], None if mask is None else mask[b], scale
        )
        chosen = highest(received[:end], count)
        sinks[b, : chosen.shape[0]] = chosen
    return sinks


def attention_received(
    q: Tensor, k: Tensor, weight: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention received by every position of one sequence, summed over heads and rows, [T].

    The probabilities lie keys first, so that each key is reduced by itself, in the same order as
    all others: equal keys tie exactly.
    """
    heads, rows, width = q.shape
    kv_heads, length, _ = k.shape
    group = heads // kv_heads
    precise = torch.promote_types(q.dtype, torch.float32)
    queries = (q.to(precise) * scale).reshape(kv_heads, group * rows, width)
    received = torch.zeros(length, dtype=precise, device=q.device)
    for h in range(kv_heads):
        logits = (k[h].to(precise) @ queries[h].T).view(length, group, rows)
        if mask is not None:
            logits = _masked(logits, mask[h * group : (h + 1) * group].permute(2, 0, 1))
        highest_logit = logits.amax(0).clamp_min(torch.finfo(precise).min)
        weights = logits.sub_(highest_logit).exp_()
        norm = weights.sum(0).clamp_min(torch.finfo(precise).tiny)
        received += weights.mul_(weight / norm).flatten(1).sum(1)
    return received


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, logits, -torch.inf)
    return logits + mask
