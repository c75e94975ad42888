"""`block_summaries` in plain torch."""

import torch
from torch import Tensor


def block_summaries(k: Tensor, key_block: int, kind: str) -> Tensor:
    """See op.py."""
    batch, heads, length, width = k.shape
    blocks = length // key_block
    tokens = k[:, :, : blocks * key_block].view(batch, heads, blocks, key_block, width)
    if kind == "mean":
        precise = torch.promote_types(k.dtype, torch.float32)
        return tokens.mean(3, dtype=precise).to(k.dtype).contiguous()
    lowest, highest = tokens.aminmax(dim=3)
    return torch.cat([highest, lowest], -1)
