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


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention`, and the logarithm of its normaliser.

    lse[b, h, r] = log sum_t exp(scale * q[b, h, r] . k[b, h // g, t] + mask[b, h, r, t])

    With it another pass over some keys yields their attention weights, exp(logit - lse), without
    reading all keys again.

    Args and raises: as `attention`.

    Returns:
        out: [B, H, R, d], dtype of q, contiguous.
        lse: [B, H, R] float32, contiguous; -inf for a row with no key left.
    """
    check_attention_inputs("attention_with_lse", q, k, v, mask)
    out, lse = _LSE_OP(q, k, v, mask, scale)
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    check_attention_inputs("attention", q, k, v, mask)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _lse_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    check_attention_inputs("attention_with_lse", q, k, v, mask)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


_OP = define_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    folder="attention",
    fake=_fake,
    kernel=True,
)
_LSE_OP = define_op(
    "attention_with_lse(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale)"
    " -> (Tensor, Tensor)",
    folder="attention",
    fake=_lse_fake,
    kernel=True,
)
