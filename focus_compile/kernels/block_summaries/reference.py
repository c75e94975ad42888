"""The equations of `block_summaries`, one block at a time, in float64.

mean_j = (1 / key_block) * sum of the keys of block j
bound_j = (highest, lowest) entry of the keys of block j, channel by channel
"""

import torch
from torch import Tensor


def block_summaries(k: Tensor, key_block: int, kind: str) -> Tensor:
    """See op.py. float64 inputs give a float64 result."""
    batch, heads, length, width = k.shape
    blocks = length // key_block
    wide = 2 * width if kind == "bound" else width
    out = torch.empty((batch, heads, blocks, wide), dtype=k.dtype, device=k.device)
    for j in range(blocks):
        block = k[:, :, j * key_block : (j + 1) * key_block].double()
        if kind == "mean":
            summary = block.sum(2) / key_block
        else:
            summary = torch.cat([block.max(2).values, block.min(2).values], -1)
        out[:, :, j] = summary.to(k.dtype)
    return out
