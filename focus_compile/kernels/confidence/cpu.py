"""`confidence` in plain torch, a few rows at a time: no float32 copy of all logits exists."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 18  # one chunk in float32 is 1 MiB: it stays in a core's cache


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See op.py."""
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    precise = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.reshape(-1, vocabulary)
    probability = torch.empty(rows.shape[0], dtype=torch.float32, device=logits.device)
    token = torch.empty(rows.shape[0], dtype=torch.int64, device=logits.device)
    step = max(_CHUNK_ELEMENTS // vocabulary, 1)
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        best, token[chunk] = rows[chunk].max(-1)
        relative = rows[chunk] - best.to(precise)[:, None]
        probability[chunk] = relative.exp_().sum(-1).reciprocal_()
    return probability.view(shape), token.view(shape)
