"""The guard: proves on every call that it continues the trajectory, or says why not.

What the host knows is checked here; what lies on the device is compared there (`observe`) and read
with the call's other flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from focus_compile.plan import Plan

if TYPE_CHECKING:
    from focus_compile.runtime.observe import Flags
    from focus_compile.runtime.trajectory import Trajectory

__all__ = ["CallInputs", "compare_inputs", "why_not_comparable", "why_not_continued"]


@dataclass(frozen=True)
class CallInputs:
    """One call's inputs by role; numbers: sizes and whatever else Dynamo passes as a number."""

    ids: Tensor
    guarded: tuple[Tensor, ...]
    numbers: tuple[Any, ...]
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, plan: Plan, args: Sequence[Any]) -> CallInputs:
        guarded, numbers, weights = (
            tuple(args[at] for at in plan.positions(role)) for role in ("guarded", "size", "weight")
        )
        return cls(args[plan.ids.position], guarded, numbers, weights)


def why_not_comparable(
    trajectory: Trajectory | None, owner: object, call: CallInputs, stream: int
) -> str | None:
    """None where the call has the trajectory's shapes, else what broke it."""
    if trajectory is None:
        return "first call"
    if trajectory.owner is not owner:
        return "another compiled graph ran this model"
    if trajectory.ids.shape != call.ids.shape or trajectory.ids.device != call.ids.device:
        return "the shape of the ids changed"
    if trajectory.stream != stream:
        return "the CUDA stream changed"
    shapes = [(mine.shape, given.shape) for mine, given in _guarded(trajectory, call)]
    if trajectory.numbers != call.numbers or any(mine != given for mine, given in shapes):
        return "another input changed"
    return None


def compare_inputs(trajectory: Trajectory, call: CallInputs) -> None:
    """Note on the device whether the guarded inputs are those of the trajectory."""
    if call.guarded:
        trajectory.same_inputs.fill_(True)
    for mine, given in _guarded(trajectory, call):
        trajectory.same_inputs.logical_and_(torch.eq(mine, given).all())


def why_not_continued(same_weights: bool, flags: Flags) -> str | None:
    """None where a comparable call continues the trajectory, else what broke it."""
    if not same_weights:
        return "the weights changed"
    if not flags.same_inputs:
        return "another input changed"
    if not flags.in_response:
        return "ids changed before the response"
    if not flags.mostly_kept:
        return "ids changed other than from mask to token"
    if flags.fits_other:
        return "ids go on from an earlier call than the last"
    return None


def _guarded(trajectory: Trajectory, call: CallInputs) -> list[tuple[Tensor, Tensor]]:
    return list(zip(trajectory.guarded, call.guarded, strict=True))
