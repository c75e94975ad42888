"""`attention` in plain torch: `scaled_dot_product_attention` with the group's rows packed."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def _as_bias(mask: Tensor, q: Tensor) -> Tensor:
    """The mask with 4 axes, and in a dtype that SDPA takes beside q.

    On the CPU a floating mask of another dtype is added in float32; elsewhere SDPA wants that of q.
    """
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.dtype in (torch.bool, q.dtype):
        return mask
    return mask.to(torch.promote_types(q.dtype, torch.float32) if q.is_cpu else q.dtype)
