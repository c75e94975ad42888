"""How much the masked rows of a block look at each of their own: what token eviction ranks by."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype, define_op
from focus_compile.kernels.ragged import check_max_rows, check_rows, check_starts


def importance(
    q: Tensor, k: Tensor, masked: Tensor, starts: Tensor, max_rows: int, scale: float
) -> Tensor:
    """Attention that each masked row gets from the masked rows of its sequence, in one layer.

    For each sequence with the masked rows M in order, n = |M|, and g = H // Hkv:

    score[h, i, j] = scale * q[h, M_i] . k[h // g, M_j]
    pooled[h, i, j] = max(score[h, i, j - 1], score[h, i, j], score[h, i, j + 1])
    importance[M_j] = sum_h sum_i softmax_j(pooled[h, i])

    Neighbours are those in M, whatever lies between them in the list; beyond its ends there are
    none. Context and decoded rows count nowhere, not even in the softmax, and nothing is causal.
    FOCUS (arXiv 2601.23278), token importance: q and k after their norm and after RoPE, in the
    first two layers; rows are kept by the difference (see `select_rows`). The sum over a sequence
    is H n, so that the differences sum to zero.

    Args:
        q: [H, T, d] float32, float16, bfloat16 or float64, any strides.
        k: [Hkv, T, d], dtype of q, any strides, H % Hkv == 0.
        masked: [T] bool.
        starts: [S + 1] int32 or int64, where sequences start (see `ragged`); starts[S] <= T.
        max_rows: rows of the longest sequence, or more: from 1 to 256. What a longer sequence
            gets is not defined.
        scale: factor of the scores, usually d ** -0.5.

    Returns:
        [T] float32, computed in float32 (float64 for float64 inputs); 0 for rows that are not
        masked and for padding. On one device equal calls give equal bits.

    Raises:
        ValueError: shapes that do not fit together, or max_rows out of range.
        TypeError: dtypes that differ, masked not bool, starts not int32 or int64.
    """
    _check(q, k, masked, starts, max_rows)
    out: Tensor = _OP(q, k, masked, starts, max_rows, scale)
    return out


def _check(q: Tensor, k: Tensor, masked: Tensor, starts: Tensor, max_rows: int) -> None:
    op = "importance"
    check(q.dim() == k.dim() == 3, op, "q and k must have 3 axes")
    check(q.shape[1:] == k.shape[1:], op, "q and k differ in rows or head dimension")
    check(q.shape[0] % k.shape[0] == 0, op, "the query heads are no multiple of the kv heads")
    check_dtype(q.is_floating_point(), op, "q must be floating point")
    check_dtype(q.dtype == k.dtype, op, "q and k differ in dtype")
    check_rows(op, "masked", masked, q.shape[1], torch.bool)
    check_starts(op, starts)
    check_max_rows(op, max_rows)


def _fake(
    q: Tensor, k: Tensor, masked: Tensor, starts: Tensor, max_rows: int, scale: float
) -> Tensor:
    _check(q, k, masked, starts, max_rows)
    return torch.empty(q.shape[1], dtype=torch.float32, device=q.device)


_OP = define_op(
    "importance(Tensor q, Tensor k, Tensor masked, Tensor starts, int max_rows, float scale)"
    " -> Tensor",
    folder="importance",
    fake=_fake,
    kernel=True,
)
