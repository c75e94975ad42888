"""`block_summaries` in plain torch."""

import torch
from torch import Tensor


def block_summaries(k: Tensor, key_block: int) -> Tensor:
    """See op.py."""
    batch, heads, length, width = k.shape
    blocks = length // key_block
    precise = torch.promote_types(k.dtype, torch.float32)
    tokens = k[:, :, : blocks * key_block].view(batch, heads, blocks, key_block, width)
    return tokens.mean(3, dtype=precise).to(k.dtype).contiguous()
