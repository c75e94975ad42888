"""One representative key for each key block of a cache."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype, define_op


def block_summaries(k: Tensor, key_block: int) -> Tensor:
    """Average the keys of every full block of `key_block` tokens.

    out[b, h, j] = mean over t in [j * key_block, (j + 1) * key_block) of k[b, h, t]

    Made at a refresh from the post-RoPE keys (Focus-dLLM, arXiv 2602.02159: prompt blocks with one
    representative key each; the paper does not say how it pools). Tokens after the last full block
    belong to no summary.

    Args:
        k: [B, Hkv, T, d], floating, any strides.
        key_block: tokens in a block, at least 1.

    Returns:
        [B, Hkv, T // key_block, d], dtype of k, contiguous; accumulated in float32.

    Raises:
        ValueError: k has not 4 axes, or key_block < 1.
        TypeError: k is not floating point.
    """
    _check(k, key_block)
    out: Tensor = _OP(k, key_block)
    return out


def _check(k: Tensor, key_block: int) -> None:
    check(k.dim() == 4, "block_summaries", "k must have 4 axes")
    check(key_block >= 1, "block_summaries", "key_block must be at least 1")
    check_dtype(k.is_floating_point(), "block_summaries", "k must be floating point")


def _fake(k: Tensor, key_block: int) -> Tensor:
    _check(k, key_block)
    batch, heads, length, width = k.shape
    shape = (batch, heads, length // key_block, width)
    return torch.empty(shape, dtype=k.dtype, device=k.device)


_OP = define_op(
    "block_summaries(Tensor k, int key_block) -> Tensor", folder="block_summaries", fake=_fake
)
