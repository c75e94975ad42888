"""What one graph's plan costs: the memory of a trajectory, and what its programs launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from focus_compile.backend import BackendCall
from focus_compile.config import FocusConfig
from focus_compile.encoder_cache.plan import EncoderCachePlan
from focus_compile.lowering.kernel_list import (
    Launch,
    generated_code,
    launches_in,
    layers_of,
    summary,
)
from focus_compile.plan import Plan, Refusal
from focus_compile.runtime.buckets import bucket_for
from focus_compile.runtime.continuity import NEVER_CONTINUED
from focus_compile.runtime.memory_plan import MemoryPlan, readable
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.quality_guard import QualityGuard
from focus_compile.runtime.store import STORE
from focus_compile.runtime.trajectory import Blocks

__all__ = ["GraphReport", "TrajectoryMemory", "report"]

EXAMPLE_ROWS = 32
"""Active rows that a listed step has; its kernels serve any number."""


@dataclass(frozen=True)
class TrajectoryMemory:
    """What a trajectory of the traced ids takes, by the choice of `logits`."""

    all_rows: MemoryPlan
    response: MemoryPlan | None
    """None where the ids hold no mask, so that no response is known."""
    chosen: str

    @property
    def plan(self) -> MemoryPlan:
        """Under the option in force; all rows while no response is known."""
        return self.response if self.chosen == "response" and self.response else self.all_rows

    @property
    def saved_by_response(self) -> int | None:
        """Bytes that `logits="response"` takes less than `"all"`."""
        return None if self.response is None else self.all_rows.total - self.response.total

    def to_dict(self) -> dict[str, Any]:
        """Bytes."""
        more = {"total": self.plan.total, "saved_by_response": self.saved_by_response}
        return self.plan.to_dict() | more

    def __str__(self) -> str:
        saved = self.saved_by_response
        if saved is None:
            return f"  a trajectory takes {self.plan}; no mask in the ids: logits of all rows"
        verb = "saves" if self.chosen == "response" else "would save"
        return f'  a trajectory takes {self.plan}; logits="response" {verb} {readable(saved)}'


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo made: its plan or refusals, and what the plan costs."""

    plan: Plan | EncoderCachePlan | None
    refusals: tuple[Refusal, ...]
    memory: TrajectoryMemory | None = None
    given_up: bool = False
    """Whether the model's calls so far never continued one another, so that they run exactly."""
    guard: QualityGuard | None = None
    """What guarded calls of the model found, where some were."""
    launches: dict[str, list[Launch]] | None = None
    """Of the refresh and the step program; None unless asked for."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        if self.plan is None:
            return {"accepted": False, "refusals": [r.to_dict() for r in self.refusals]}
        known = self.plan.to_dict()
        if isinstance(self.plan, EncoderCachePlan):
            return known
        known["calls_never_continued"] = self.given_up
        if self.guard is not None:
            known["guard"] = self.guard.to_dict()
        if self.memory is not None:
            known["memory"] = self.memory.to_dict()
        if self.launches is not None:
            known["kernels"] = {
                program: {
                    "launches": [
                        asdict(launch) | {"ops": list(launch.ops)} for launch in all_of_it
                    ],
                    "layers": {name: len(own) for name, own in self._layers(all_of_it).items()},
                }
                for program, all_of_it in self.launches.items()
            }
        return known

    def _layers(self, launches: Sequence[Launch]) -> dict[str, list[Launch]]:
        assert isinstance(self.plan, Plan)
        return layers_of(launches, [site.region for site in self.plan.sites])

    def __str__(self) -> str:
        if self.plan is None:
            refused = [f"  refused: {refusal}" for refusal in self.refusals]
            return "\n".join(["plan: exact program (refused)", *refused])
        lines = [str(self.plan)]
        if self.memory is not None:
            lines.append(str(self.memory))
        if self.given_up:
            lines.append(f"  calls run exactly for now: {NEVER_CONTINUED}")
        if self.guard is not None:
            lines.append(f"  guard: {self.guard}")
        for program, launches in (self.launches or {}).items():
            lines.append(f"  {program}: {summary(launches)}")
            for region, own in self._layers(launches).items():
                lines.append(f"    a {region} layer: {summary(own, ops=True)}")
        if self.launches:
            lines.append("    beside the step program: confidence of its logits, once")
        return "\n".join(lines)


def report(
    call: BackendCall, inputs: Sequence[Any], config: FocusConfig, kernels: bool
) -> GraphReport:
    """What explain says of one graph; `inputs`: of a real call. kernels: compile both programs."""
    plan = call.plan
    if call.cache_plan is not None:
        return GraphReport(call.cache_plan, call.refusals)
    if plan is None or call.captured is None or call.graphs is None or config.policy == "exact":
        return GraphReport(plan, call.refusals)
    programs = Programs.build(call.captured, call.graphs, plan, config)
    memory = _memory(programs, inputs, config)
    launches = None
    if kernels and config.lowering == "inductor":
        launches = _launches(programs, inputs, config)
    weight = inputs[plan.positions("weight")[0]]
    given_up, guard = STORE.continuity(weight).given_up, STORE.guard(weight)
    found = guard if guard.checks else None
    return GraphReport(plan, call.refusals, memory, given_up, found, launches)


def _memory(programs: Programs, inputs: Sequence[Any], config: FocusConfig) -> TrajectoryMemory:
    masked = inputs[programs.plan.ids.position].eq(config.mask_token_id)
    response = None
    if masked.any():
        start = int(Blocks.of(masked, config.block_length).response_start.min())
        response = programs.memory_plan(inputs, max(0, start - config.window))
    return TrajectoryMemory(programs.memory_plan(inputs, 0), response, config.logits)


def _launches(
    programs: Programs, inputs: Sequence[Any], config: FocusConfig
) -> dict[str, list[Launch]]:
    """Compile both programs for tensors that take no memory."""
    ids: Tensor = inputs[programs.plan.ids.position]
    batch, length = ids.shape
    count = bucket_for(min(EXAMPLE_ROWS, length), config.buckets, length, ids.device.type)
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = programs.allocate(inputs)
        merged = programs.merge(inputs, [])
        rows = ids.new_empty((batch, count))
        weight = torch.empty((batch, count), device=ids.device)
        blocks = ids.new_empty(batch)
    given = {
        "refresh": (programs.refresh, [rows, *state]),
        "step": (programs.step, [rows, weight, weight, blocks, blocks, *state, *merged]),
    }
    found = {}
    for name, (program, more) in given.items():
        with generated_code() as code:
            program.prepare(*inputs, *more)
        alike = len(set(program.segments)) == len(code)
        texts = [code[at] for at in program.segments] if alike else code
        found[name] = [launch for text in texts for launch in launches_in(text)]
    return found
