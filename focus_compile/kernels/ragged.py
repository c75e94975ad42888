"""The ragged list of rows: those of S sequences one after another, T rows in all.

`starts` [S + 1], int32 or int64, begins with 0 and never falls: the rows of sequence s are
starts[s] to starts[s + 1]. Rows from starts[S] on are padding. What `starts` holds is not checked:
it would cost a synchronisation.
"""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype

MOST_ROWS = 256
"""Rows of one sequence that the ops which compare them in pairs take."""


def check_starts(op: str, starts: Tensor) -> None:
    """Raise ValueError or TypeError unless `starts` is [S + 1] int32 or int64."""
    check_dtype(starts.dtype in (torch.int32, torch.int64), op, "starts must be int32 or int64")
    check(starts.dim() == 1, op, "starts must have 1 axis")
    check(starts.shape[0] >= 1, op, "starts is empty")


def check_rows(op: str, name: str, values: Tensor, rows: int, dtype: torch.dtype) -> None:
    """Raise unless `values` is [T] of that dtype, T = `rows`."""
    check_dtype(values.dtype == dtype, op, f"{name} must be {str(dtype).removeprefix('torch.')}")
    check(values.dim() == 1, op, f"{name} must have 1 axis")
    check(values.shape[0] == rows, op, f"{name} has another number of rows")


def check_sequences(op: str, name: str, values: Tensor, starts: Tensor) -> None:
    """Raise unless `values` is [S] int64."""
    check_dtype(values.dtype == torch.int64, op, f"{name} must be int64")
    check(values.dim() == 1, op, f"{name} must have 1 axis")
    check(values.shape[0] == starts.shape[0] - 1, op, f"{name} and starts differ in sequences")


def check_max_rows(op: str, max_rows: int, most: int = MOST_ROWS) -> None:
    """Raise unless 1 <= max_rows <= most."""
    check(1 <= max_rows <= most, op, f"max_rows must be from 1 to {most}")


def padded_rows(starts: Tensor, rows: int, max_rows: int) -> tuple[Tensor, Tensor]:
    """(row [S, max_rows] int64, real [S, max_rows] bool): each sequence's rows side by side.

    rows: T, at least 1. Where not `real`, `row` is some row of the list.
    """
    row = starts[:-1, None].long() + torch.arange(max_rows, device=starts.device)
    return row.clamp(max=rows - 1), row < starts[1:, None]


def unpadded(values: Tensor, row: Tensor, real: Tensor, rows: int) -> Tensor:
    """[T]: values [S, max_rows] at their `row` where `real`, zeros elsewhere."""
    out = values.new_zeros(rows + 1)  # the last takes what is not real
    out.scatter_(0, row.where(real, rows).flatten(), values.flatten())
    return out[:rows].contiguous()
