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

from focus_compile.plan import Plan
from focus_compile.runtime.adaptive_refresh import judge_all
from focus_compile.runtime.buckets import bucket_for, pack_rows
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.trajectory import Trajectory

__all__ = ["check_plan", "row_errors", "rows_differ", "tolerance"]

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
            if not _comparable(theirs):
                continue
            error = _worst_row(latest.master, theirs[:, latest.first :])
            if not error <= tolerance(theirs, programs.plan):
                return f"the refresh program differs from the model by {error:.2g}"
    active = _random_strict_subset(trajectory.ids, first)
    length, device = trajectory.ids.shape[1], trajectory.ids.device
    packed = pack_rows(
        active, active, bucket_for(int(active.sum(1).max()), buckets, length, device.type)
    )
    state = [*trajectory.caches, *trajectory.merged]
    rows = programs.run_step(args, packed, trajectory.candidates, trajectory.candidates, state)
    sequences = torch.arange(active.shape[0], device=device)[:, None]
    expected = [theirs[sequences, packed.rows - first] for theirs in dense]
    problem = rows_differ(rows, expected, programs.plan)
    if problem is None and programs.again is not None:
        rows = programs.run_step(
            args, packed, trajectory.candidates, trajectory.candidates, state, again=True
        )
        problem = rows_differ(rows, expected, programs.plan)
    if problem is None and programs.partial is not None:
        judged = judge_all(packed, active)
        rows = programs.run_partial(args, judged, trajectory.caches)
        problem = rows_differ(rows, expected, programs.plan)
    return problem


def rows_differ(rows: Sequence[Tensor], dense: Sequence[Tensor], plan: Plan) -> str | None:
    """None if rows computed alone equal the same rows of a whole forward, else by how much not."""
    for ours, theirs in zip(rows, dense, strict=False):
        if not _comparable(theirs):
            continue
        error = _worst_row(ours, theirs)
        if not error <= tolerance(theirs, plan):
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


def _comparable(values: Tensor) -> bool:
    """Of logits that are nearly equal, the highest may be another one: tokens are not compared.
    Where a graph returns them, the confidence of every row is compared beside them."""
    return values.is_floating_point()


def tolerance(reference: Tensor, plan: Plan) -> float:
    """Of an output in its own numbers, made by a model in possibly coarser ones."""
    used = {reference.dtype, *(getattr(torch, site.dtype) for site in plan.sites)}
    return max(TOLERANCE.get(dtype, 1e-3) for dtype in used)


def _worst_row(ours: Tensor, theirs: Tensor) -> float:
    return float(row_errors(ours, theirs).max())


def row_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """||row - their row|| / ||their row|| float64 [rows]. Rows lie along every axis but the last;
    rows far smaller than typical count as typical.

    A few rows at a time: no float64 copy of all logits exists.
    """
    if theirs.dim() == 2:  # a number a row
        ours, theirs = ours[..., None], theirs[..., None]
    ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)
    step = max(1, _CHUNK_ELEMENTS // max(1, theirs.shape[-1]))
    sizes, errors = [], []
    for start in range(0, theirs.shape[0], step):
        exact, mine = (rows[start : start + step].double() for rows in (theirs, ours))
        sizes.append(exact.masked_fill(exact.isinf(), 0.0).norm(dim=-1))
        errors.append((mine - exact).masked_fill(mine == exact, 0.0).norm(dim=-1))
    size, error = torch.cat(sizes), torch.cat(errors)
    return error / size.clamp(min=float(size.mean()) * 1e-2 + 1e-12)
