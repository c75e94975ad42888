"""`sparse_attention` on CUDA: the keys are read where they lie, found by arithmetic on the ids."""

from torch import Tensor

from focus_compile.kernels.split_kv import KeyList, attend


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
    """See op.py."""
    return attend(q, k, v, mask, scale, KeyList(blocks, sinks, candidates, key_block))
