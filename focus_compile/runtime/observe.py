"""What a call changed, and which rows its step would compute: device work, and one read of flags.

Nothing here waits for the device; the flags are what the host reads, once per call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from focus_compile.policies.base import Policy, StepView
from focus_compile.runtime.trajectory import Blocks, Trajectory

__all__ = ["PER_SEQUENCE", "Flags", "Observed", "observe"]


class Flags(NamedTuple):
    """What the host learns of a call that has the shapes of its trajectory."""

    masked: int
    """Whether any position is a mask."""
    same_inputs: int
    """Whether the other inputs are those of the trajectory."""
    decoded_only: int
    """Whether ids changed only from mask to token."""
    in_response: int
    """Whether ids changed only where the response is."""
    mostly_kept: int
    """Whether at most half of the tokens decided there changed."""
    fits_other: int
    """Whether ids go on with fewer changes from the trajectory that this one replaced."""
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
    differ: int = 0
    """Of a model that is split over ranks: in what these differ (`distributed/agreement.py`)."""


class Observed(NamedTuple):
    """The tensors of a `Trajectory` that are looked at, and those that are written: the last four.

    They stay where they are for as long as the trajectory lives.
    """

    incoming: Tensor
    ids: Tensor
    other: Tensor
    confidence: Tensor
    best: Tensor
    predicted: Tensor
    response_start: Tensor
    refreshed_at: Tensor
    same_inputs: Tensor
    scored_before: Tensor
    scored: Tensor
    active: Tensor
    focus: Tensor
    foreseen: Tensor

    @classmethod
    def of(cls, trajectory: Trajectory) -> Observed:
        of_blocks = {"response_start": trajectory.blocks}
        return cls(*(getattr(of_blocks.get(name, trajectory), name) for name in cls._fields))


PER_SEQUENCE = ("response_start", "refreshed_at")
"""Those of `Observed` that have a number for each sequence."""


def observe(t: Observed, policy: Policy, mask_token_id: int, block_length: int) -> Tensor:
    """Compare `incoming` with the trajectory's ids, and let the policy select rows.

    Leaves the active set, at least one row per sequence and always the changed rows, in `active`,
    the focus rows in `focus`, and the positions that they score in `foreseen`. Returns `Flags` but
    for the last, int64 [11].
    """
    blocks = Blocks(t.response_start, block_length)
    masked = t.incoming.eq(mask_token_id)
    changed = t.ids.ne(t.incoming)
    response = blocks.in_response(masked)
    decided = t.ids.ne(mask_token_id)
    edited = changed & decided
    since_other = t.other.ne(t.incoming)
    from_other = (since_other & t.other.ne(mask_token_id)).any().logical_not_()
    block = blocks.current(masked)
    entered = ((block != t.refreshed_at) & (block >= 0)).any()
    shifted = _row_before_scores(t, changed & ~decided)
    view = StepView(
        masked=masked,
        changed=changed,
        confidence=torch.where(shifted, _of_row_before(t.confidence), t.confidence),
        block=block,
        block_start=blocks.start_of(block),
        block_length=block_length,
    )
    selection = policy.select(view)
    focus = torch.where(shifted, _rows_before(selection.focus), selection.focus)
    active = selection.active | changed | focus
    active[:, -1] |= ~active.any(1)
    t.active.copy_(active)
    t.focus.copy_(focus)
    t.foreseen.copy_(selection.focus)
    per_sequence = active.sum(1)
    flags: dict[str, Tensor] = {
        "masked": masked.any(),
        "same_inputs": t.same_inputs,
        "decoded_only": edited.any().logical_not_(),
        "in_response": (changed & ~response).any().logical_not_(),
        "mostly_kept": 2 * edited.sum() <= (decided & response).sum(),
        "fits_other": from_other & (since_other.sum() < changed.sum()),
        "entered": entered,
        "largest": per_sequence.max(),
        "rows": per_sequence.sum(),
        "decided": changed.sum(),
        "predicted": (changed & t.predicted).sum(),
    }
    return torch.stack([flags[name].to(torch.int64) for name in Flags._fields[:-1]])


def _row_before_scores(t: Observed, decoded: Tensor) -> Tensor:
    """Whether a position's score lies in the row before it, bool []; by the `decoded` positions,
    bool [batch, length], and those of earlier calls.

    So it is where a loop shifts the logits right by one, as Dream's does: then most positions were
    decided as the row before had it, and more than as their own row had it.
    """
    own = decoded & t.best.eq(t.incoming)
    before = decoded & _of_row_before(t.best).eq(t.incoming)
    counts = torch.stack([own.sum(), before.sum(), decoded.sum()])
    t.scored.copy_(t.scored_before + counts)
    return (t.scored[1] > t.scored[0]) & (2 * t.scored[1] > t.scored[2])


def _of_row_before(values: Tensor) -> Tensor:
    """At each position the value [batch, length] of the row before; the first row is its own."""
    return torch.cat([values[:, :1], values[:, :-1]], 1)


def _rows_before(positions: Tensor) -> Tensor:
    """The rows that score bool [batch, length] positions, where the row before does."""
    length = positions.shape[1]
    place = torch.arange(length, device=positions.device)
    after = positions.roll(-1, 1) & (place < length - 1)
    return after | (positions & (place == 0))
