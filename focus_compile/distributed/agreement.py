"""What all ranks of a split model must be at one about, and how they find out that they are not.

Ranks that decide differently run different collectives, and wait for one another for ever. So they
compare their options and plans once, before work starts, and in every call the ids that they were
given and the rows that they chose, as two numbers in one collective.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from focus_compile.errors import RanksError

__all__ = ["Agreement", "group_named", "group_of", "of_first_rank", "require_same", "why_lost"]

T = TypeVar("T")
WORLD = "world"
IDS_DIFFER, DECISIONS_DIFFER = 1, 2
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "recvBytes")
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


def group_of(values: Sequence[Any]) -> Any:
    """The process group that DTensors among `values` are split over; None where none is.

    Raises:
        RanksError: it can't be told, because they are split over several dimensions of a mesh.
    """
    from torch.distributed.tensor import DTensor, Replicate

    found: dict[str, Any] = {}
    for value in values:
        if not isinstance(value, DTensor):
            continue
        for at, placement in enumerate(value.placements):
            if not isinstance(placement, Replicate):
                group = value.device_mesh.get_group(at)
                found[group.group_name] = group
    if len(found) > 1:
        raise RanksError(
            "focus_compile: the weights are split over several dimensions of a device mesh; split "
            'them over one (mesh["tp"]).'
        )
    return next(iter(found.values()), None)


def group_named(name: str) -> Any:
    """The process group that torch.distributed calls so; "world": that of all processes.

    Raises:
        RanksError: there is none.
    """
    from torch import distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_initialized():
        raise RanksError(
            f"focus_compile: there is no process group {name!r}, as torch.distributed was not "
            "started. Run under torchrun, and call torch.distributed.init_process_group first."
        )
    if name == WORLD:
        return dist.group.WORLD
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    try:
        return resolve(name)
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"focus_compile: this process is in no process group {name!r}. Give the group itself, "
            "or its group_name."
        ) from error


def require_same(group: Any, facts: dict[str, Any]) -> None:
    """Compare facts of JSON types between the ranks of a group.

    Raises:
        RanksError: on every rank, if any two differ; says in what.
    """
    from torch import distributed as dist

    mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        for name in mine:
            if theirs.get(name) != everyone[0].get(name):
                raise RanksError(
                    f"focus_compile: ranks differ in {name}: rank 0 has {everyone[0].get(name)}, "
                    f"rank {rank} has {theirs.get(name)}. Give every rank the same model, options "
                    "and inputs."
                )


def of_first_rank(group: Any, value: T) -> T:
    """What the group's first rank has, on every rank; for values of Python's own types."""
    from torch import distributed as dist

    shared = [value]
    dist.broadcast_object_list(shared, src=dist.get_global_rank(group, 0), group=group)
    return shared[0]


def why_lost(error: BaseException) -> str | None:
    """What to say of an error of a collective that another rank did not take part in."""
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in _LOST):
        return None
    line = str(error).strip().splitlines()[0]
    return (
        "focus_compile: another rank has failed or stopped; its own message says why, where this "
        f"one ends for want of it ({line[:120]})."
    )


class Agreement:
    """The collective of every call, and those of rare decisions."""

    def __init__(self, group: str) -> None:
        self.name, self.group = group, group_named(group)

    @property
    def rank(self) -> int:
        return int(self.group.rank())

    def differ(self, ids: Tensor, decisions: Sequence[Tensor]) -> Tensor:
        """0, or the sum of IDS_DIFFER and DECISIONS_DIFFER, int64 []. Device work only.

        ids, decisions: bool or int64 of any shape.
        """
        chosen = torch.zeros((), dtype=torch.int64, device=ids.device)
        for at, values in enumerate(decisions):
            chosen = chosen * 31 + _number(values, at + 1)
        mine = torch.stack([_number(ids, 0), chosen])
        both = torch.cat([mine, ~mine])  # the largest of ~x is ~ the smallest of x
        ops = torch.ops._c10d_functional
        both = ops.wait_tensor(ops.all_reduce(both, "max", self.name))
        different = (both[:2] != ~both[2:]).long()
        return different[0] * IDS_DIFFER + different[1] * DECISIONS_DIFFER

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so on any rank."""
        ops = torch.ops._c10d_functional
        mine = torch.tensor([int(flag)], device=device)
        return bool(ops.wait_tensor(ops.all_reduce(mine, "max", self.name)))

    def require(self, found: int) -> None:
        """Raise RanksError if `differ` found something."""
        if not found:
            return
        what = "were called with different ids" if found & IDS_DIFFER else "chose different rows"
        why = (
            "Feed all of them the same prompts, and decide the same tokens on all: sample with a "
            "generator of one seed"
            if found & IDS_DIFFER
            else "Their logits differ: check that they loaded the same weights, and that the "
            "head's output is whole (Replicate())"
        )
        raise RanksError(f"focus_compile: ranks {what} (seen on rank {self.rank}). {why}.")


def _number(values: Tensor, seed: int) -> Tensor:
    """A hash of integers, int64 []: exact, in any order of the sum."""
    flat = values.flatten().long()
    place = torch.arange(1, flat.shape[0] + 1, device=flat.device) * _ODD + seed
    mixed = (flat + place) * _ODD
    mixed = (mixed ^ (mixed >> 29)) * place
    return mixed.sum() + flat.shape[0]
