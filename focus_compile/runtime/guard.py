"""The guard: proves on every call that it continues the trajectory, or says why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.plan import Plan
from focus_compile.runtime.trajectory import Trajectory, masks_became_tokens

__all__ = ["CallInputs", "why_new_trajectory"]


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


def why_new_trajectory(
    trajectory: Trajectory | None, owner: object, call: CallInputs, mask_token_id: int
) -> str | None:
    """None where the call continues the trajectory, else what broke it."""
    if trajectory is None:
        return "first call"
    if trajectory.owner is not owner:
        return "another compiled graph ran this model"
    if not trajectory.weights.are(call.weights):
        return "the weights changed"
    if trajectory.ids.shape != call.ids.shape or trajectory.ids.device != call.ids.device:
        return "the shape of the ids changed"
    if trajectory.numbers != call.numbers:
        return "another input changed"
    for before, after in zip(trajectory.guarded, call.guarded, strict=True):
        if before.shape != after.shape or not torch.equal(before, after):
            return "another input changed"
    if not masks_became_tokens(trajectory.ids, call.ids, mask_token_id):
        return "ids changed other than from mask to token"
    return None
