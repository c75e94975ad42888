"""`importance` in plain torch: sequences padded to one length, one kv head at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_compile.kernels.ragged import padded_rows, unpadded


def importance(
    q: Tensor, k: Tensor, masked: Tensor, starts: Tensor, max_rows: int, scale: float
) -> Tensor:
    """See op.py."""
    heads, rows, width = q.shape
    kv_heads, sequences = k.shape[0], starts.shape[0] - 1
    group = heads // kv_heads
    if rows == 0 or sequences == 0 or heads == 0:
        return q.new_zeros(rows, dtype=torch.float32)
    row, real = _masked_rows(masked, starts, max_rows)
    missing = ~real[:, None]  # [S, 1, B]
    precise = torch.promote_types(q.dtype, torch.float32)
    total = q.new_zeros(row.shape, dtype=precise)
    for h in range(kv_heads):
        queries = q[h * group : (h + 1) * group, row].to(precise)  # [g, S, B, d]
        queries = queries.transpose(0, 1).reshape(sequences, group * max_rows, width)
        scores = queries @ k[h, row].to(precise).mT * scale  # [S, g B, B]
        scores.masked_fill_(missing, -torch.inf)
        pooled = F.max_pool1d(scores, 3, stride=1, padding=1).masked_fill_(missing, -torch.inf)
        weights = pooled.softmax(-1).view(sequences, group, max_rows, max_rows)
        total += weights.masked_fill_(missing.mT[:, None], 0).sum((1, 2))
    total.masked_fill_(~real, 0)  # a sequence without masked rows has no softmax
    return unpadded(total.float(), row, real, rows)


def _masked_rows(masked: Tensor, starts: Tensor, max_rows: int) -> tuple[Tensor, Tensor]:
    """`padded_rows` of the masked rows alone: they come first in each sequence."""
    row, real = padded_rows(starts, masked.shape[0], max_rows)
    real &= masked[row]
    order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return row.gather(1, order), real.gather(1, order)
