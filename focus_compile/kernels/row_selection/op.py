"""Which rows of a block stay in the deeper layers, and how many of them there should be."""

import torch
from torch import Tensor

from focus_compile.kernels.library import define_op
from focus_compile.kernels.ragged import (
    check_max_rows,
    check_rows,
    check_sequences,
    check_starts,
)

# A mean such as 4/3 in float32, times alpha, must not pass the whole number that it stands for.
_ROUNDING = 2.0**-20


def targets(masked: Tensor, mean_yield: Tensor, alpha: float) -> Tensor:
    """How many masked rows of each sequence to process in the deeper layers.

    target = min(n, max(1, ceil(alpha * max(mean_yield, 1)))), so 0 where n = 0

    FOCUS (arXiv 2601.23278), dynamic budget: alpha = 1.5 in the paper.

    Args:
        masked: [S] integer, n, the masked rows of each sequence.
        mean_yield: [S] floating, rows decoded per step so far in the block, on average; 1 where
            there is none.
        alpha: at least 1; infinity keeps every row.

    Returns:
        [S] int64. A product less than one part in a million above a whole number counts as it.
    """
    wanted = alpha * mean_yield.double().clamp(min=1)
    wanted = (wanted * (1 - _ROUNDING)).ceil().clamp(min=1)
    return wanted.minimum(masked.double()).long()


def select_rows(
    delta: Tensor,
    masked: Tensor,
    positions: Tensor,
    starts: Tensor,
    target: Tensor,
    progress: Tensor,
    max_rows: int,
) -> Tensor:
    """Choose, for each sequence, the rows that go on through the deeper layers.

    For each sequence with the masked rows M in order and n = |M|:

    outliers = {j in M: delta_j >= mean + std},   over M, std that of the population
    chosen = M                                      if n <= target
             outliers                               else if there are at least `target`
             the `target` highest by delta          else; of equal ones the leftmost
    kept = chosen, and M_k where M_k+1 was chosen and is at the next position (one pass)
    kept = M                                        if that is nothing
    kept = kept, and p in M where progress < p < the last kept position
    and every row that is not masked.

    The second line keeps the context that a model made from an autoregressive one decodes from; the
    last one leaves no position without K/V to the left of the rightmost processed one. FOCUS (arXiv
    2601.23278), dynamic budget and the two constraints; delta is the difference of `importance` in
    the first two layers.

    Whether a delta is an outlier is decided in float64, without a mean, a root or a division:
    d_j = n delta_j - sum delta >= 0 and n d_j ** 2 >= sum d ** 2, where one part in 2 ** 40 short
    still counts. Sums of float32 numbers of like size are exact there, so all implementations
    decide alike. Where all deltas are equal, all are outliers: nothing tells them apart, and all
    are kept. With half of them at one value and half at another, the higher half is.

    Args:
        delta: [T] float32, any strides; read in masked rows only. An infinite one leaves no
            outliers; what a NaN selects is not defined, but other sequences are not touched.
        masked: [T] bool.
        positions: [T] int64, rising strictly within a sequence.
        starts: [S + 1] int32 or int64, where sequences start (see `ragged`); starts[S] <= T.
        target: [S] int64 (see `targets`).
        progress: [S] int64, the highest position that went through all layers before; -1 if none.
        max_rows: rows of the longest sequence, or more: from 1 to 256. What a longer sequence
            gets is not defined.

    Returns:
        [T] bool; False in padding.

    Raises:
        ValueError: shapes that do not fit together, or max_rows out of range.
        TypeError: other dtypes than these.
    """
    _check(delta, masked, positions, starts, target, progress, max_rows)
    out: Tensor = _OP(delta, masked, positions, starts, target, progress, max_rows)
    return out


def _check(
    delta: Tensor,
    masked: Tensor,
    positions: Tensor,
    starts: Tensor,
    target: Tensor,
    progress: Tensor,
    max_rows: int,
) -> None:
    op = "select_rows"
    check_starts(op, starts)
    rows = delta.shape[0] if delta.dim() else 0
    check_rows(op, "delta", delta, rows, torch.float32)
    check_rows(op, "masked", masked, rows, torch.bool)
    check_rows(op, "positions", positions, rows, torch.int64)
    check_sequences(op, "target", target, starts)
    check_sequences(op, "progress", progress, starts)
    check_max_rows(op, max_rows)


def _fake(
    delta: Tensor,
    masked: Tensor,
    positions: Tensor,
    starts: Tensor,
    target: Tensor,
    progress: Tensor,
    max_rows: int,
) -> Tensor:
    _check(delta, masked, positions, starts, target, progress, max_rows)
    return torch.empty(delta.shape, dtype=torch.bool, device=delta.device)


_OP = define_op(
    "select_rows(Tensor delta, Tensor masked, Tensor positions, Tensor starts, Tensor target,"
    " Tensor progress, int max_rows) -> Tensor",
    folder="row_selection",
    fake=_fake,
    kernel=True,
)
