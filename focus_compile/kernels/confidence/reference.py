"""The equation of `confidence`, one row at a time, in float64.

token = argmax logits;   probability = softmax(logits)[token]
"""

import torch
from torch import Tensor


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See op.py."""
    probability = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    token = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    rows = logits.reshape(-1, logits.shape[-1]).double()
    for r, row in enumerate(rows):
        values = row.tolist()
        best = values.index(max(values))
        token.view(-1)[r] = best
        probability.view(-1)[r] = row.softmax(0)[best]
    return probability, token
