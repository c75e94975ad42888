"""`observe` compiled: the same flags and rows as op by op, one program for many sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from focus_compile.errors import CompileError
from focus_compile.policies.base import Policy
from focus_compile.policies.block_caches import DualCache
from focus_compile.policies.focus_dllm import FocusDllm
from focus_compile.runtime import observe_program
from focus_compile.runtime.observe import Observed, observe
from focus_compile.runtime.observe_program import ObserveProgram
from tests.runtime.test_guard import trajectory_of
from tests.runtime.tiny import MASK

BLOCK = 6


def seen(batch: int, length: int, generator: torch.Generator) -> Observed:
    """A trajectory that some random call may or may not continue."""

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    ids = random(MASK + 1, batch, length)
    held = trajectory_of(ids)
    held.incoming.copy_(torch.where(random(4, batch, length) > 0, ids, random(MASK + 1, 1, 1)))
    held.other.copy_(random(MASK + 1, batch, length))
    held.confidence.copy_(torch.rand(batch, length, generator=generator))
    held.best.copy_(random(MASK, batch, length))
    held.predicted.copy_(random(2, batch, length).bool())
    held.refreshed_at.copy_(random(3, batch))
    held.scored_before.copy_(random(9, 3))
    return Observed.of(held)


def copied(tensors: Observed) -> Observed:
    return Observed(*(tensor.clone() for tensor in tensors))


def work_of(policy: Policy) -> Any:
    return lambda *tensors: observe(Observed(*tensors), policy, MASK, BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [FocusDllm(2, 3), DualCache()])
def test_one_program_of_a_policy_is_observe_at_all_sizes(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = work_of(policy)
    compiled = ObserveProgram(plain)
    for batch, length in ((2, 12), (2, 29), (3, 29), (5, 13), (7, 7)):
        for _ in range(3):
            ours = seen(batch, length, generator)
            theirs = copied(ours)
            assert torch.equal(compiled(*ours), plain(*theirs))
            for name, mine, other in zip(Observed._fields, ours, theirs, strict=True):
                assert torch.equal(mine, other), name
    assert not compiled._plain
    assert compiled.compilations == 1


@pytest.mark.slow
def test_sizes_that_it_is_another_work_for_get_a_program_of_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = work_of(FocusDllm(2, 3))
    compiled = ObserveProgram(plain)
    for batch, length in ((1, 4), (1, 16), (1, 9)):  # blocks are of 6
        ours = seen(batch, length, generator)
        theirs = copied(ours)
        assert torch.equal(compiled(*ours), plain(*theirs))
        assert torch.equal(ours.active, theirs.active)
    assert len(compiled._programs) == 2


@pytest.mark.parametrize("stage", ["traced", "compiled"])
def test_without_a_compiler_it_runs_as_it_is(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise CompileError("no compiler")

    owner = observe_program if stage == "traced" else observe_program.Program
    monkeypatch.setattr(owner, "_trace" if stage == "traced" else "_compile_with_inductor", fail)
    generator = torch.Generator().manual_seed(2)
    plain = work_of(FocusDllm(1, 2))
    compiled = ObserveProgram(plain)
    for _ in range(2):
        ours = seen(2, 12, generator)
        theirs = copied(ours)
        assert torch.equal(compiled(*ours), plain(*theirs))
    assert compiled._plain
