"""`ragged_sparse_attention` on CUDA: `ragged_attention`'s kernel, keys found by the ids."""

from torch import Tensor

from focus_compile.kernels.ragged_attention.kernel import KeyBlocks, attend
from focus_compile.kernels.tiling import Tiling


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
    tiling: Tiling | None = None,
) -> Tensor:
    """See op.py. tiling: as in `ragged_attention`."""
    keys = KeyBlocks(blocks.contiguous(), candidates.contiguous(), key_block)
    return attend(q, k, v, slot, starts, lengths, max_rows, scale, keys, tiling)
