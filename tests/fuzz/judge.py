"""One case judged: equal, refused with a reason, or wrong.

What a compiled model returns is compared with the model itself where it claims to be exact (a
refused model, a call without masks, options that leave nothing out, finished blocks under the block
policies), and with the oracle in every call of another policy's trajectory: the program that ran,
its rows, and the logits. The oracle runs on the CPU. Wrong is also an exception, an analysis that
fails, and a plan that its own first run refutes.
"""

from __future__ import annotations

import re
import traceback
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

import focus_compile
from focus_compile.passes.block_causality import block_causal_mask
from focus_compile.runtime.dispatch import NO_MASKS
from focus_compile.runtime.record import StepRecord
from tests.compiled import compiled
from tests.fuzz.architecture import MASK
from tests.fuzz.case import Case
from tests.fuzz.source import imported, made, source_of
from tests.models.network import logits_of
from tests.oracle import Oracle, Result
from tests.strategies import EVERYTHING, Trajectory, bound_between, float64_twin

__all__ = ["CLEAR_MARGIN", "Verdict", "judge", "kind_of"]

CLEAR_MARGIN = 1e-3
"""A choice whose runner-up is closer than this may differ by rounding."""
DRIFT = 4.0
"""Steps read what earlier calls computed, each with an error of its own."""
VACUOUS = 1e-2
"""A bound above this share of the largest logit would let wrong rows pass."""
DEFECTS = ("the analysis of the graph failed", "the plan failed its first-run check")
"""Refusals that are bugs."""
OTHER_SEEDS = 2
"""Weights that must fail as well, where a rounding error may change what is computed."""


class Wrong(AssertionError):
    """The compiled model does not do what it claims."""


@dataclass
class Verdict:
    """What became of a case."""

    outcome: str = "equal"
    """ "equal", "refused" (all trajectories, each with a reason) or "wrong"."""
    coverage: str = "refused"
    """ "plan" if every trajectory ran incrementally, "refused" if none did, else "partial"."""
    reasons: list[str] = field(default_factory=list)
    """Of every refused trajectory."""
    detail: str = ""
    """What is wrong."""
    trajectories: int = 0
    calls: int = 0
    steps: int = 0
    """Steps that were compared with the oracle or dense."""
    unclear: int = 0
    """Calls that no reference decides: a choice within rounding, or a bound too wide."""


def judge(case: Case, device: str = "cpu", lowering: str = "eager") -> Verdict:
    """Run the case. An outcome of weights that route rows nearly at random counts only if other
    weights have it too."""
    verdict = _judged(case, device, lowering)
    if verdict.outcome != "wrong" or not case.architecture.experts_compete:
        return verdict
    for more in range(1, OTHER_SEEDS + 1):
        other = _judged(replace(case, seed=case.seed + more), device, lowering)
        if other.outcome != "wrong":
            return other
    return verdict


def kind_of(reason: str) -> str:
    """A reason without what differs from model to model, to count it by."""
    text = reason.split(" [")[0].split(", which")[0]
    text = re.sub(r"\b[a-z_]+(_\d+)+\b", "...", text)
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "N", text).strip()


def _judged(case: Case, device: str, lowering: str) -> Verdict:
    verdict = Verdict()
    with imported(source_of(case.architecture)) as module:
        try:
            run = _Run(case, module, device, lowering, verdict)
            covered = [run.follow(trajectory) for trajectory in case.calls()]
        except Wrong as wrong:
            verdict.outcome, verdict.detail = "wrong", str(wrong)
            return verdict
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            verdict.outcome = "wrong"
            verdict.detail = f"raised {what} in {last.name}"
            return verdict
        finally:
            torch._dynamo.reset()
    none, every = set(covered) == {False}, set(covered) == {True}
    verdict.coverage = "plan" if every else "refused" if none else "partial"
    if verdict.coverage == "refused":
        verdict.outcome = "refused"
    return verdict


