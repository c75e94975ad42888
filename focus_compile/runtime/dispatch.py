"""Dispatch: what stands in for the user's graph. Each call runs one program, and says which."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.capture import Capture
from focus_compile.config import FocusConfig
from focus_compile.errors import CompileError, RanksError, RefusalError, SelfCheckError
from focus_compile.fallback import refuse, warn_once
from focus_compile.plan import Plan
from focus_compile.policies.presets import policy_for
from focus_compile.runtime.continuity import NEVER_CONTINUED
from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.guard import (
    CallInputs,
    why_not_comparable,
    why_not_continued,
)
from focus_compile.runtime.inspection import Inspector, Source, active_inspector
from focus_compile.runtime.observe import Flags
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.record import StepRecord, is_watched, note
from focus_compile.runtime.self_check import check_plan
from focus_compile.runtime.store import STORE, Slot
from focus_compile.runtime.trajectory import Blocks, Trajectory, current_stream
from focus_compile.runtime.trajectory_calls import CONTINUES, REPEATED, Outcome, TrajectoryCalls
from focus_compile.runtime.warm_up import asked_for

__all__ = ["CONTINUES", "EDITED", "NO_MASKS", "REPEATED", "Dispatcher", "Outcome"]

log = logging.getLogger(__name__)

_INFERENCE_WEIGHTS = (
    "the weights were made in torch.inference_mode(), which hides changes of them. "
    "Make or load the model outside it."
)


NO_MASKS = "no mask token in the input"
EDITED = "decided tokens changed"
_NO_ROOM = "an incremental program ran out of memory"
_LESS_MEMORY = (
    'Decode fewer or shorter sequences at once, or set logits="response"; torch.compiler.reset() '
    "lets it be tried again."
)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an incremental program could not run. lasting: whether it never will."""

    reason: str
    lasting: bool


