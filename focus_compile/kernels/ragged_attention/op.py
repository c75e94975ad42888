"""Exact attention of each sequence's few rows over its own cache, for a ragged list of rows."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype, define_op
from focus_compile.kernels.ragged import check_max_rows, check_sequences, check_starts


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_rows: int,
    scale: float,
) -> Tensor:
    """Attend from every row to the first keys of its sequence's cache slot.

    For a row t of sequence s, with g = H // Hkv and the keys n < lengths[s]:

    out[h, t] = sum_n softmax_n(scale * q[h, t] . k[slot[s], h // g, n]) * v[slot[s], h // g, n]

    All rows of a sequence see the same keys. FOCUS (arXiv 2601.23278), a decode step of block
    diffusion: the rows that are processed, against all keys up to the rightmost of them.

    Args:
        q: [H, T, d] float32, float16, bfloat16 or float64, any strides.
        k, v: [slots, Hkv, N, d], dtype of q, any strides, H % Hkv == 0.
        slot: [S] int64, the cache slot of each sequence; not checked.
        starts: [S + 1] int32 or int64, where sequences start (see `ragged`); starts[S] <= T.
        lengths: [S] int64, how many keys of its slot a sequence sees, from position 0 on; more
            than N are N. 0 gives zeros.
        max_rows: rows of the longest sequence, or more; at least 1. What a longer sequence gets is
            not defined.
        scale: factor of the logits, usually d ** -0.5.

    Returns:
        [H, T, d], dtype of q, contiguous; zeros in padding rows.

    Raises:
        ValueError: shapes that do not fit together, or max_rows < 1.
        TypeError: dtypes that differ, slot or lengths not int64, starts not int32 or int64.
    """
    check_ragged_attention("ragged_attention", q, k, v, slot, starts, lengths, max_rows)
    out: Tensor = _OP(q, k, v, slot, starts, lengths, max_rows, scale)
    return out


def check_ragged_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_rows: int,
) -> None:
    """Raise ValueError or TypeError unless rows q of ragged sequences can attend to k, v."""
    check(q.dim() == 3, op, "q must have 3 axes")
    check(k.dim() == v.dim() == 4, op, "k and v must have 4 axes")
    check(k.shape == v.shape, op, "k and v differ in shape")
    check(q.shape[2] == k.shape[3], op, "q and k differ in head dimension")
    check(q.shape[0] % k.shape[1] == 0, op, "the query heads are no multiple of the kv heads")
    check_dtype(q.is_floating_point(), op, "q must be floating point")
    check_dtype(q.dtype == k.dtype == v.dtype, op, "q, k and v differ in dtype")
    check_starts(op, starts)
    check_sequences(op, "slot", slot, starts)
    check_sequences(op, "lengths", lengths, starts)
    check_max_rows(op, max_rows, 2**31 - 1)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_rows: int,
    scale: float,
) -> Tensor:
    check_ragged_attention("ragged_attention", q, k, v, slot, starts, lengths, max_rows)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_OP = define_op(
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor slot, Tensor starts, Tensor lengths,"
    " int max_rows, float scale) -> Tensor",
    folder="ragged_attention",
    fake=_fake,
    kernel=True,
)
