"""The equation of `block_summaries`, one block at a time, in float64.

summary_j = (1 / key_block) * sum of the keys of block j
"""

import torch
from torch import Tensor


def block_summaries(k: Tensor, key_block: int) -> Tensor:
    """See op.py. float64 inputs give a float64 result."""
    batch, heads, length, width = k.shape
    blocks = length // key_block
    out = torch.empty((batch, heads, blocks, width), dtype=k.dtype, device=k.device)
    for j in range(blocks):
        block = k[:, :, j * key_block : (j + 1) * key_block].double()
        out[:, :, j] = (block.sum(2) / key_block).to(k.dtype)
    return out