class Dispatcher:
    """Runs a captured graph incrementally where a call continues a trajectory, else exactly.

    Called by Dynamo with the graph's flat inputs; returns its flat outputs. Rows that a step does
    not compute return their latest computed values.
    """

    def __init__(self, captured: Capture, plan: Plan, programs: Programs, config: FocusConfig):
        self.plan, self.programs, self.config = plan, programs, config
        self.calls = TrajectoryCalls(plan, programs, config, policy_for(config))
        self.agreement = self.calls.agreement
        whole = plan.tail is None and not plan.writes
        self._model = captured.original if whole else captured.graph_module
        compared = [*plan.positions("guarded"), plan.ids.position]
        self._inputs = [*compared, *_tensors(captured, plan.positions("tail"))]
        self._first_weight = plan.positions("weight")[0]
        self._mask_token_id = -1 if config.mask_token_id is None else config.mask_token_id
        self._written = tuple(at for _, at in plan.writes)
        self._names = [info.name for info in captured.inputs]
        shown = {plan.ids.position, *plan.positions("guarded"), *plan.positions("tail")}
        self._shown = sorted(shown)
        self._memory: dict[tuple[int, ...], dict[str, int]] = {}
        """Bytes of a trajectory, by the sizes of inspected calls."""
        self._checked = False
        self._refused: str | None = None
        self._too_many: int | None = None
        """Tokens of a call that ran out of memory."""

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        started = time.perf_counter()
        inspector = active_inspector()
        if inspector is not None:
            inspector.begin(args[self.plan.ids.position])
        compiled = self._compile_seconds
        arguments = list(args)
        for at in self._inputs:
            arguments[at] = args[at].contiguous()
        with torch.no_grad():
            outputs, entry = self._run(arguments)
            of_model = outputs
            if entry["program"] != "exact":
                outputs, entry = self._answer(arguments, outputs, entry)
            for at in self._written:
                if arguments[at] is not args[at]:
                    args[at].copy_(arguments[at])
        if inspector is None and not is_watched():
            return outputs
        not_ours = 0.0 if inspector is None else inspector.waited()
        entry["milliseconds"] = (time.perf_counter() - started - not_ours) * 1e3
        entry["compile_seconds"] = self._compile_seconds - compiled
        record = StepRecord(**entry)
        note(record)
        if inspector is not None:
            self._show(inspector, record, arguments, of_model)
        return outputs

    def _show(
        self, inspector: Inspector, record: StepRecord, args: Sequence[Any], outputs: Any
    ) -> None:
        """Hand the call to who inspects it. outputs: of the model, before what follows it."""
        plan = self.plan
        held = STORE.slot(args[self._first_weight]).trajectory
        inspector.held_bytes = None if held is None else held.nbytes
        inputs = {self._names[at]: args[at] for at in self._shown if isinstance(args[at], Tensor)}
        whole = plan.tail is None and not plan.writes
        logits: Sequence[Tensor] | None = None
        if plan.logits is not None:
            logits = outputs[plan.logits : plan.logits + 1]
        elif record.program != "exact" or whole:
            logits = outputs[len(plan.outputs) - 2 : len(plan.outputs)]
        if record.program == "exact" and not whole:
            logits = None
        name = self._names[plan.ids.position]
        inspector.finish(record, self._source(args), name, inputs, logits)

    def _source(self, args: Sequence[Any]) -> Source:
        weights = [args[at] for at in self.plan.positions("weight")]
        sizes = tuple(args[self.plan.ids.position].shape)
        if self._memory.get(sizes) is None:
            _, first_row = self._place(args[self.plan.ids.position])
            self._memory[sizes] = self.programs.memory_plan(args, first_row).to_dict()
        memory = self._memory[sizes]
        return Source(self.config, self.plan, self._refused or "", weights, memory)

    def _answer(
        self, args: Sequence[Any], rows: Sequence[Tensor], entry: dict[str, Any]
    ) -> Outcome:
        """What the caller's function returns, of the model's outputs of all rows; writes into the
        inputs what it writes."""
        failure: _Failure | None = None
        try:
            outputs = self.programs.run_tail(args, rows)
        except (CompileError, torch.OutOfMemoryError) as error:
            failure = self._failure(args, error)
        if failure is not None:
            self._forget(args)
            return self._exact(args, self._give_up(failure))
        for result, at in self.plan.writes:
            args[at].copy_(outputs[result])
        return outputs[len(self.plan.writes) :], entry

    @property
    def _compile_seconds(self) -> float:
        """Spent on compiling programs so far."""
        return self.programs.compile_seconds + self.calls.compile_seconds

    def _run(self, args: Sequence[Any]) -> Outcome:
        outcome: Outcome | str
        if self._refused is not None:
            outcome = self._refused
        elif self.config.policy == "exact":
            outcome = 'policy="exact"'
        else:
            outcome = self._attempt(args)
        return self._exact(args, outcome) if isinstance(outcome, str) else outcome

    def _attempt(self, args: Sequence[Any]) -> Outcome | str:
        """What the incremental programs return, or why the exact one must run."""
        slot = STORE.slot(args[self._first_weight])
        if not slot.lock.acquire(blocking=False):
            return self._why_busy(args, "another thread is using the model's trajectory")
        try:
            # Not bound to a name here: what is replaced must be gone before its successor is made.
            if slot.trajectory is not None and slot.trajectory.belongs_to_another_thread():
                return self._why_busy(args, "another thread owns the model's trajectory")
            try:
                return self._incremental(slot, args)
            except (CompileError, torch.OutOfMemoryError) as error:
                failure = self._failure(args, error)
            # Here the failed call's frames are gone, and what they held.
            slot.trajectory = None
            return self._give_up(failure)
        finally:
            slot.lock.release()

    def _failure(self, args: Sequence[Any], error: Exception) -> _Failure:
        if isinstance(error, CompileError):
            return _Failure(str(error), lasting=True)
        return _Failure(self._no_room(args), lasting=False)

    def _give_up(self, failure: _Failure) -> str:
        """Say why the call runs exactly; under strict every call that fails so raises."""
        self._end_ranks(failure.reason)
        self._refuse(failure.reason)
        if failure.lasting:
            self._refused = failure.reason
        return failure.reason

    def _end_ranks(self, reason: str) -> None:
        """No rank can run another program than the others, which wait in a collective."""
        if self.agreement is not None:
            size = self.agreement.group.size()
            raise RanksError(f"focus_compile: rank {self.agreement.rank} of {size}: {reason}")

    def _forget(self, args: Sequence[Any]) -> None:
        """Free the trajectory, unless it is another thread's by now."""
        slot = STORE.slot(args[self._first_weight])
        if slot.lock.acquire(blocking=False):
            try:
                held = slot.trajectory
                if held is not None and not held.belongs_to_another_thread():
                    slot.trajectory = None
            finally:
                slot.lock.release()

    def _why_busy(self, args: Sequence[Any], why: str) -> str:
        """Exact because of another thread: worth a word only where masks are left to decode."""
        return self._refuse(why) if self._any_masked(args) else NO_MASKS

    def _any_masked(self, args: Sequence[Any]) -> bool:
        return bool(args[self.plan.ids.position].eq(self._mask_token_id).any())

    def _exact(self, args: Sequence[Any], why: str) -> Outcome:
        ids = args[self.plan.ids.position]
        outputs = self.programs.exact(*args)
        keys = self.calls.keys_read(ids.shape[1], None)
        return outputs, {"program": "exact", "why": why, "rows": ids.numel(), "keys": keys}

    def _incremental(self, slot: Slot, args: Sequence[Any]) -> Outcome | str:
        """Refresh or step. The slot is empty while state is in flux, so nothing torn survives."""
        call = CallInputs.of(self.plan, args)
        held = slot.trajectory if isinstance(slot.trajectory, Trajectory) else None
        inspector, begun = active_inspector(), time.perf_counter()
        why, flags = self._compare(held, call)
        if inspector is not None:
            inspector.guard_seconds = time.perf_counter() - begun
        if not (self._any_masked(args) if flags is None else flags.masked):
            return NO_MASKS
        if why is None and held is not None and flags is not None and flags.decoded_only:
            slot.trajectory = None
            outcome = self.calls.answer(held, args, flags, slot.guard)
            slot.trajectory = held
            if flags.decided:
                slot.continuity.continued()
                held.forget_other()
            return outcome
        del held  # what is replaced must be gone before its successor is made
        return self._start(slot, call, args, why)

    def _start(
        self, slot: Slot, call: CallInputs, args: Sequence[Any], why: str | None
    ) -> Outcome | str:
        """A refresh, of a new trajectory unless `why` is None; or why the call must be exact."""
        held = slot.trajectory if isinstance(slot.trajectory, Trajectory) else None
        slot.trajectory = None
        first_ids: Tensor | None = call.ids
        other: Tensor | None = None
        if held is not None and why is not None:
            slot.continuity.left(held.ids)
            other = slot.continuity.ids
        if asked_for() is None:
            first_ids = slot.continuity.first_ids(call.ids, self._mask_token_id)
        if first_ids is None:
            return self._refuse(NEVER_CONTINUED)
        if why is None and held is not None:
            outcome = self.calls.refresh(held, args, EDITED)
        else:
            blocks, first_row = self._place(first_ids)
            if held is not None and not (held.owner is self and held.fits(call, first_row)):
                held = None
            reason = self._why_cannot_begin(call)
            if held is None and reason is None:
                reason = self.programs.memory_plan(args, first_row).why_no_room(call.ids.device)
                reason = self._anywhere(reason, call.ids.device)
            if reason is not None:
                return self._refuse(reason)
            held = held or self._allocate(args, call, first_row)
            held.begin(call, blocks, self.plan.key_block, self.config.keep_ratio, other)
            outcome = self._begin(held, call, args, f"new trajectory: {why}")
            if self._refused is not None:
                return self._refused
        if asked_for() is None:
            slot.continuity.refreshed()
        slot.trajectory = held
        return outcome

    def _begin(self, held: Trajectory, call: CallInputs, args: Sequence[Any], why: str) -> Outcome:
        """The first refresh of a trajectory; the first of all is checked, and may be refused."""
        held.merged = self.programs.merge(args, held.merged)
        outcome = self.calls.refresh(held, args, why)
        if not self._checked:
            self._check(held, args)
            self._checked = True
        warm_up = asked_for()
        if warm_up is not None and self._refused is None:
            warm_up.append(self.calls.warm_up(held, args, call))
        return outcome

    def _compare(
        self, held: Trajectory | None, call: CallInputs
    ) -> tuple[str | None, Flags | None]:
        """Why the call does not continue what is held, and its flags where they were read."""
        if asked_for() is not None:
            return "warm-up", None
        why = why_not_comparable(held, self, call, current_stream(call.ids))
        if why is not None or held is None:
            self._require_agreement(call)
            return why, None
        pending = self.calls.observe(held, call)
        same_weights = held.weights.are(call.weights)  # while the device compares the ids
        flags = Flags(*pending.tolist())
        if self.agreement is not None:
            self.agreement.require(flags.differ)
        return why_not_continued(same_weights, flags), flags

    def _require_agreement(self, call: CallInputs) -> None:
        """Where a call continues nothing, all ranks must know it, and of the same call."""
        if self.agreement is not None:
            self.agreement.require(int(self.agreement.differ(call.ids, [])))

    def _anywhere(self, reason: str | None, device: torch.device) -> str | None:
        """The reason, of whichever rank has one: all must run the same program."""
        if self.agreement is None or not self.agreement.any(reason is not None, device):
            return reason
        return reason or "another rank has a reason, which it names"

    def _why_cannot_begin(self, call: CallInputs) -> str | None:
        if any(weight.is_inference() for weight in call.weights):
            return _INFERENCE_WEIGHTS
        if self._too_many is not None and call.ids.numel() >= self._too_many:
            return f"{_NO_ROOM} with {self._too_many} tokens. {_LESS_MEMORY}"
        return self.plan.why_not_shared(call.ids.shape[1])

    def _no_room(self, args: Sequence[Any]) -> str:
        """The reason why this call and larger ones run exactly from now on."""
        self._too_many = args[self.plan.ids.position].numel()
        return f"{_NO_ROOM} with {self._too_many} tokens. {_LESS_MEMORY}"

    def _place(self, ids: Tensor) -> tuple[Blocks, int]:
        """Where the response's blocks lie, and the first row that a refresh must return."""
        masked = ids.eq(self._mask_token_id)
        blocks = Blocks.of(masked, self.config.block_length)
        first_row = 0
        if self.plan.logits_rows == "response":
            first_row = max(0, int(blocks.response_start.min()) - self.config.window)
        return blocks.of_guided(ids, masked), first_row

    def _allocate(self, args: Sequence[Any], call: CallInputs, first_row: int) -> Trajectory:
        device = call.ids.device
        graphs = DeviceGraphs(self._captures(call), self._no_graphs, device)
        caches = self.programs.allocate(args)
        with torch.inference_mode(False):
            return Trajectory.allocate(self, call, first_row, caches, graphs, self._mask_token_id)

    def _captures(self, call: CallInputs) -> bool:
        """Whether steps become CUDA graphs: these hold the work of one device, and numbers that lie
        on the CPU as they were."""
        device = call.ids.device
        if not self.config.cuda_graphs or device.type != "cuda":
            return False
        others = {tensor.device for tensor in (*call.guarded, *call.weights)} - {device}
        if others:
            listed = ", ".join(sorted(map(str, others)))
            self._no_graphs(f"the ids are on {device}, other inputs or weights on {listed}")
        return not others

    def _check(self, trajectory: Trajectory, args: Sequence[Any]) -> None:
        """Compare the first run with the model; a plan that fails is never used."""
        problem = check_plan(self.programs, self._model, args, trajectory, self.config.buckets)
        problem = self._anywhere(problem, trajectory.ids.device)
        if problem is not None:
            self._refuse_plan(problem)

    def _refuse_plan(self, problem: str) -> None:
        """Never use the plan again: its first run was wrong."""
        message = f"the plan failed its first-run check: {problem}"
        if self.config.strict:
            raise SelfCheckError(f"focus_compile: {message}.")
        self._refused = self._refuse(message)

    def _no_graphs(self, why: str) -> None:
        """Steps launch their kernels one by one: slower, and as right."""
        reason = f"a step could not be captured as a CUDA graph ({why})"
        if self.config.strict:
            raise RefusalError(
                f"focus_compile: {reason} (strict=True; cuda_graphs=False allows it)"
            )
        warn_once(f"focus_compile launches kernels one by one: {reason}")

    def _refuse(self, reason: str) -> str:
        return refuse(reason, strict=self.config.strict)


def _tensors(captured: Capture, positions: Sequence[int]) -> list[int]:
    """Those of the inputs at `positions` that are tensors."""
    return [at for at in positions if isinstance(captured.values[at], Tensor)]
