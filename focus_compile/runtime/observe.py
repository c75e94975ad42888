"""What a call changed, and which rows its step would compute: device work, and one read of flags.

Nothing here waits for the device; the flags are what the host reads, once per call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from focus_compile.policies.base import Policy, StepView
from focus_compile.runtime.trajectory import Trajectory

__all__ = ["Flags", "observe"]


class Flags(NamedTuple):
    """What the host learns of a call that has the shapes of its trajectory."""

    masked: int
    """Whether any position is a mask."""
    same_inputs: int
    """Whether the other inputs are those of the trajectory."""
    decoded_only: int
    """Whether ids changed only from mask to token."""
    entered: int
    """Whether a sequence's first mask is in another block than at the last refresh."""
    largest: int
    """Active rows of the sequence that has most."""
    rows: int
    """Active rows over the batch."""
    decided: int
    """Positions decided since the last call."""
    predicted: int
    """Those of them that the last step's focus rows had predicted."""


def observe(
    trajectory: Trajectory, policy: Policy, mask_token_id: int, block_length: int
) -> Tensor:
    """Compare `trajectory.incoming` with its ids, and let the policy select rows.

    Leaves the active set, at least one row per sequence and always the changed rows, in
    `trajectory.active`, and the focus set in `trajectory.focus`. Returns `Flags`, int64 [8].
    """
    t = trajectory
    masked = t.incoming.eq(mask_token_id)
    changed = t.ids.ne(t.incoming)
    decoded_only = t.ids.eq(mask_token_id).logical_or_(changed.logical_not()).all()
    block = t.blocks.current(masked)
    entered = ((block != t.refreshed_at) & (block >= 0)).any()
    view = StepView(
        masked=masked,
        changed=changed,
        confidence=t.confidence,
        block=block,
        block_start=t.blocks.start_of(block),
        block_length=block_length,
    )
    selection = policy.select(view)
    active = selection.active | changed
    active[:, -1] |= ~active.any(1)
    t.active.copy_(active)
    t.focus.copy_(selection.focus)
    per_sequence = active.sum(1)
    flags: dict[str, Tensor] = {
        "masked": masked.any(),
        "same_inputs": t.same_inputs,
        "decoded_only": decoded_only,
        "entered": entered,
        "largest": per_sequence.max(),
        "rows": per_sequence.sum(),
        "decided": changed.sum(),
        "predicted": (changed & t.predicted).sum(),
    }
    return torch.stack([flags[name].to(torch.int64) for name in Flags._fields])
