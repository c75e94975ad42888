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
from focus_compile.errors import SelfCheckError
from focus_compile.fallback import refuse
from focus_compile.kernels.confidence.op import confidence
from focus_compile.plan import Plan
from focus_compile.policies.base import Selection, StepView
from focus_compile.policies.presets import policy_for
from focus_compile.runtime.buckets import ActiveRows, pack_rows
from focus_compile.runtime.guard import CallInputs, why_new_trajectory
from focus_compile.runtime.latest_rows import LatestRows
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.record import StepRecord, active_history
from focus_compile.runtime.self_check import check_plan
from focus_compile.runtime.store import STORE, Slot
from focus_compile.runtime.trajectory import Blocks, SeenWeights, Trajectory

__all__ = ["Dispatcher"]

log = logging.getLogger(__name__)

_INFERENCE_WEIGHTS = (
    "the weights were made in torch.inference_mode(), which hides changes of them. "
    "Make or load the model outside it."
)


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
        self._checked = False
        self._refused: str | None = None

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        started = time.perf_counter()
        compiled = self.programs.compile_seconds
        arguments = list(args)
        for at in self._inputs:
            arguments[at] = args[at].contiguous()
        with torch.no_grad():
            outputs, entry = self._run(arguments)
        history = active_history()
        if history is not None:
            entry["milliseconds"] = (time.perf_counter() - started) * 1e3
            entry["compile_seconds"] = self.programs.compile_seconds - compiled
            history.append(StepRecord(**entry))
        return outputs

    def _run(self, args: Sequence[Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        why_exact = self._why_exact(args)
        if why_exact is not None:
            return self._exact(args, why_exact)
        slot = STORE.slot(args[self._first_weight])
        if not slot.lock.acquire(blocking=False):
            return self._exact(args, self._refuse("another thread is using the model's trajectory"))
        try:
            held = slot.trajectory
            if held is not None and held.belongs_to_another_thread():
                return self._exact(args, self._refuse("another thread owns the model's trajectory"))
            return self._incremental(slot, args)
        finally:
            slot.lock.release()

    def _why_exact(self, args: Sequence[Any]) -> str | None:
        """Reasons that leave the trajectory alone."""
        if self._refused is not None:
            return self._refused
        if self.policy is None:
            return 'policy="exact"'
        if not bool(self._masked(args[self.plan.ids.position]).any()):
            return "no mask token in the input"
        if any(args[at].is_inference() for at in self.plan.positions("weight")):
            return self._refuse(_INFERENCE_WEIGHTS)
        return None

    def _masked(self, ids: Tensor) -> Tensor:
        assert self.config.mask_token_id is not None
        return ids.eq(self.config.mask_token_id)

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
        mask_token_id = self.config.mask_token_id
        assert mask_token_id is not None
        held, slot.trajectory = slot.trajectory, None
        why = why_new_trajectory(held, self, call, mask_token_id)
        if why is not None or held is None:
            del held
            trajectory = self._begin(args, call)
            outputs, entry = self._refresh(trajectory, args, call, f"new trajectory: {why}")
            if not self._checked:
                self._check(trajectory, args, outputs)
                self._checked = True
                if self._refused is not None:
                    return self._exact(args, self._refused)
        else:
            trajectory = held
            outputs, entry = self._continue(trajectory, args, call)
        slot.trajectory = trajectory
        return outputs, entry

    def _begin(self, args: Sequence[Any], call: CallInputs) -> Trajectory:
        masked = self._masked(call.ids)
        blocks = Blocks.of(masked, self.config.block_length)
        candidates = blocks.response_start // self.plan.key_block
        keep = (candidates.double() * self.config.keep_ratio).ceil().long()
        return Trajectory(
            owner=self,
            ids=call.ids.clone(),
            guarded=tuple(tensor.clone() for tensor in call.guarded),
            numbers=call.numbers,
            weights=SeenWeights(call.weights),
            blocks=blocks,
            candidates=candidates,
            keep=torch.minimum(keep, candidates),
            caches=self.programs.allocate(args),
        )

    def _continue(
        self, trajectory: Trajectory, args: Sequence[Any], call: CallInputs
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        masked = self._masked(call.ids)
        changed = trajectory.ids != call.ids
        recall = _recall(changed, trajectory.predicted)
        block = trajectory.blocks.current(masked)
        trajectory.ids.copy_(call.ids)
        why = self._why_refresh(trajectory, block)
        if why is not None:
            outputs, entry = self._refresh(trajectory, args, call, why)
            return outputs, entry | {"recall": recall}
        view = StepView(
            masked=masked,
            changed=changed,
            confidence=trajectory.confidence,
            block=block,
            block_start=trajectory.blocks.start_of(block),
            block_length=self.config.block_length,
        )
        outputs, entry = self._step(trajectory, args, self._select(view))
        return outputs, entry | {"recall": recall}

    def _why_refresh(self, trajectory: Trajectory, block: Tensor) -> str | None:
        refresh = self.config.refresh
        if refresh == "every-step":
            return "every step"
        if refresh == "block":
            entered = (block != trajectory.refreshed_at) & (block >= 0)
            return "block entry" if bool(entered.any()) else None
        due = trajectory.calls_since_refresh + 1 >= int(refresh)
        return f"every {refresh} calls" if due else None

    def _select(self, view: StepView) -> Selection:
        """The policy's rows, plus those whose token changed; at least one row per sequence."""
        assert self.policy is not None
        selection = self.policy.select(view)
        active = selection.active | view.changed
        idle = ~active.any(1)
        active[:, -1] |= idle
        return Selection(active, selection.focus)

    def _refresh(
        self, trajectory: Trajectory, args: Sequence[Any], call: CallInputs, why: str
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        outputs = self.programs.refresh(*args, *trajectory.caches)
        masked = self._masked(call.ids)
        logits = outputs[self.plan.logits]
        trajectory.confidence = torch.zeros(call.ids.shape, device=call.ids.device)
        trajectory.confidence[masked] = confidence(logits[masked])[0]
        if trajectory.outputs:
            pairs = zip(trajectory.outputs, outputs, strict=True)
            outputs = tuple(latest.replace(output) for latest, output in pairs)
        else:
            trajectory.outputs = [LatestRows(output) for output in outputs]
            pairs = zip(trajectory.outputs, outputs, strict=True)
            outputs = tuple(latest.lend(output) for latest, output in pairs)
        trajectory.refreshed_at = trajectory.blocks.current(masked)
        trajectory.calls_since_refresh = 0
        trajectory.predicted = None
        keys = self._keys_read(call.ids.shape[1], None)
        entry = {"program": "refresh", "why": why, "rows": call.ids.numel(), "keys": keys}
        return outputs, entry

    def _step(
        self, trajectory: Trajectory, args: Sequence[Any], selection: Selection
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        active = pack_rows(selection.active, selection.focus, self.config.buckets)
        computed = self.programs.run_step(
            args, active, trajectory.candidates, trajectory.keep, trajectory.caches
        )
        probability, _ = confidence(computed[self.plan.logits])
        trajectory.confidence.scatter_(1, active.rows, probability)
        outputs = tuple(
            latest.update(active.rows, values)
            for latest, values in zip(trajectory.outputs, computed, strict=False)
        )
        trajectory.calls_since_refresh += 1
        trajectory.predicted = selection.focus
        return outputs, self._step_entry(trajectory, active)

    def _step_entry(self, trajectory: Trajectory, active: ActiveRows) -> dict[str, Any]:
        return {
            "program": "step",
            "why": "continues the trajectory",
            "rows": active.count,
            "bucket": active.rows.shape[1],
            "keys": self._keys_read(trajectory.ids.shape[1], trajectory),
        }

    def _keys_read(self, length: int, trajectory: Trajectory | None) -> dict[str, int]:
        """Keys that each layer of a region reads, for sequence 0; all of them outside a step."""
        keys = dict.fromkeys((site.region for site in self.plan.sites), length)
        if trajectory is not None and "sparse-suffix" in keys:
            block = self.plan.key_block
            candidates, kept = int(trajectory.candidates[0]), int(trajectory.keep[0])
            sinks = min(self.plan.sink_tokens, (candidates - kept) * block)
            keys["sparse-suffix"] = length - (candidates - kept) * block + sinks
        return keys

    def _check(
        self, trajectory: Trajectory, args: Sequence[Any], outputs: tuple[Tensor, ...]
    ) -> None:
        """Compare the first run with the model; a plan that fails is never used."""
        problem = check_plan(
            self.programs, self._original, args, outputs, trajectory, self.config.buckets
        )
        if problem is None:
            return
        message = f"the plan failed its first-run check: {problem}"
        if self.config.strict:
            raise SelfCheckError(f"focus_compile: {message}.")
        self._refused = self._refuse(message)

    def _refuse(self, reason: str) -> str:
        return refuse(reason, strict=self.config.strict)


def _recall(changed: Tensor, predicted: Tensor | None) -> float | None:
    decided = int(changed.sum())
    if predicted is None or decided == 0:
        return None
    return int((changed & predicted).sum()) / decided
