"""Exact attention of some query rows over a whole K/V cache, with grouped query heads."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check_attention_inputs, define_op


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend from every query row to all keys.

    out[b, h, r] = sum_t softmax_t(scale * q[b, h, r] . k[b, h // g, t] + mask[b, h, r, t])
                   * v[b, h // g, t],   g = H // Hkv

    The dense regions of a step (Focus-dLLM, arXiv 2602.02159: the active rows' queries against the
    full cache in the first layers), and a refresh.

    Args:
        q: [B, H, R, d] float32, float16, bfloat16 or float64, any strides. R may be 0.
        k, v: [B, Hkv, T, d], dtype of q, any strides, H % Hkv == 0.
        mask: None, bool (True attends) or floating (added to the logits); broadcastable to
            [B, H, R, T]. A row with no key left gives zeros.
        scale: factor of the logits, usually d ** -0.5.

    Returns:
        [B, H, R, d], dtype of q, contiguous.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that differ, or a mask neither bool nor floating.
    """
    check_attention_inputs("attention", q, k, v, mask)
    out: Tensor = _OP(q, k, v, mask, scale)
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    check_attention_inputs("attention", q, k, v, mask)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_OP = define_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    folder="attention",
    fake=_fake,
)
