"""Dispatch: what stands in for the user's graph. Each call runs one program, and says which."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focus_compile.capture import Capture
from focus_compile.config import FocusConfig
from focus_compile.errors import RefusalError, SelfCheckError
from focus_compile.fallback import refuse, warn_once
from focus_compile.kernels.confidence.op import confidence
from focus_compile.plan import Plan
from focus_compile.policies.presets import policy_for
from focus_compile.runtime.buckets import bucket_for, pack_rows
from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.guard import (
    CallInputs,
    compare_inputs,
    why_not_comparable,
    why_not_continued,
)
from focus_compile.runtime.latest_rows import LatestRows
from focus_compile.runtime.observe import Flags, observe
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.record import StepRecord, active_history
from focus_compile.runtime.self_check import check_plan
from focus_compile.runtime.store import STORE, Slot
from focus_compile.runtime.trajectory import Blocks, Trajectory, current_stream
from focus_compile.runtime.warm_up import WarmUp, asked_for, buckets_within

__all__ = ["NO_MASKS", "Dispatcher"]

log = logging.getLogger(__name__)

_INFERENCE_WEIGHTS = (
    "the weights were made in torch.inference_mode(), which hides changes of them. "
    "Make or load the model outside it."
)


NO_MASKS = "no mask token in the input"
_NO_TOKEN = -1


class Dispatcher:
    """Runs a captured graph incrementally where a call continues a trajectory, else exactly.

    Called by Dynamo with the graph's flat inputs; returns its flat outputs. Rows that a step does
    not compute return their latest computed values.
    """

    def __init__(self, captured: Capture, plan: Plan, programs: Programs, config: FocusConfig):
        self.plan, self.programs, self.config = plan, programs, config
        self.policy = policy_for(config)
        self._original = captured.original
        self._inputs = [*plan.positions("guarded"), plan.ids.position]
        self._first_weight = plan.positions("weight")[0]
        self._mask_token_id = -1 if config.mask_token_id is None else config.mask_token_id
        self._checked = False
        self._refused: str | None = None

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        started = time.perf_counter()
        compiled = self._compile_seconds
        arguments = list(args)
        for at in self._inputs:
            arguments[at] = args[at].contiguous()
        with torch.no_grad():
            outputs, entry = self._run(arguments)
        history = active_history()
        if history is not None:
            entry["milliseconds"] = (time.perf_counter() - started) * 1e3
            entry["compile_seconds"] = self._compile_seconds - compiled
            history.append(StepRecord(**entry))
        return outputs

    @property
    def _compile_seconds(self) -> float:
        """Spent on compiling programs so far."""
        return self.programs.compile_seconds

    def _run(self, args: Sequence[Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        if self._refused is not None:
            return self._exact(args, self._refused)
        if self.config.policy == "exact":
            return self._exact(args, 'policy="exact"')
        slot = STORE.slot(args[self._first_weight])
        if not slot.lock.acquire(blocking=False):
            return self._busy(args, "another thread is using the model's trajectory")
        try:
            # Not bound to a name here: what is replaced must be gone before its successor is made.
            if slot.trajectory is not None and slot.trajectory.belongs_to_another_thread():
                return self._busy(args, "another thread owns the model's trajectory")
            return self._incremental(slot, args)
        finally:
            slot.lock.release()

    def _busy(self, args: Sequence[Any], why: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Exact because of another thread: worth a word only where masks are left to decode."""
        if not self._any_masked(args):
            return self._exact(args, NO_MASKS)
        return self._exact(args, self._refuse(why))

    def _any_masked(self, args: Sequence[Any]) -> bool:
        return bool(args[self.plan.ids.position].eq(self._mask_token_id).any())

    def _exact(self, args: Sequence[Any], why: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        ids = args[self.plan.ids.position]
        outputs = self.programs.exact(*args)
        keys = self._keys_read(ids.shape[1], None)
        return outputs, {"program": "exact", "why": why, "rows": ids.numel(), "keys": keys}

    def _incremental(
        self, slot: Slot, args: Sequence[Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Refresh or step. The slot is empty while state is in flux, so nothing torn survives."""
        call = CallInputs.of(self.plan, args)
        held = slot.trajectory if isinstance(slot.trajectory, Trajectory) else None
        why, flags = self._compare(held, call)
        if not (self._any_masked(args) if flags is None else flags.masked):
            return self._exact(args, NO_MASKS)
        slot.trajectory = None
        if why is None and held is not None and flags is not None:
            outputs, entry = self._continue(held, args, flags)
            slot.trajectory = held
            return outputs, entry
        refusal = self._why_cannot_begin(call)
        if refusal is not None:
            return self._exact(args, self._refuse(refusal))
        blocks, first_row = self._place(call)
        if held is not None and not (held.owner is self and held.fits(call, first_row)):
            held = None
        if held is None:
            plan = self.programs.memory_plan(args, first_row)
            problem = plan.why_no_room(call.ids.device)
            if problem is not None:
                return self._exact(args, self._refuse(problem))
            held = self._allocate(args, call, first_row)
        held.merged = self.programs.merge(args, held.merged)
        held.begin(call, blocks, self.plan.key_block, self.config.keep_ratio)
        outputs, entry = self._refresh(held, args, f"new trajectory: {why}")
        if not self._checked:
            self._check(held, args)
            self._checked = True
            if self._refused is not None:
                return self._exact(args, self._refused)
        warm_up = asked_for()
        if warm_up is not None:
            warm_up.append(self._warm_up(held, args, call))
        slot.trajectory = held
        return outputs, entry

    def _compare(
        self, held: Trajectory | None, call: CallInputs
    ) -> tuple[str | None, Flags | None]:
        """Why the call does not continue what is held, and its flags where they were read."""
        if asked_for() is not None:
            return "warm-up", None
        why = why_not_comparable(held, self, call, current_stream(call.ids))
        if why is not None or held is None:
            return why, None
        pending = self._observe(held, call)
        same_weights = held.weights.are(call.weights)  # while the device compares the ids
        flags = Flags(*pending.tolist())
        return why_not_continued(same_weights, flags), flags

    def _warm_up(self, trajectory: Trajectory, args: Sequence[Any], call: CallInputs) -> WarmUp:
        """Run a step of every bucket, and capture it; afterwards no call continues the trajectory.

        One compiled step serves all buckets, so that one is enough where nothing is captured.
        """
        t, graphs = trajectory, trajectory.graphs
        compiled, length = self.programs.compile_seconds, t.ids.shape[1]
        buckets = buckets_within(
            length - t.first_row, self.config.buckets, length, t.ids.device.type
        )
        buckets = buckets if graphs.enabled else buckets[:1]
        for _ in range(2):
            self._observe(t, call)
            for bucket in buckets:
                t.active.zero_()
                t.active[:, t.first_row : t.first_row + bucket] = True
                t.focus.copy_(t.active)
                self._run_bucket(t, args, bucket)
        t.ids.fill_(_NO_TOKEN)
        return WarmUp(buckets, graphs.captured, self.programs.compile_seconds - compiled)

    def _observe(self, trajectory: Trajectory, call: CallInputs) -> Tensor:
        """Compare the call with the trajectory on its device: the `Flags`, not waited for."""
        policy = self.policy
        assert policy is not None
        trajectory.incoming.copy_(call.ids)
        compare_inputs(trajectory, call)
        return trajectory.graphs.run(
            "observe",
            lambda: observe(trajectory, policy, self._mask_token_id, self.config.block_length),
        )

    def _why_cannot_begin(self, call: CallInputs) -> str | None:
        if any(weight.is_inference() for weight in call.weights):
            return _INFERENCE_WEIGHTS
        return None

    def _place(self, call: CallInputs) -> tuple[Blocks, int]:
        """Where the response's blocks lie, and the first row that a refresh must return."""
        blocks = Blocks.of(call.ids.eq(self._mask_token_id), self.config.block_length)
        if self.plan.logits_rows == "all":
            return blocks, 0
        return blocks, max(0, int(blocks.response_start.min()) - self.config.window)

    def _allocate(self, args: Sequence[Any], call: CallInputs, first_row: int) -> Trajectory:
        device = call.ids.device
        graphs = DeviceGraphs(self._captures(call), self._no_graphs, device)
        caches = self.programs.allocate(args)
        with torch.inference_mode(False):
            return Trajectory.allocate(self, call, first_row, caches, graphs)

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

    def _continue(
        self, trajectory: Trajectory, args: Sequence[Any], flags: Flags
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        recall = None
        if trajectory.steps_since_refresh and flags.decided:
            recall = flags.predicted / flags.decided
        why = self._why_refresh(trajectory, flags)
        if why is not None:
            outputs, entry = self._refresh(trajectory, args, why)
        else:
            outputs, entry = self._step(trajectory, args, flags)
        return outputs, entry | {"recall": recall}

    def _why_refresh(self, trajectory: Trajectory, flags: Flags) -> str | None:
        refresh = self.config.refresh
        if refresh == "every-step":
            return "every step"
        if refresh == "block":
            return "block entry" if flags.entered else None
        due = trajectory.steps_since_refresh + 1 >= int(refresh)
        return f"every {refresh} calls" if due else None

    def _refresh(
        self, trajectory: Trajectory, args: Sequence[Any], why: str
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        t = trajectory
        outputs = self.programs.refresh(*args, t.rows, *t.caches)
        t.ids.copy_(t.incoming)
        masked = t.ids.eq(self._mask_token_id)
        first = int(t.blocks.response_start.min())
        probability, _ = confidence(outputs[self.plan.logits][:, first - t.first_row :])
        t.confidence.zero_()
        t.confidence[:, first:] = probability
        t.confidence.masked_fill_(~masked, 0.0)
        if t.outputs:
            for latest, values in zip(t.outputs, outputs, strict=True):
                latest.replace(values)
        else:
            t.outputs = [LatestRows(values, t.first_row) for values in outputs]
        pairs = zip(t.outputs, outputs, strict=True)
        returned = tuple(
            latest.hand_out() if t.first_row else latest.lend(values) for latest, values in pairs
        )
        t.refreshed_at.copy_(t.blocks.current(masked))
        t.predicted.zero_()
        t.steps_since_refresh = 0
        keys = self._keys_read(t.ids.shape[1], None)
        entry = {"program": "refresh", "why": why, "rows": t.ids.numel(), "keys": keys}
        return returned, entry

    def _step(
        self, trajectory: Trajectory, args: Sequence[Any], flags: Flags
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        t = trajectory
        bucket = bucket_for(flags.largest, self.config.buckets, t.ids.shape[1], t.ids.device.type)
        self._run_bucket(t, args, bucket)
        outputs = tuple(latest.hand_out() for latest in t.outputs)
        t.steps_since_refresh += 1
        entry = {
            "program": "step",
            "why": "continues the trajectory",
            "rows": flags.rows,
            "bucket": bucket,
            "keys": self._keys_read(t.ids.shape[1], t),
        }
        return outputs, entry

    def _run_bucket(self, trajectory: Trajectory, args: Sequence[Any], bucket: int) -> None:
        """A step of the trajectory's active rows, as one CUDA graph where that is captured."""
        t = trajectory
        rows = t.graphs.run(("step", bucket), lambda: self._advance(t, args, bucket))
        if t.graphs.captured:
            rows = rows.clone()  # the next replay overwrites it
        for latest in t.outputs:
            latest.missed(rows)

    def _advance(self, trajectory: Trajectory, args: Sequence[Any], bucket: int) -> Tensor:
        """The device's part of a step; returns the rows computed, int64 [batch, bucket]."""
        t = trajectory
        t.ids.copy_(t.incoming)
        packed = pack_rows(t.active, t.focus, bucket)
        computed = self.programs.run_step(
            self._own_inputs(t, args), packed, t.candidates, t.keep, [*t.caches, *t.merged]
        )
        probability, _ = confidence(computed[self.plan.logits])
        t.confidence.scatter_(1, packed.rows, probability)
        for latest, values in zip(t.outputs, computed, strict=False):
            latest.write(packed.rows, values)
        t.predicted.copy_(t.focus)
        return packed.rows

    def _own_inputs(self, trajectory: Trajectory, args: Sequence[Any]) -> list[Any]:
        """The call's inputs with the trajectory's equal tensors, which stay where they are."""
        own = list(args)
        own[self.plan.ids.position] = trajectory.ids
        for at, tensor in zip(self.plan.positions("guarded"), trajectory.guarded, strict=True):
            own[at] = tensor
        return own

    def _keys_read(self, length: int, trajectory: Trajectory | None) -> dict[str, int]:
        """Keys that each layer of a region reads, for sequence 0; all of them outside a step."""
        keys = dict.fromkeys((site.region for site in self.plan.sites), length)
        if trajectory is not None and "sparse-suffix" in keys:
            block = self.plan.key_block
            candidates, kept = trajectory.prompt_blocks
            sinks = min(self.plan.sink_tokens, (candidates - kept) * block)
            keys["sparse-suffix"] = length - (candidates - kept) * block + sinks
        return keys

    def _check(self, trajectory: Trajectory, args: Sequence[Any]) -> None:
        """Compare the first run with the model; a plan that fails is never used."""
        problem = check_plan(self.programs, self._original, args, trajectory, self.config.buckets)
        if problem is None:
            return
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
