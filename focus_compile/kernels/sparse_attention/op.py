"""Exact attention over the kept prompt blocks, the sinks and everything after the prompt.

Where keys are spread over ranks, `sparse_attention_of_shard` is what each can say, and the mean of
all, weighted by exp(lse), is the attention over all keys.
"""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_attention_inputs, check_index, define_op


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
    """Attend from every query row to a subset of the keys, the same for all rows and heads.

    keys[b] = union of [j * key_block, (j + 1) * key_block) for j in blocks[b],
              the positions sinks[b], and [candidates[b] * key_block, T)
    out[b, h, r] = sum over t in keys[b] of softmax_t(scale * q[b, h, r] . k[b, h // g, t]
                   + mask[b, h, r, t]) * v[b, h // g, t],   g = H // Hkv

    keys[b] is a set: a sink in a block, in the tail or named twice counts once. Focus-dLLM (arXiv
    2602.02159), the sparse layers: K_attn = cat(K[I_P], K_resp), I_P = kept blocks and sinks; V
    likewise.

    Args:
        q: [B, H, R, d] float32, float16, bfloat16 or float64, any strides. R may be 0.
        k, v: [B, Hkv, T, d], dtype of q, any strides, H % Hkv == 0.
        blocks: [B, any] int64, ids below candidates[b] in any order, each at most once, then
            negative ones as padding (see `select_blocks`).
        sinks: [B, any] int64, positions below T in any order; negative ones are padding (see
            `capture_sinks`).
        candidates: [B] int64, blocks of the prompt, at most T // key_block; all tokens after them
            are always read. What blocks, sinks and candidates hold is not checked: it would cost a
            synchronisation.
        key_block: tokens in a block, at least 1.
        mask: None, bool (True attends) or floating (added to the logits); broadcastable to
            [B, H, R, T]. A row with no key left gives zeros.
        scale: factor of the logits, usually d ** -0.5.

    Returns:
        [B, H, R, d], dtype of q, contiguous.

    Raises:
        ValueError: shapes that do not fit together, or key_block < 1.
        TypeError: dtypes that differ, indices not int64, a mask neither bool nor floating.
    """
    _check(q, k, v, blocks, sinks, candidates, key_block, mask)
    out: Tensor = _OP(q, k, v, blocks, sinks, candidates, key_block, mask, scale)
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
    """`sparse_attention` to those of its keys that lie in [first, first + T), and its normaliser.

    lse[b, h, r] = log sum over t in keys[b] and in [first, first + T) of
                   exp(scale * q[b, h, r] . k[b, h // g, t - first] + mask[b, h, r, t - first])

    Args:
        k, v: [B, Hkv, T, d], those of the positions from `first` on.
        blocks, sinks, candidates: as `sparse_attention` takes them, in positions of the whole
            sequence; what lies outside of the shard is left out.
        first: a multiple of key_block; so is T, unless the sequence ends in the shard.
        mask: broadcastable to [B, H, R, T].
        q, key_block, scale, and raises: as `sparse_attention`.

    Returns:
        out: [B, H, R, d], dtype of q, contiguous; zeros for a row with no key in the shard.
        lse: [B, H, R] float32, contiguous; -inf for such a row.
    """
    _check_shard(q, k, v, blocks, sinks, candidates, first, key_block, mask)
    out, lse = _SHARD_OP(q, k, v, blocks, sinks, candidates, first, key_block, mask, scale)
    return out, lse


def in_shard(
    blocks: Tensor, sinks: Tensor, candidates: Tensor, first: int, length: int, key_block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, sinks and candidates of `sparse_attention` over the shard's own positions, from 0."""
    first_block, held = first // key_block, length // key_block
    own = blocks - first_block
    own = own.where((blocks >= 0) & (own >= 0) & (own < held), held)
    own = own.sort(1).values  # padding behind the ids
    place = sinks - first
    inside = (sinks >= 0) & (place >= 0) & (place < length)
    return (
        own.where(own < held, -1),
        place.where(inside, -1),
        (candidates - first_block).clamp(0, held),
    )


def _check_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    sinks: Tensor,
    candidates: Tensor,
    first: int,
    key_block: int,
    mask: Tensor | None,
) -> None:
    _check(q, k, v, blocks, sinks, candidates, key_block, mask)
    op = "sparse_attention_of_shard"
    check(first >= 0, op, "first must not be negative")
    check(first % key_block == 0, op, "first must be a multiple of key_block")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    sinks: Tensor,
    candidates: Tensor,
    key_block: int,
    mask: Tensor | None,
) -> None:
    op = "sparse_attention"
    check_attention_inputs(op, q, k, v, mask)
    check_index(op, "blocks", blocks, q.shape[0], dim=2)
    check_index(op, "sinks", sinks, q.shape[0], dim=2)
    check_index(op, "candidates", candidates, q.shape[0], dim=1)
    check(key_block >= 1, op, "key_block must be at least 1")


def _fake(
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
    _check(q, k, v, blocks, sinks, candidates, key_block, mask)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_OP = define_op(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor sinks,"
    " Tensor candidates, int key_block, Tensor? mask, float scale) -> Tensor",
    folder="sparse_attention",
    fake=_fake,
    kernel=True,
)


def _fake_of_shard(
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
    _check_shard(q, k, v, blocks, sinks, candidates, first, key_block, mask)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


_SHARD_OP = define_op(
    "sparse_attention_of_shard(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor sinks,"
    " Tensor candidates, SymInt first, int key_block, Tensor? mask, float scale)"
    " -> (Tensor, Tensor)",
    folder="sparse_attention",
    fake=_fake_of_shard,
    kernel=True,
)
