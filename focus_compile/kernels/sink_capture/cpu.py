"""`capture_sinks` in plain torch, a few kv heads' float32 probabilities at a time."""

import torch
from torch import Tensor

from focus_compile.kernels.block_selection.cpu import highest

_CHUNK_ELEMENTS = 1 << 22  # of probabilities: 16 MiB in float32


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
    return keep_sinks(_received(q, k, lse, weight, mask, limit, scale), limit, count)


def sink_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    scale: float,
) -> Tensor:
    """See op.py."""
    return _received(q, k, lse, weight, mask, limit, scale).float()


def keep_sinks(scores: Tensor, limit: Tensor, count: int) -> Tensor:
    """See op.py."""
    sinks = limit.new_full((scores.shape[0], count), -1)
    for b, end in enumerate(limit.tolist()):
        chosen = highest(scores[b, :end], count)
        sinks[b, : chosen.shape[0]] = chosen
    return sinks


def _received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    scale: float,
) -> Tensor:
    """`attention_received` by sequence, [B, T]."""
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    precise = torch.promote_types(q.dtype, torch.float32)
    received = torch.empty((q.shape[0], k.shape[2]), dtype=precise, device=q.device)
    for b in range(limit.shape[0]):
        seen = None if mask is None else mask[b]
        received[b] = attention_received(q[b], k[b], lse[b], weight[b], seen, scale)
    return received


def attention_received(
    q: Tensor, k: Tensor, lse: Tensor, weight: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention received by every position of one sequence, summed over heads and rows, [T].

    The probabilities lie keys first, so that each key is reduced by itself, in the same order as
    all others: positions of equal logits tie exactly.
    """
    heads, rows, width = q.shape
    kv_heads, length, _ = k.shape
    group = heads // kv_heads
    precise = torch.promote_types(q.dtype, torch.float32)
    queries = (q.to(precise) * scale).reshape(kv_heads, group * rows, width)
    lse = lse.to(precise).reshape(kv_heads, 1, group * rows)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # of no key: probabilities of 0
    if mask is not None:
        mask = mask.unflatten(0, (kv_heads, group)).permute(0, 3, 1, 2)  # [Hkv, T, g, R]
    received = torch.zeros(length, dtype=precise, device=q.device)
    step = max(_CHUNK_ELEMENTS // max(length * group * rows, 1), 1)
    for start in range(0, kv_heads, step):
        part = slice(start, start + step)
        logits = k[part].to(precise) @ queries[part].mT  # [heads, T, g * R]
        if mask is not None:
            logits = _masked(logits.unflatten(2, (group, rows)), mask[part]).flatten(2)
        probability = logits.sub_(lse[part]).exp_()
        for of_head in probability.mul_(weight.repeat(group)).sum(2):
            received += of_head
    return received


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, logits, -torch.inf)
    return logits + mask
