"""The prompt tokens that draw the most attention: the sinks.

Where heads are spread over ranks, `sink_scores` is what each knows, and `keep_sinks` chooses by the
sum.
"""

import torch
from torch import Tensor

from focus_compile.kernels.library import (
    check,
    check_attention_inputs,
    check_dtype,
    check_index,
    define_op,
)


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
    """Pick, for each sequence, the `count` positions of highest mean attention.

    S[b, t] = sum_r weight[b, r] * sum_h p[b, h, r, t] / (H * sum_r weight[b, r])
    p[b, h, r, t] = exp(scale * q[b, h, r] . k[b, h // g, t] + mask[b, h, r, t] - lse[b, h, r])

    lse is that of the layer's attention (`attention_with_lse`), so p are its probabilities, and one
    pass over the keys will do. Only positions t < limit[b] qualify; of equal ones the lowest first.

    Focus-dLLM (arXiv 2602.02159) finds the sinks in one layer of every step, S_j = (1/H) sum_h
    softmax_j(Q_active^h . K_j^h / sqrt(d)), and every sparse layer after it keeps them; the
    reduction over active rows and the number of sinks are not published.

    Args:
        q: [B, H, R, d], floating, any strides.
        k: [B, Hkv, T, d], dtype of q, any strides, H % Hkv == 0.
        lse: [B, H, R] float32, any strides: log-sum-exp over all T keys of the logits, mask
            included. -inf: the row has no key left and counts nothing.
        weight: [B, R] floating, not negative: 1 for a row, 0 for a repetition of another row.
        mask: None, bool (True attends) or floating; broadcastable to [B, H, R, T].
        limit: [B] int64, the tokens that may become sinks, from position 0 on.
        count: sinks a sequence, at least 0.
        scale: factor of the logits.

    Returns:
        [B, count] int64: positions ascending, then -1. S is computed in float32.

    Raises:
        ValueError: shapes that do not fit together, or count < 0.
        TypeError: dtypes that differ, a limit that is not int64, a mask neither bool nor floating.
    """
    _check("capture_sinks", q, k, lse, weight, mask, limit)
    check(count >= 0, "capture_sinks", "count must not be negative")
    out: Tensor = _OP(q, k, lse, weight, mask, limit, count, scale)
    return out


def sink_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    scale: float,
) -> Tensor:
    """What `capture_sinks` ranks positions by, up to a factor that all of a sequence share.

    Returns:
        [B, T] float32: sum_r weight[b, r] * sum_h p[b, h, r, t]; at limit[b] and beyond anything.

    Raises:
        ValueError, TypeError: as `capture_sinks`.
    """
    _check("sink_scores", q, k, lse, weight, mask, limit)
    out: Tensor = _SCORES(q, k, lse, weight, mask, limit, scale)
    return out


def keep_sinks(scores: Tensor, limit: Tensor, count: int) -> Tensor:
    """The second half of `capture_sinks`: positions [B, count] int64 by scores [B, T] float32.

    Raises:
        ValueError, TypeError: as `capture_sinks`.
    """
    _check_choice(scores, limit, count)
    out: Tensor = _KEEP(scores, limit, count)
    return out


def _check_choice(scores: Tensor, limit: Tensor, count: int) -> None:
    op = "keep_sinks"
    check(scores.dim() == 2, op, "scores must have 2 axes")
    check_dtype(scores.dtype == torch.float32, op, "scores must be float32")
    check_index(op, "limit", limit, scores.shape[0], dim=1)
    check(count >= 0, op, "count must not be negative")


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
) -> None:
    check_attention_inputs(op, q, k, k, mask)
    check(lse.dim() == 3, op, "lse must have 3 axes")
    check(lse.shape[0] == q.shape[0], op, "lse and q differ in batch size")
    check(lse.shape[1] == q.shape[1], op, "lse and q differ in heads")
    check(lse.shape[2] == q.shape[2], op, "lse and q differ in rows")
    check_dtype(lse.dtype == torch.float32, op, "lse must be float32")
    check(weight.dim() == 2, op, "weight must have 2 axes")
    check(weight.shape[0] == q.shape[0], op, "weight and q differ in batch size")
    check(weight.shape[1] == q.shape[2], op, "weight and q differ in rows")
    check_dtype(weight.is_floating_point(), op, "weight must be floating point")
    check_index(op, "limit", limit, q.shape[0], dim=1)


def _fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    count: int,
    scale: float,
) -> Tensor:
    _check("capture_sinks", q, k, lse, weight, mask, limit)
    check(count >= 0, "capture_sinks", "count must not be negative")
    return torch.empty((q.shape[0], count), dtype=torch.int64, device=q.device)


_OP = define_op(
    "capture_sinks(Tensor q, Tensor k, Tensor lse, Tensor weight, Tensor? mask, Tensor limit,"
    " int count, float scale) -> Tensor",
    folder="sink_capture",
    fake=_fake,
    kernel=True,
)


def _fake_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    limit: Tensor,
    scale: float,
) -> Tensor:
    _check("sink_scores", q, k, lse, weight, mask, limit)
    return torch.empty((q.shape[0], k.shape[2]), dtype=torch.float32, device=q.device)


_SCORES = define_op(
    "sink_scores(Tensor q, Tensor k, Tensor lse, Tensor weight, Tensor? mask, Tensor limit,"
    " float scale) -> Tensor",
    folder="sink_capture",
    fake=_fake_scores,
    kernel=True,
)


def _fake_keep(scores: Tensor, limit: Tensor, count: int) -> Tensor:
    _check_choice(scores, limit, count)
    return torch.empty((scores.shape[0], count), dtype=torch.int64, device=scores.device)


_KEEP = define_op(
    "keep_sinks(Tensor scores, Tensor limit, int count) -> Tensor",
    folder="sink_capture",
    fake=_fake_keep,
    kernel=True,
)
