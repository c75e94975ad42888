"""The first run of every plan is checked against the model's own forward.

All rows active would prove nothing: it cannot see token mixing outside attention. A random strict
subset of rows over fresh K/V, with all keys kept, must equal the same rows of dense.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from focus_compile.runtime.buckets import bucket_for, pack_rows
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.trajectory import Trajectory

__all__ = ["check_plan", "rows_differ"]

log = logging.getLogger(__name__)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest relative error of a row, ||row - dense row|| / ||dense row||."""
MOST_ROWS = 16
_CHUNK_ELEMENTS = 1 << 25


def check_plan(
    programs: Programs,
    original: fx.GraphModule,
    args: Sequence[Any],
    trajectory: Trajectory,
    buckets: tuple[int, ...] | None,
) -> str | None:
    """None if refresh and a strict subset of rows agree with `original`, else what differs.

    The trajectory has just been refreshed with `args`. Where the device has no memory for a forward
    of `original`, op by op, the subset is compared with the rows of the refresh.
    """
    dense = _forward(original, args)
    first = 0
    if dense is None:
        first = trajectory.first_row
        dense = [latest.master for latest in trajectory.outputs]
    else:
        for latest, theirs in zip(trajectory.outputs, dense, strict=True):
            error = _worst_row(latest.master, theirs[:, latest.first :])
            if not error <= _tolerance(theirs):
                return f"the refresh program differs from the model by {error:.2g}"
    active = _random_strict_subset(trajectory.ids, first)
    length, device = trajectory.ids.shape[1], trajectory.ids.device
    packed = pack_rows(
        active, active, bucket_for(int(active.sum(1).max()), buckets, length, device.type)
    )
    state = [*trajectory.caches, *trajectory.merged]
    rows = programs.run_step(args, packed, trajectory.candidates, trajectory.candidates, state)
    sequences = torch.arange(active.shape[0], device=device)[:, None]
    return rows_differ(rows, [theirs[sequences, packed.rows - first] for theirs in dense])


def rows_differ(rows: Sequence[Tensor], dense: Sequence[Tensor]) -> str | None:
    """None if rows computed alone equal the same rows of a whole forward, else by how much not."""
    for ours, theirs in zip(rows, dense, strict=False):
        error = _worst_row(ours, theirs)
        if not error <= _tolerance(theirs):
            return f"rows computed alone differ from the model by {error:.2g}"
    return None


def _forward(original: fx.GraphModule, args: Sequence[Any]) -> Sequence[Tensor] | None:
    """The outputs of the user's own graph; None where there is no memory for them."""
    try:
        with torch.no_grad():
            dense = original.forward(*args)  # calling the module would print what fails
    except torch.OutOfMemoryError:
        log.info("no memory for the model's own forward; rows are compared with the refresh")
        return None
    return dense if isinstance(dense, (tuple, list)) else (dense,)


def _random_strict_subset(ids: Tensor, first: int) -> Tensor:
    """Some rows of each sequence from `first` on, but not all, bool [batch, length]."""
    batch, length = ids.shape[0], ids.shape[1] - first
    count = min(MOST_ROWS, length - 1)
    generator = torch.Generator().manual_seed(length)
    order = torch.rand(batch, length, generator=generator).argsort(1)[:, :count]
    chosen = torch.zeros(batch, length, dtype=torch.bool).scatter(1, order, True)
    chosen = torch.nn.functional.pad(chosen, (first, 0))
    return chosen.to(ids.device)


def _tolerance(reference: Tensor) -> float:
    return TOLERANCE.get(reference.dtype, 1e-3)


def _worst_row(ours: Tensor, theirs: Tensor) -> float:
    """Rows lie along every axis but the last; rows far smaller than typical count as typical.

    A few rows at a time: no float64 copy of all logits exists.
    """
    ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)
    step = max(1, _CHUNK_ELEMENTS // max(1, theirs.shape[-1]))
    sizes, errors = [], []
    for start in range(0, theirs.shape[0], step):
        exact = theirs[start : start + step].double()
        sizes.append(exact.norm(dim=-1))
        errors.append((ours[start : start + step].double() - exact).norm(dim=-1))
    size, error = torch.cat(sizes), torch.cat(errors)
    return float((error / size.clamp(min=float(size.mean()) * 1e-2 + 1e-12)).max())
