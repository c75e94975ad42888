"""Exact attention of each sequence's few rows over chosen blocks of its own cache."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype, define_op
from focus_compile.kernels.ragged import check_sequences
from focus_compile.kernels.ragged_attention.op import check_ragged_attention


def ragged_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    candidates: Tensor,
    key_block: int,
    max_rows: int,
    scale: float,
) -> Tensor:
    """`ragged_attention` in which a sequence sees some of its first keys, the same for all rows.

    For a row t of sequence s, with g = H // Hkv:

    keys[s] = union of [j * key_block, (j + 1) * key_block) for j in blocks[s],
              and [candidates[s] * key_block, lengths[s])
    out[h, t] = sum over n in keys[s] of softmax_n(scale * q[h, t] . k[slot[s], h // g, n])
                * v[slot[s], h // g, n]

    The sparse layers of Focus-dLLM (arXiv 2602.02159) in a step of block diffusion: candidates are
    the key blocks of finished decode blocks, and what comes after them is always read.

    Args:
        q: [H, T, d] float32, float16, bfloat16 or float64, any strides.
        k, v: [slots, Hkv, N, d], dtype of q, any strides, H % Hkv == 0.
        slot: [S] int64, the cache slot of each sequence; not checked.
        starts: [S + 1] int32 or int64, where sequences start (see `ragged`); starts[S] <= T.
        lengths: [S] int64, how many keys of its slot a sequence may see, from position 0 on; more
            than N are N. 0 gives zeros.
        blocks: [S, any] int64, ids below candidates[s] in any order, each at most once, then
            negative ones as padding (see `ragged_select_blocks`).
        candidates: [S] int64, at most lengths[s] // key_block where s has rows. What blocks and
            candidates hold is not checked: it would cost a synchronisation.
        key_block: tokens in a block, at least 1.
        max_rows: rows of the longest sequence, or more; at least 1. What a longer sequence gets is
            not defined.
        scale: factor of the logits, usually d ** -0.5.

    Returns:
        [H, T, d], dtype of q, contiguous; zeros in padding rows.

    Raises:
        ValueError: shapes that do not fit together, key_block < 1 or max_rows < 1.
        TypeError: dtypes that differ, indices not int64, starts not int32 or int64.
    """
    _check(q, k, v, slot, starts, lengths, blocks, candidates, key_block, max_rows)
    out: Tensor = _OP(
        q, k, v, slot, starts, lengths, blocks, candidates, key_block, max_rows, scale
    )
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    candidates: Tensor,
    key_block: int,
    max_rows: int,
) -> None:
    op = "ragged_sparse_attention"
    check_ragged_attention(op, q, k, v, slot, starts, lengths, max_rows)
    check_dtype(blocks.dtype == torch.int64, op, "blocks must be int64")
    check(blocks.dim() == 2, op, "blocks must have 2 axes")
    check(blocks.shape[0] == starts.shape[0] - 1, op, "blocks and starts differ in sequences")
    check_sequences(op, "candidates", candidates, starts)
    check(key_block >= 1, op, "key_block must be at least 1")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    candidates: Tensor,
    key_block: int,
    max_rows: int,
    scale: float,
) -> Tensor:
    _check(q, k, v, slot, starts, lengths, blocks, candidates, key_block, max_rows)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_OP = define_op(
    "ragged_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor slot, Tensor starts,"
    " Tensor lengths, Tensor blocks, Tensor candidates, int key_block, int max_rows, float scale)"
    " -> Tensor",
    folder="ragged_sparse_attention",
    fake=_fake,
    kernel=True,
)
