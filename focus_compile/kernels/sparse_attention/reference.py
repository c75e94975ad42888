"""The equation of `sparse_attention`, one sequence and query head at a time, in float64.

keys = kept blocks + sinks + tail (a set);   out = softmax(scale * q K^T + mask) V over keys
"""

import torch
from torch import Tensor

from focus_compile.kernels.attention.reference import masked, softmax_or_zero


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    sinks: Tensor,
    candidates: Tensor,
    key_block: int,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See op.py. float64 inputs give a float64 result."""
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    if mask is not None:
        mask = mask.expand(batch, heads, rows, k.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b in range(batch):
        tail = int(candidates[b]) * key_block
        keys = key_set(blocks[b].tolist(), sinks[b].tolist(), tail, key_block, k.shape[2])
        for h in range(heads):
            logits = scale * q[b, h].double() @ k[b, h // group, keys].double().T  # [R, keys]
            weights = softmax_or_zero(logits, None if mask is None else mask[b, h][:, keys])
            out[b, h] = (weights @ v[b, h // group, keys].double()).to(q.dtype)
    return out


def sparse_attention_of_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    sinks: Tensor,
    candidates: Tensor,
    first: int,
    key_block: int,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See op.py. float64 inputs give a float64 result."""
    batch, heads, rows, _ = q.shape
    group, length = heads // k.shape[1], k.shape[2]
    if mask is not None:
        mask = mask.expand(batch, heads, rows, length)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    for b in range(batch):
        tail = int(candidates[b]) * key_block
        read = key_set(blocks[b].tolist(), sinks[b].tolist(), tail, key_block, first + length)
        keys = [t - first for t in read if t >= first]
        for h in range(heads):
            logits = scale * q[b, h].double() @ k[b, h // group, keys].double().T
            shown = None if mask is None else mask[b, h][:, keys]
            weights = softmax_or_zero(logits, shown)
            out[b, h] = (weights @ v[b, h // group, keys].double()).to(q.dtype)
            lse[b, h] = masked(logits, shown).logsumexp(-1)
    return out, lse


def key_set(
    blocks: list[int], sinks: list[int], tail: int, key_block: int, length: int
) -> list[int]:
    """Positions that are read, ascending: is token t in a kept block, a sink, or in the tail?"""
    return [t for t in range(length) if t // key_block in blocks or t in sinks or t >= tail]
