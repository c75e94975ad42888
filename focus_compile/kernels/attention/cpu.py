"""Attention in plain torch: `scaled_dot_product_attention` with the group's rows packed."""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_BYTES = 16 * 2**20


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See op.py.

    Query heads that share a kv head become rows of one head, so that each kv head is read (and, in
    bfloat16, repacked) once, not once a query head. A mask that varies over heads or rows cannot be
    shared by the packed rows; torch then walks the groups itself.
    """
    batch, heads, rows, width = q.shape
    kv_heads = k.shape[1]
    if mask is not None:
        mask = _as_bias(mask, q)
    if mask is None or mask.shape[1] == mask.shape[2] == 1:
        packed = q.reshape(batch, kv_heads, heads // kv_heads * rows, width)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
    else:
        grouped = heads != kv_heads
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    return out.reshape(q.shape).contiguous()


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See op.py. torch tells no lse here, so logits are made again, LOGIT_BYTES of them at once."""
    batch, heads, rows, _ = q.shape
    length, group = k.shape[2], heads // k.shape[1]
    precise = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if mask is not None:
        mask = mask.expand(batch, heads, rows, length)
    step = max(1, LOGIT_BYTES // (precise.itemsize * max(1, length)))
    for b in range(batch):
        for h in range(heads):
            keys = scale * k[b, h // group].to(precise).mT  # [d, T]
            for start in range(0, rows, step):
                part = slice(start, start + step)
                logits = q[b, h, part].to(precise) @ keys
                if mask is not None:
                    logits = _masked(logits, mask[b, h, part])
                lse[b, h, part] = logits.logsumexp(-1)
    return attention(q, k, v, mask, scale), lse


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask


def _as_bias(mask: Tensor, q: Tensor) -> Tensor:
    """The mask with 4 axes, and in a dtype that SDPA takes beside q.

    On the CPU a floating mask of another dtype is added in float32; elsewhere SDPA wants that of q.
    """
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.dtype in (torch.bool, q.dtype):
        return mask
    return mask.to(torch.promote_types(q.dtype, torch.float32) if q.is_cpu else q.dtype)
