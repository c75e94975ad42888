"""From the rows that are kept to a shorter ragged list of them."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, define_op
from focus_compile.kernels.ragged import check_rows, check_starts


def compact_rows(keep: Tensor, starts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Number the kept rows of a ragged list, in order, without asking how many there are.

    index[i] = the i-th t below starts[S] where keep[t], i < capacity
    new_starts[s] = min(how many there are below starts[s], capacity)

    values[index] are then the kept rows, and new_starts says where their sequences start. FOCUS
    (arXiv 2601.23278), eviction: hidden states, residuals and positions are compacted after layer
    1.

    Args:
        keep: [T] bool, any strides (see `select_rows`). Padding rows are never kept.
        starts: [S + 1] int32 or int64, where sequences start (see `ragged`); starts[S] <= T.
        capacity: length of `index`, 0 or more. Kept rows that do not fit are left out, of
            `new_starts` too.

    Returns:
        index: [capacity] int64. Past the count it repeats the last kept row, or 0 if there is none,
            so that what it reads is a row; computing it again does no harm.
        new_starts: [S + 1], dtype of starts.

    Raises:
        ValueError: shapes that do not fit together, or a negative capacity.
        TypeError: keep is not bool, starts neither int32 nor int64.
    """
    _check(keep, starts, capacity)
    index, new_starts = _OP(keep, starts, capacity)
    return index, new_starts


def _check(keep: Tensor, starts: Tensor, capacity: int) -> None:
    op = "compact_rows"
    check_rows(op, "keep", keep, keep.shape[0] if keep.dim() else 0, torch.bool)
    check_starts(op, starts)
    check(capacity >= 0, op, "capacity is negative")


def _fake(keep: Tensor, starts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    _check(keep, starts, capacity)
    index = torch.empty(capacity, dtype=torch.int64, device=keep.device)
    return index, torch.empty(starts.shape, dtype=starts.dtype, device=keep.device)


_OP = define_op(
    "compact_rows(Tensor keep, Tensor starts, SymInt capacity)"
    " -> (Tensor index, Tensor new_starts)",
    folder="compaction",
    fake=_fake,
    kernel=True,
)
