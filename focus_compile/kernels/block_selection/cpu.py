"""`select_blocks` in plain torch: pool the queries first, then one product with the summaries."""

import torch
from torch import Tensor


def select_blocks(
    q: Tensor, weight: Tensor, summaries: Tensor, candidates: Tensor, keep: Tensor
) -> Tensor:
    """See op.py."""
    return keep_blocks(relevance(q, weight, summaries), candidates, keep)


def block_relevance(q: Tensor, weight: Tensor, summaries: Tensor) -> Tensor:
    """See op.py."""
    return relevance(q, weight, summaries).float()


def keep_blocks(scores: Tensor, candidates: Tensor, keep: Tensor) -> Tensor:
    """See op.py."""
    kept = candidates.new_full(scores.shape, -1)
    for b, (limit, count) in enumerate(zip(candidates.tolist(), keep.tolist(), strict=True)):
        chosen = highest(scores[b, :limit], count)
        kept[b, : chosen.shape[0]] = chosen
    return kept


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of scores [N], ascending; of equals the lowest index first."""
    if count <= 0:
        return scores.new_empty(0, dtype=torch.int64)
    if count >= scores.shape[0]:
        return torch.arange(scores.shape[0], device=scores.device)
    values, indices = scores.topk(count)
    if int((scores >= values[-1]).sum()) > count:  # a tie at the end, where topk takes any of them
        indices = scores.sort(descending=True, stable=True).indices[:count]
    return indices.sort().values


def relevance(q: Tensor, weight: Tensor, summaries: Tensor) -> Tensor:
    """Relevance of every block up to a positive factor a sequence, [B, NB], float32 or better.

    Relevance is linear in q, or in its positive and negative parts, so the rows and the heads of
    a group are summed before the product.
    Each block's score is reduced by itself, in the same order for all: equal blocks tie exactly.
    """
    if summaries.shape[3] == 2 * q.shape[3]:
        q = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
    batch, heads, _, width = q.shape
    kv_heads = summaries.shape[1]
    precise = torch.promote_types(q.dtype, torch.float32)
    pooled = weight.to(precise)[:, None, None] @ q.to(precise)  # [B, H, 1, d]
    pooled = pooled.view(batch, kv_heads, heads // kv_heads, width).sum(2, keepdim=True)
    by_head = (summaries * pooled).sum(3)  # [B, Hkv, NB]
    return by_head.mT.contiguous().sum(2)
