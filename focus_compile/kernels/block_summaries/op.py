"""A summary of each key block of a cache, from which a query's relevance is computed."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype, define_op

KINDS = ("bound", "mean")


def block_summaries(k: Tensor, key_block: int, kind: str) -> Tensor:
    """Summarise the keys k_t of every full block j of `key_block` tokens.

    "mean":  out_j = mean_t k_t
    "bound": out_j = (max_t k_t, min_t k_t), channel by channel, so that
             max(q, 0) . max_t k_t + min(q, 0) . min_t k_t >= q . k_t for every t of the block

    Made at a refresh from the post-RoPE keys. Focus-dLLM (arXiv 2602.02159) keeps one
    representative key a block and does not say how it pools: that is "mean". "bound" is the upper
    bound of Quest (arXiv 2406.10774); docs/selection-study.md compares the two. Tokens after the
    last full block belong to no summary.

    Args:
        k: [B, Hkv, T, d], floating, any strides.
        key_block: tokens in a block, at least 1.
        kind: "bound" or "mean".

    Returns:
        [B, Hkv, T // key_block, d], or 2 d for "bound"; dtype of k, contiguous. Means are
        accumulated in float32, bounds are exact.

    Raises:
        ValueError: k has not 4 axes, key_block < 1, or an unknown kind.
        TypeError: k is not floating point.
    """
    _check(k, key_block, kind)
    out: Tensor = _OP(k, key_block, kind)
    return out


def summary_width(head_dim: int, kind: str) -> int:
    """Numbers that summarise the keys of one block and head."""
    return head_dim * (2 if kind == "bound" else 1)


def _check(k: Tensor, key_block: int, kind: str) -> None:
    check(kind in KINDS, "block_summaries", f"kind must be one of {KINDS}")
    check(k.dim() == 4, "block_summaries", "k must have 4 axes")
    check(key_block >= 1, "block_summaries", "key_block must be at least 1")
    check_dtype(k.is_floating_point(), "block_summaries", "k must be floating point")


def _fake(k: Tensor, key_block: int, kind: str) -> Tensor:
    _check(k, key_block, kind)
    batch, heads, length, width = k.shape
    shape = (batch, heads, length // key_block, summary_width(width, kind))
    return torch.empty(shape, dtype=k.dtype, device=k.device)


_OP = define_op(
    "block_summaries(Tensor k, int key_block, str kind) -> Tensor",
    folder="block_summaries",
    fake=_fake,
)
