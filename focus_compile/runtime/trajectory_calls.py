"""What a call of a trajectory runs: a refresh of all rows, of some, a step, or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import LOSSLESS, FocusConfig
from focus_compile.distributed.agreement import Agreement
from focus_compile.kernels.confidence.op import confidence
from focus_compile.plan import Plan
from focus_compile.policies.base import Policy
from focus_compile.runtime.adaptive_refresh import GROWTH, Renewed, forget_ages, renew
from focus_compile.runtime.buckets import bucket_for, pack_rows
from focus_compile.runtime.guard import CallInputs, compare_inputs
from focus_compile.runtime.inspection import TOP_TOKENS, active_inspector
from focus_compile.runtime.latest_rows import LatestRows
from focus_compile.runtime.observe import Flags, Observed, observe
from focus_compile.runtime.observe_program import ObserveProgram
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.quality_guard import QualityGuard, check_answers
from focus_compile.runtime.trajectory import NO_TOKEN, Trajectory
from focus_compile.runtime.warm_up import WarmUp, buckets_within

__all__ = ["CONTINUES", "REPEATED", "Outcome", "TrajectoryCalls"]

Outcome = tuple[tuple[Tensor, ...], dict[str, Any]]
"""What a call returns, and the fields of its record."""

CONTINUES = "continues the trajectory"
REPEATED = "nothing changed since the refresh"
SURE = 0.75
"""Probability from which on a token leads all others by a half at least: no error of a step's
probabilities below a quarter changes it."""


class TrajectoryCalls:
    """Runs the programs of one plan over the state of a trajectory."""

    def __init__(
        self, plan: Plan, programs: Programs, config: FocusConfig, policy: Policy | None
    ) -> None:
        self.plan, self.programs, self.config, self.policy = plan, programs, config, policy
        over = plan.ranks or plan.shards
        self.agreement = None if over is None else Agreement(over.group)
        self._mask_token_id = -1 if config.mask_token_id is None else config.mask_token_id
        self._observe_program = ObserveProgram(self._looked_at)

    @property
    def compile_seconds(self) -> float:
        """Spent on compiling what looks at calls."""
        return self._observe_program.compile_seconds

    def answer(
        self, trajectory: Trajectory, args: Sequence[Any], flags: Flags, guard: QualityGuard
    ) -> Outcome:
        """Of a call that continues the trajectory and has masks left."""
        recall = None
        if self.config.guard and guard.reads_all_keys():
            trajectory.read_all_keys()
        if not trajectory.fresh and flags.decided:
            recall = flags.predicted / flags.decided
        why = self._why_refresh(trajectory, flags, guard)
        if why is not None and self._may_renew(guard):
            outputs, entry = self._renew(trajectory, args, why)
        elif why is not None:
            outputs, entry = self.refresh(trajectory, args, why)
        elif trajectory.fresh and not flags.decided:
            outputs, entry = self._repeat(trajectory)
        elif guard.due(self.config.guard):
            outputs, entry = self._guarded(trajectory, args, flags, guard)
        elif self.config.policy == LOSSLESS:
            outputs, entry = self._sure(trajectory, args, flags)
        else:
            outputs, entry = self._step(trajectory, args, flags)
        guard.rows += entry["rows"]
        return outputs, entry | {"recall": recall}

    def _why_refresh(self, trajectory: Trajectory, flags: Flags, guard: QualityGuard) -> str | None:
        steps = trajectory.steps_since_refresh
        if self.config.guard and guard.backs_off(steps):
            return f"the guard: {guard.measure}"
        refresh = self.config.refresh
        if refresh == "every-step":
            return "every step"
        if refresh in ("block", "adaptive"):
            return "block entry" if flags.entered else None
        return f"every {refresh} calls" if steps + 1 >= int(refresh) else None

    def refresh(self, trajectory: Trajectory, args: Sequence[Any], why: str) -> Outcome:
        """All rows, with all keys."""
        t = trajectory
        t.ids.copy_(t.incoming)
        masked = t.ids.eq(self._mask_token_id)
        outputs = self._run_refresh(t, args, masked)
        starts = t.blocks.response_start.tolist()
        first = max(min(starts) - 1, t.first_row)
        probability, token = self._confidence(
            [values[:, first - t.first_row :] for values in outputs]
        )
        t.confidence.zero_()
        t.confidence[:, first:] = probability
        t.best[:, first:] = token
        t.scored_before.copy_(t.scored)
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
        t.steps_since_refresh, t.steps_on_lists, t.fresh = 0, 0, True
        forget_ages(t, self.plan.sink_tokens)
        keys = self.keys_read(t.ids.shape[1], None)
        entry = {"program": "refresh", "why": why, "rows": t.ids.numel(), "keys": keys}
        entry["prompt_rows"] = sum(starts)
        return returned, entry

    def _run_refresh(self, t: Trajectory, args: Sequence[Any], masked: Tensor) -> Sequence[Tensor]:
        """The outputs at the trajectory's rows."""
        inspector = active_inspector()
        if inspector is None:
            return self.programs.refresh(*args, t.rows, *t.caches)
        start = t.blocks.start_of(t.blocks.current(masked))[:, None]
        positions = torch.arange(masked.shape[1], device=masked.device)
        undecided = masked & (positions >= start) & (positions < start + t.blocks.block_length)
        return inspector.refresh(
            lambda: self.programs.refresh(*args, t.rows, *t.caches),
            undecided,
            t.blocks.response_start,
            self.plan.sink_tokens or TOP_TOKENS,
            alone=self.plan.shards is None,
        )

    def _renew(self, trajectory: Trajectory, args: Sequence[Any], why: str) -> Outcome:
        """Some rows of the prompt; more, and then all, while the others cost too much."""
        t, config, computed, prompt_rows = trajectory, self.config, 0, 0
        t.ids.copy_(t.incoming)
        shares = [config.refresh_rows, min(1.0, GROWTH * config.refresh_rows)]
        if not t.measured:
            shares = [0.0, *shares]
        for share in shares:
            done = renew(t, self.programs, args, config, share)
            computed, prompt_rows = computed + done.computed, prompt_rows + done.prompt_rows
            self._note_rows(t, done.rows)
            if done.error <= config.tolerance:
                return self._renewed(t, done, why, computed, prompt_rows)
        why = f"{why}, where the rest of the prompt would cost an error of {done.error:.2g}"
        outputs, entry = self.refresh(t, args, why)
        return outputs, entry | {
            "rows": entry["rows"] + computed,
            "prompt_rows": entry["prompt_rows"] + prompt_rows,
            "error": done.error,
        }

    def _note_rows(self, t: Trajectory, rows: Tensor) -> None:
        """Tell who looks that rows int64 [batch, any] were computed."""
        inspector = active_inspector()
        if inspector is not None:
            inspector.computed(torch.zeros_like(t.active).scatter(1, rows, True))

    def _renewed(
        self, trajectory: Trajectory, done: Renewed, why: str, computed: int, prompt_rows: int
    ) -> Outcome:
        t = trajectory
        rows, values = _from(t.first_row, done.rows, done.outputs)
        self._keep(t, rows, values)
        for latest in t.outputs:
            latest.missed(rows)
        t.refreshed_at.copy_(t.blocks.current(t.ids.eq(self._mask_token_id)))
        t.predicted.zero_()
        t.steps_since_refresh, t.steps_on_lists, t.fresh = 0, 0, True
        return tuple(latest.hand_out() for latest in t.outputs), {
            "program": "partial",
            "why": why,
            "rows": computed,
            "prompt_rows": prompt_rows,
            "error": done.error,
            "bucket": done.rows.shape[1],
            "keys": self.keys_read(t.ids.shape[1], None),
        }

    def _step(self, trajectory: Trajectory, args: Sequence[Any], flags: Flags) -> Outcome:
        return self._stepped(trajectory, flags, self._run_step(trajectory, args, flags))

    def _stepped(self, t: Trajectory, flags: Flags, bucket: int) -> Outcome:
        outputs = tuple(latest.hand_out() for latest in t.outputs)
        t.steps_since_refresh += 1
        t.fresh = False
        entry = {
            "program": "step",
            "why": CONTINUES,
            "rows": flags.rows,
            "bucket": bucket,
            "keys": self.keys_read(t.ids.shape[1], t),
        }
        if self.programs.again is not None:
            entry["chosen"] = t.steps_on_lists == 1
        return outputs, entry

    def _guarded(
        self, trajectory: Trajectory, args: Sequence[Any], flags: Flags, guard: QualityGuard
    ) -> Outcome:
        """A step, and the refresh that it is compared with, whose outputs are returned."""
        t = trajectory
        self._run_step(t, args, flags)
        focus, step = t.focus.clone(), (t.confidence.clone(), t.best.clone())
        outputs, entry = self.refresh(t, args, "guard")
        check = check_answers(focus, self._decided(t, flags), step, (t.confidence, t.best))
        guard.note(check, self.config.guard_agreement)
        guard.guard_rows += entry["rows"]
        return outputs, entry | {
            "rows": entry["rows"] + flags.rows,
            "agreement": check.agreement,
            "drift": check.drift,
        }

    def _sure(self, trajectory: Trajectory, args: Sequence[Any], flags: Flags) -> Outcome:
        """A step where it is sure of what it would have decided, else a refresh."""
        t = trajectory
        bucket = self._run_step(t, args, flags)
        scores = t.confidence.masked_fill(~t.focus, -1.0)
        top = scores.topk(min(self._decided(t, flags), scores.shape[1]), dim=1).values
        least = float(top.masked_fill(top < 0, 1.0).min())
        if least >= SURE:
            return self._stepped(t, flags, bucket)
        outputs, entry = self.refresh(t, args, f"a step was sure of an answer by {least:.2f} only")
        return outputs, entry | {"rows": entry["rows"] + flags.rows}

    def _decided(self, t: Trajectory, flags: Flags) -> int:
        """Positions of a sequence that a call is likely to decide: as many as the last, rounded
        up."""
        return max(1, -(-flags.decided // t.ids.shape[0]))

    def _repeat(self, trajectory: Trajectory) -> Outcome:
        """The refresh's outputs, to a caller that repeats its call: they are exact, and a step's
        would not be."""
        trajectory.steps_since_refresh += 1
        outputs = tuple(latest.hand_out() for latest in trajectory.outputs)
        return outputs, {"program": "step", "why": REPEATED, "rows": 0}

    def _run_step(self, t: Trajectory, args: Sequence[Any], flags: Flags) -> int:
        """The step's bucket."""
        bucket = bucket_for(flags.largest, self.config.buckets, t.ids.shape[1], t.ids.device.type)
        again = self.programs.again is not None and 0 < t.steps_on_lists < self.config.list_reuse
        self._run_bucket(t, args, bucket, again)
        t.steps_on_lists = t.steps_on_lists + 1 if again else 1
        return bucket

    def _run_bucket(self, t: Trajectory, args: Sequence[Any], bucket: int, again: bool) -> None:
        """A step of the trajectory's active rows, as one CUDA graph where that is captured."""
        inspector, key = active_inspector(), ("step again" if again else "step", bucket)

        def advance() -> Tensor:
            return self._advance(t, args, bucket, again)

        if inspector is None:
            rows = t.graphs.run(key, advance)
        else:
            rows = inspector.step(t.graphs, key, advance, t.active, t.focus)
        if t.graphs.captured:
            rows = rows.clone()  # the next replay overwrites it
        for latest in t.outputs:
            latest.missed(rows)

    def _advance(self, t: Trajectory, args: Sequence[Any], bucket: int, again: bool) -> Tensor:
        """The device's part of a step; returns the rows computed, int64 [batch, bucket]."""
        t.ids.copy_(t.incoming)
        packed = pack_rows(t.active, t.focus, bucket)
        state = [*t.caches, *t.merged]
        computed = self.programs.run_step(
            self._own_inputs(t, args), packed, t.candidates, t.keep, state, again
        )
        self._keep(t, packed.rows, computed)
        t.predicted.copy_(t.foreseen)
        return packed.rows

    def _keep(self, t: Trajectory, rows: Tensor, computed: Sequence[Tensor]) -> None:
        """Outputs of some rows int64 [batch, active]; device work only."""
        probability, token = self._confidence(computed)
        t.confidence.scatter_(1, rows, probability)
        t.best.scatter_(1, rows, token)
        t.scored_before.copy_(t.scored)
        for latest, values in zip(t.outputs, computed, strict=False):
            latest.write(rows, values)

    def _own_inputs(self, trajectory: Trajectory, args: Sequence[Any]) -> list[Any]:
        """The call's inputs with the trajectory's equal tensors, which stay where they are."""
        own = list(args)
        own[self.plan.ids.position] = trajectory.ids
        for at, tensor in zip(self.plan.positions("guarded"), trajectory.guarded, strict=True):
            own[at] = tensor
        return own

    def _may_renew(self, guard: QualityGuard) -> bool:
        return (
            not guard.refreshes()
            and self.config.refresh == "adaptive"
            and self.config.tolerance > 0
            and self.programs.partial is not None
        )

    def _confidence(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Highest probability and its token of rows with these outputs, as `confidence` has it."""
        if self.plan.logits is None:
            probability, token = outputs[len(self.plan.outputs) - 2 : len(self.plan.outputs)]
            return probability, token
        return confidence(outputs[self.plan.logits])

    def observe(self, trajectory: Trajectory, call: CallInputs) -> Tensor:
        """Compare the call with the trajectory on its device: the `Flags`, not waited for."""
        trajectory.incoming.copy_(call.ids)
        compare_inputs(trajectory, call)
        return trajectory.graphs.run("observe", lambda: self._observe(trajectory))

    def _looked_at(self, *tensors: Tensor) -> Tensor:
        assert self.policy is not None
        return observe(
            Observed(*tensors), self.policy, self._mask_token_id, self.config.block_length
        )

    def _observe(self, t: Trajectory) -> Tensor:
        tensors = Observed.of(t)
        compiled = t.graphs.enabled and self.config.lowering == "inductor"
        flags = (self._observe_program if compiled else self._looked_at)(*tensors)
        if self.agreement is None:
            return flags
        differ = self.agreement.differ(t.incoming, [flags, t.active, t.focus])
        return torch.cat([flags, differ[None]])

    def warm_up(self, trajectory: Trajectory, args: Sequence[Any], call: CallInputs) -> WarmUp:
        """Run a step of every bucket, and capture it; afterwards no call continues the trajectory.

        One compiled step serves all buckets, so that one is enough where nothing is captured.
        """
        t, graphs = trajectory, trajectory.graphs
        compiled, length = self.programs.compile_seconds, t.ids.shape[1]
        buckets = buckets_within(
            length - t.first_row, self.config.buckets, length, t.ids.device.type
        )
        buckets = buckets if graphs.enabled else buckets[:1]
        kinds = (False,) if self.programs.again is None else (False, True)
        for _ in range(2):
            self.observe(t, call)
            for bucket, again in itertools.product(buckets, kinds):
                t.active.zero_()
                t.active[:, t.first_row : t.first_row + bucket] = True
                t.focus.copy_(t.active)
                self._run_bucket(t, args, bucket, again)
        t.ids.fill_(NO_TOKEN)
        t.blocks.response_start.fill_(length)
        return WarmUp(buckets, graphs.captured, self.programs.compile_seconds - compiled)

    def keys_read(self, length: int, trajectory: Trajectory | None) -> dict[str, int]:
        """Keys that each layer of a region reads, for sequence 0; all of them outside a step."""
        keys = dict.fromkeys((site.region for site in self.plan.sites), length)
        if trajectory is not None and "sparse-suffix" in keys:
            block = self.plan.key_block
            candidates, kept = trajectory.prompt_blocks
            sinks = min(self.plan.sink_tokens, (candidates - kept) * block)
            keys["sparse-suffix"] = length - (candidates - kept) * block + sinks
        return keys


def _from(first: int, rows: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Rows int64 [batch, active], ascending, with their outputs; those before `first` become
    repetitions of the last."""
    if not first:
        return rows, list(outputs)
    slots = torch.arange(rows.shape[1], device=rows.device)
    last = rows.argmax(1, keepdim=True)
    at = torch.where(rows >= first, slots, last)
    sequences = torch.arange(rows.shape[0], device=rows.device)[:, None]
    return rows.gather(1, at), [values[sequences, at] for values in outputs]
