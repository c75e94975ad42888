"""`refresh="adaptive"`: renew some prompt rows, and estimate what the others cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.policies.adaptive_refresh import likely_read, rows_to_renew
from focus_compile.runtime.buckets import ActiveRows, bucket_for, pack_rows
from focus_compile.runtime.programs import MOST_PROBES, MOST_READERS, Programs
from focus_compile.runtime.trajectory import Trajectory

__all__ = ["GROWTH", "Renewed", "forget_ages", "judge_all", "renew"]

GROWTH = 3
"""How many times as many rows are renewed where the first ones leave too large an error."""
ROW_TILE = defaultdict(lambda: 128, cpu=32)
"""Rows are padded to a multiple of so many, by kind of device: many rows are bound by arithmetic,
one program serves any number of them, and none is captured as a graph."""


@dataclass(frozen=True)
class Renewed:
    """What a partial refresh computed.

    rows int64 [batch, bucket]; outputs: of these rows; error: of the worst site and sequence, the
    relative error of the attention output that the rows left as they are cause, estimated;
    computed, prompt_rows: rows over the batch, and those of them before the response.
    """

    rows: Tensor
    outputs: tuple[Tensor, ...]
    error: float
    computed: int
    prompt_rows: int


def forget_ages(t: Trajectory, sink_tokens: int) -> None:
    """All rows were just computed."""
    t.age.zero_()
    prompt = ~t.blocks.in_response(t.ids)
    if not t.measured:
        t.received.copy_(likely_read(prompt, t.blocks.response_start, sink_tokens))


def renew(
    t: Trajectory, programs: Programs, args: Sequence[Any], config: FocusConfig, share: float
) -> Renewed:
    """Recompute the response, and `share` of each prompt, with all keys.

    Leaves their K/V, the summaries, ages and the attention received in the trajectory.
    """
    response = t.blocks.in_response(t.ids)
    generator = torch.Generator().manual_seed(t.renewals)
    renewal = rows_to_renew(
        t.received, t.age, ~response, share, config.max_age, MOST_PROBES, generator
    )
    active = renewal.rows | response
    active[:, -1] |= ~active.any(1)
    counts = active.sum(1)
    length, device = t.ids.shape[1], t.ids.device
    bucket = bucket_for(int(counts.max()), (ROW_TILE[device.type],), length, device.type)
    rows = pack_rows(active, active, bucket).rows
    slots = active.cumsum(1) - 1
    readers = _some(_readers(t, active), active, MOST_READERS)
    probes = _some(renewal.weight > 0, active, MOST_PROBES)
    *outputs, errors, received = programs.run_partial(
        args,
        (
            rows,
            slots.gather(1, readers.rows),
            readers.row_weight,
            ~active,
            slots.gather(1, probes.rows),
            renewal.weight.gather(1, probes.rows) * probes.row_weight,
        ),
        t.caches,
    )
    t.age.add_(1).masked_fill_(active, 0)
    t.received.copy_(received)
    t.measured, t.renewals = True, t.renewals + 1
    moved, size = errors.unbind(-1)
    error = (moved / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt().max()
    return Renewed(rows, tuple(outputs), float(error), int(counts.sum()), int(renewal.rows.sum()))


def judge_all(packed: ActiveRows, active: Tensor) -> tuple[Tensor, ...]:
    """Inputs of a partial refresh in which the active rows judge one another."""
    slots = active.cumsum(1) - 1
    readers, probes = (_some(active, active, count) for count in (MOST_READERS, MOST_PROBES))
    return (
        packed.rows,
        slots.gather(1, readers.rows),
        readers.row_weight,
        ~active,
        slots.gather(1, probes.rows),
        probes.row_weight,
    )


def _readers(t: Trajectory, active: Tensor) -> Tensor:
    """Rows of each sequence's current block, evenly spaced; none of a finished one."""
    masked = t.ids.eq(t.mask_token_id)
    block = t.blocks.current(masked)
    start = t.blocks.start_of(block)[:, None]
    positions = torch.arange(active.shape[1], device=active.device)
    width = t.blocks.block_length
    apart = max(1, -(-width // MOST_READERS))
    offset = positions - start
    inside = (offset >= 0) & (offset < width) & (offset % apart == 0)
    return active & inside & (block >= 0)[:, None]


def _some(chosen: Tensor, active: Tensor, count: int) -> ActiveRows:
    """Positions chosen, padded to `count` with weight 0; of a sequence without any, its first
    active ones of weight 0."""
    none = ~chosen.any(1, keepdim=True)
    packed = pack_rows(torch.where(none, active, chosen), active, count)
    packed.row_weight.masked_fill_(none, 0.0)
    return packed
