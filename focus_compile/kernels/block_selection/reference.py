"""The equation of `select_blocks`, one row and head at a time, in float64.

relevance_j = mean over rows (weighted) and query heads h of q_h . summary_{h // g, j}, where q_h is
split into (max(q_h, 0), min(q_h, 0)) for "bound" summaries
"""

import torch
from torch import Tensor


def select_blocks(
    q: Tensor, weight: Tensor, summaries: Tensor, candidates: Tensor, keep: Tensor
) -> Tensor:
    """See op.py."""
    return keep_blocks(relevance(q, weight, summaries), candidates, keep)


def block_relevance(q: Tensor, weight: Tensor, summaries: Tensor) -> Tensor:
    """See op.py: without the mean's divisor."""
    total = weight.double().sum(1, keepdim=True) * q.shape[1]
    return (relevance(q, weight, summaries) * total).float()


def keep_blocks(scores: Tensor, candidates: Tensor, keep: Tensor) -> Tensor:
    """See op.py."""
    kept = torch.full_like(scores, -1, dtype=torch.int64)
    for b in range(scores.shape[0]):
        limit = min(int(candidates[b]), scores.shape[1])
        chosen = highest(scores[b, :limit].tolist(), int(keep[b]))
        kept[b, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return kept


def relevance(q: Tensor, weight: Tensor, summaries: Tensor) -> Tensor:
    """Relevance of every block, [B, NB] float64."""
    batch, heads, rows, _ = q.shape
    group = heads // summaries.shape[1]
    scores = torch.zeros((batch, summaries.shape[2]), dtype=torch.float64, device=q.device)
    for b in range(batch):
        total = float(weight[b].double().sum()) * heads
        for r in range(rows):
            for h in range(heads):
                query = q[b, h, r].double()
                if summaries.shape[3] == 2 * q.shape[3]:
                    query = torch.cat([query.clamp(min=0), query.clamp(max=0)])
                products = summaries[b, h // group].double() @ query  # [NB]
                scores[b] += float(weight[b, r]) * products
        scores[b] /= total or 1.0
    return scores


def highest(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` highest scores, ascending; of equal scores the lowest index first."""
    best_first = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return sorted(best_first[: max(count, 0)])
