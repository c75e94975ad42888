"""How far attention outputs are off because keys and values are old, judged by a few that are new;
and which positions those outputs read."""

import torch
from torch import Tensor

from focus_compile.kernels.library import (
    check,
    check_attention_inputs,
    check_dtype,
    check_index,
    define_op,
)


def staleness(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    readers: Tensor,
    reader_weight: Tensor,
    left: Tensor,
    old_k: Tensor,
    new_k: Tensor,
    old_v: Tensor,
    new_v: Tensor,
    positions: Tensor,
    probe_weight: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Estimate what attention outputs would change by if the keys and values left old were renewed.

    Renewing position j moves the output o of a row, to first order in its normaliser, by

        d_j = p(new_k_j) (new_v_j - o) - p(old_k_j) (old_v_j - o)
        p(k_j) = exp(scale * q . k_j + mask_j - lse)

    What all positions of `left` would move it by is estimated from probes that were renewed, with
    weights inverse to the probability that they were drawn, by the ratio estimator (Cochran,
    Sampling Techniques, ch. 6): the attention that `left` draws is known.

        d = sum_{j in left} p(k_j) * sum_probes weight_j d_j / sum_probes weight_j p_j
        p_j = (p(old_k_j) + p(new_k_j)) / 2

    The square of its norm errs upwards by the variance of the draw. Returned are, summed over
    readers (weighted) and heads, |d|^2 and |o|^2: the root of their quotient is the relative error.

    Args:
        q: [B, H, R, d] floating, any strides; k: [B, Hkv, T, d], all keys as they are now;
            out: [B, H, R, dv] the attention output, and lse: [B, H, R] float32 its log-sum-exp
            (`attention_with_lse`).
        readers: [B, N] int64, rows of q; reader_weight: [B, N] float32, 0 for a repetition.
        left: [B, T] bool, the positions that were not renewed.
        old_k, new_k: [B, Hkv, P, d] and old_v, new_v: [B, Hkv, P, dv], dtype of q.
        positions: [B, P] int64, where they are among the keys; probe_weight: [B, P] float32.
        mask: None, bool (True attends) or floating; broadcastable to [B, H, R, T].
        scale: factor of the logits.

    Returns:
        error: [B, 2] float32: |d|^2, |o|^2.
        received: [B, T] float32: the mean of p over readers (weighted) and heads.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that differ, or indices that are not int64.
    """
    given = (q, k, out, lse, readers, reader_weight, left, old_k, new_k, old_v, new_v, positions,
             probe_weight, mask, scale)  # fmt: skip
    _check(*given)
    error, received = _OP(*given)
    return error, received


def _check(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    readers: Tensor,
    reader_weight: Tensor,
    left: Tensor,
    old_k: Tensor,
    new_k: Tensor,
    old_v: Tensor,
    new_v: Tensor,
    positions: Tensor,
    probe_weight: Tensor,
    mask: Tensor | None,
    scale: float,
) -> None:
    op, batch = "staleness", q.shape[0]
    check_attention_inputs(op, q, k, k, mask)
    check_attention_inputs(op, q, old_k, old_v, None)
    check_attention_inputs(op, q, new_k, new_v, None)
    check(old_k.shape == new_k.shape, op, "old and new keys differ in shape")
    check(old_v.shape == new_v.shape, op, "old and new values differ in shape")
    check(out.shape[:3] == q.shape[:3], op, "out and q differ in batch, heads or rows")
    check(out.shape[3] == old_v.shape[3], op, "out and values differ in width")
    check(lse.shape == q.shape[:3], op, "lse must be [batch, heads, rows] of q")
    check_dtype(lse.dtype == torch.float32, op, "lse must be float32")
    check_index(op, "readers", readers, batch, dim=2)
    check(reader_weight.shape == readers.shape, op, "reader_weight and readers differ in shape")
    check_dtype(left.dtype == torch.bool, op, "left must be bool")
    check(left.dim() == 2, op, "left must have 2 axes")
    check(left.shape[1] == k.shape[2], op, "left and k differ in length")
    check_index(op, "positions", positions, batch, dim=2)
    check(positions.shape[1] == old_k.shape[2], op, "positions and old_k differ in probes")
    check(probe_weight.shape == positions.shape, op, "probe_weight and positions differ in shape")


def _fake(q: Tensor, k: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    _check(q, k, *rest)  # type: ignore[arg-type]
    error = torch.empty((q.shape[0], 2), dtype=torch.float32, device=q.device)
    return error, torch.empty((q.shape[0], k.shape[2]), dtype=torch.float32, device=q.device)


_OP = define_op(
    "staleness(Tensor q, Tensor k, Tensor out, Tensor lse, Tensor readers, Tensor reader_weight,"
    " Tensor left, Tensor old_k, Tensor new_k, Tensor old_v, Tensor new_v, Tensor positions,"
    " Tensor probe_weight, Tensor? mask, float scale) -> (Tensor, Tensor)",
    folder="staleness",
    fake=_fake,
    kernel=True,
)
