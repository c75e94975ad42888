"""`select_rows` in plain torch: sequences padded to one length, rows compared in pairs."""

import torch
from torch import Tensor

from focus_compile.kernels.ragged import padded_rows, unpadded

SHORT = 1 - 2.0**-40
"""Of n d ** 2 against sum d ** 2: what rounding may take away."""


def select_rows(
    delta: Tensor,
    masked: Tensor,
    positions: Tensor,
    starts: Tensor,
    target: Tensor,
    progress: Tensor,
    max_rows: int,
) -> Tensor:
    """See op.py."""
    rows = delta.shape[0]
    if rows == 0 or starts.shape[0] == 1:
        return torch.zeros_like(masked, memory_format=torch.contiguous_format)
    row, real = padded_rows(starts, rows, max_rows)
    hidden, position = real & masked[row], positions[row]  # [S, B]
    chosen = _chosen(delta[row], hidden, target[:, None])
    # Positions rise strictly: the next position, if any row has it, is the next row's.
    follows = chosen[:, 1:] & (position.diff(dim=1) == 1)
    kept = chosen.clone()
    kept[:, :-1] |= hidden[:, :-1] & follows
    kept |= hidden & ~kept.any(1, keepdim=True)
    lowest = torch.iinfo(torch.int64).min
    last = position.masked_fill(~kept, lowest).amax(1, keepdim=True)
    kept |= hidden & (position < last) & (position > progress[:, None])
    return unpadded(kept | (real & ~hidden), row, real, rows)


def _chosen(delta: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
    """[S, B] bool: the rows that the budget `target` [S, 1] buys."""
    n = hidden.sum(1, keepdim=True)
    exact = delta.double().masked_fill(~hidden, 0)
    distance = (n * exact - exact.sum(1, keepdim=True)).masked_fill(~hidden, 0)
    squares = distance.square()
    outlier = (distance >= 0) & (n * squares >= SHORT * squares.sum(1, keepdim=True)) & hidden
    lowest = delta.masked_fill(~hidden, -torch.inf)
    order = torch.argsort(lowest, dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    highest = rank < target
    enough = outlier.sum(1, keepdim=True) >= target
    return hidden & ((n <= target) | torch.where(enough, outlier, highest))
