"""`sparse_attention` on CUDA: the keys are read where they lie, found by arithmetic on the ids."""

import torch
from torch import Tensor

from focus_compile.kernels.sparse_attention.op import in_shard
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
    """See op.py."""
    own = in_shard(blocks, sinks, candidates, first, k.shape[2], key_block)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return attend(q, k, v, mask, scale, KeyList(*own, key_block), lse=lse), lse
