"""The equation of `capture_sinks`, one query row at a time, in float64.

S_t = mean over rows (weighted) and query heads of exp(scale * q . k_t + mask_t - lse)
"""

import torch
from torch import Tensor

from focus_compile.kernels.block_selection.reference import highest


def capture_sinks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    count: int,
    scale: float,
) -> Tensor:
    """See op.py."""
    return keep_sinks(attention_received(q, k, lse, weight, mask, scale), limit, count)


def sink_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    scale: float,
) -> Tensor:
    """See op.py: without the mean's divisor."""
    total = weight.double().sum(1, keepdim=True) * q.shape[1]
    return (attention_received(q, k, lse, weight, mask, scale) * total).float()


def keep_sinks(scores: Tensor, limit: Tensor, count: int) -> Tensor:
    """See op.py."""
    sinks = torch.full((scores.shape[0], count), -1, dtype=torch.int64, device=scores.device)
    for b in range(scores.shape[0]):
        chosen = highest(scores[b, : int(limit[b])].tolist(), count)
        sinks[b, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return sinks


def attention_received(
    q: Tensor, k: Tensor, lse: Tensor, weight: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """S of every position, [B, T] float64; it sums to 1 unless a row has no key left."""
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    if mask is not None:
        mask = mask.expand(batch, heads, rows, k.shape[2])
    scores = torch.zeros((batch, k.shape[2]), dtype=torch.float64, device=q.device)
    for b in range(batch):
        total = float(weight[b].double().sum()) * heads
        for h in range(heads):
            for r in range(rows):
                if lse[b, h, r] == -torch.inf:
                    continue
                logits = scale * k[b, h // group].double() @ q[b, h, r].double()  # [T]
                if mask is not None:
                    logits = masked(logits, mask[b, h, r])
                scores[b] += float(weight[b, r]) * (logits - lse[b, h, r].double()).exp()
        scores[b] /= total or 1.0
    return scores


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits with a bool mask (True attends) or a floating one (added) of their shape."""
    if mask.dtype == torch.bool:
        return torch.where(mask, logits, -torch.inf)
    return logits + mask.double()