class _Run:
    """The compiled model of a case beside the references."""

    def __init__(
        self, case: Case, module: ModuleType, device: str, lowering: str, verdict: Verdict
    ) -> None:
        self.case, self.device, self.verdict = case, device, verdict
        model = made(module, case.seed)
        self.twin = float64_twin(model)
        self.oracle: Oracle | None = None
        if case.architecture.known_to_oracle and not case.architecture.block_causal:
            self.oracle = Oracle(model, mask_token_id=MASK, **case.options)
        self.begun = 0
        """Under a block policy, where the block of a trajectory's first call begins."""
        self.model = made(module, case.seed).to(device)
        options = {**case.options, "mask_token_id": MASK, "lowering": lowering}
        self.focus = compiled(self.model, dynamic=case.dynamic, **options)

    def follow(self, trajectory: Trajectory) -> bool | None:
        """Judge every call; whether all, some (None) or no graphs ran incrementally."""
        self.verdict.trajectories += 1
        covered: set[bool | None] = set()
        refusals: set[str] = set()
        complete = True
        for ids in trajectory.calls:
            self.verdict.calls += 1
            logits, records = self._call(ids, self._inputs(ids, trajectory))
            refusals.update(filter(None, map(_refusal, records)))
            if any(record.why != NO_MASKS for record in records):
                covered.add(_covered(records))
            if len(covered) > 1:
                raise Wrong(f"a call in mid-trajectory became exact, or ceased to be: {records}")
            complete = complete and bool((ids == MASK).any(1).all())
            if not self._judge_call(ids, logits, trajectory, records, complete):
                self.verdict.unclear += 1
                break
            self.verdict.steps += any(record.program == "step" for record in records)
        if refusals:
            self.verdict.reasons.append(min(refusals))
            self._reject_defects()
        return next(iter(covered), True)

    def _judge_call(
        self,
        ids: Tensor,
        logits: Tensor,
        trajectory: Trajectory,
        records: list[StepRecord],
        complete: bool,
    ) -> bool:
        """False where no reference can tell. complete: every sequence had masks in every call."""
        dense, bound = self._dense(ids, self._inputs(ids, trajectory))
        if not dense.isfinite().all() or bound > VACUOUS * float(dense.abs().max()):
            return False
        expected = None
        if self.oracle is not None and _covered(records):
            expected = self.oracle.call(ids, **trajectory.inputs)
        check = partial(self._compare, logits, trajectory, records)
        if self._is_exact(records, complete):
            check("the model", dense, bound)
        elif self.case.architecture.block_causal:
            check("the model", dense, bound, finished=True)
        if expected is None or len(records) > 1:
            return True
        if expected.margin < CLEAR_MARGIN and expected.program == records[0].program:
            return False
        _same_work(records[0], expected)
        check("the oracle", expected.logits, DRIFT * bound)
        return True

    def _inputs(self, ids: Tensor, trajectory: Trajectory) -> dict[str, Tensor]:
        """What goes with the ids."""
        if not self.case.architecture.block_causal:
            return trajectory.inputs
        block_length = self.case.options["block_length"]
        return {"attention_mask": block_causal_mask(ids.shape[1], block_length)}

    def _call(self, ids: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, list[StepRecord]]:
        inputs = {name: value.to(self.device) for name, value in given.items()}
        with (
            torch.no_grad(),
            focus_compile.record() as history,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            logits = logits_of(self.focus(ids.to(self.device), **inputs))
        nothing = StepRecord("exact", "no graph reached the backend", 0)
        return logits.cpu(), history or [nothing]

    def _dense(self, ids: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, float]:
        """What the model returns on its device, and how far another computation may be off."""
        inputs = {name: value.to(self.device) for name, value in given.items()}
        with torch.no_grad():
            dense = logits_of(self.model(ids.to(self.device), **inputs)).cpu()
        return dense, bound_between(dense, self.twin(ids, **given))

    def _is_exact(self, records: list[StepRecord], complete: bool) -> bool:
        """Whether the call must equal dense."""
        if self.case.options["policy"] == "block-diffusion":
            return True
        everything = all(self.case.options.get(k) == v for k, v in EVERYTHING.items())
        return (everything and complete) or all(r.program != "step" for r in records)

    def _compare(
        self,
        logits: Tensor,
        trajectory: Trajectory,
        records: list[StepRecord],
        what: str,
        expected: Tensor,
        bound: float,
        finished: bool = False,
    ) -> None:
        """Rows that mean something and are returned; a padding row attends to nothing.

        finished: only rows of finished blocks.
        """
        program = "+".join(record.program for record in records)
        first = self._first_row(program, logits.shape[1])
        if logits[:, :first].any():
            raise Wrong(f"{program}: rows before the response are not zero")
        real = torch.ones(logits.shape[:2], dtype=torch.bool)
        if trajectory.attention_mask is not None:
            real = trajectory.attention_mask.bool()
        if finished:
            real[:, -self.case.options["block_length"] :] = False
        if not real[:, first:].any():
            return
        error = (logits - expected)[:, first:][real[:, first:]].abs().max()
        if not error <= bound:
            raise Wrong(f"{program} differs from {what} by {error:.2g} (bound {bound:.2g})")

    def _first_row(self, program: str, length: int) -> int:
        """The first row that is returned; those before it are zero."""
        if self.oracle is not None:
            return self.oracle.rows_returned(program)
        if program == "exact" or self.case.options.get("logits") != "response":
            return 0
        if program == "refresh":
            self.begun = length - int(self.case.options["block_length"])
        return self.begun

    def _reject_defects(self) -> None:
        for reason in self.verdict.reasons:
            if any(defect in reason for defect in DEFECTS):
                raise Wrong(reason)


def _same_work(record: StepRecord, expected: Result) -> None:
    """The oracle's program, over as many rows."""
    if record.program != expected.program:
        raise Wrong(f"{record.program} ({record.why}), expected {expected.program}")
    rows = int(expected.active.sum())
    if record.rows != rows:
        raise Wrong(f"{record.program} of {record.rows} rows, expected {rows}")


def _refusal(record: StepRecord) -> str | None:
    """Why a graph was refused; None where it was not."""
    return record.why if record.program == "exact" and record.why != NO_MASKS else None


def _covered(records: list[StepRecord]) -> bool | None:
    """True: no graph of the call was refused; False: all were; None: some."""
    refused = {_refusal(record) is not None for record in records}
    return None if len(refused) == 2 else refused == {False}
