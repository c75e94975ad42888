"""The search: optuna's TPE under a constraint, trials cut short where they cannot succeed."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import optuna

from focus_compile.demo import environment
from focus_compile.errors import OptionError
from focus_compile.model_files import LoadedModel
from focus_compile.settings_file import describe_model, package_version
from focus_compile.tuning.judge import MEASURES, Decoding, Judge, Score
from focus_compile.tuning.knobs import KNOBS, Knobs
from focus_compile.tuning.result import Trial, TuneResult

__all__ = ["Progress", "TuneSettings", "importance", "tune"]

STARTUP_TRIALS = 8
"""Random trials before TPE's model of them is used."""
FEWEST_FOR_IMPORTANCE = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneSettings:
    """What to search for. `fixed` options of FocusConfig are not searched."""

    decoding: Decoding
    target: float = 0.99
    """Share of the response's tokens that are to be the dense loop's."""
    trials: int = 40
    timeout: float | None = None
    """Seconds after which no further trial begins."""
    held_out: float = 0.25
    """Share of the prompts that only settings which have reached the target are asked."""
    measure: str = "work"
    lowering: str = "eager"
    seed: int = 0
    fixed: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises OptionError where a value is out of range."""
        if not 0 < self.target <= 1:
            raise OptionError.invalid("target_agreement", self.target, "a share above 0, up to 1")
        if not 0 <= self.held_out < 1:
            raise OptionError.invalid("held_out", self.held_out, "a share from 0 to below 1")
        if self.measure not in MEASURES:
            raise OptionError.unknown(self.measure, MEASURES, kind="measure")
        if self.fixed.get("policy", "focus-dllm") != "focus-dllm":
            raise OptionError.invalid(
                "policy", self.fixed["policy"], "focus-dllm, whose options are what is searched"
            )
        if all(name in self.fixed for name in KNOBS):
            raise OptionError(f"tune: all of {', '.join(KNOBS)} are given; nothing to search")
        _ = self.decoding.blocks

    def searched(self, prompts: int) -> int:
        """How many of the prompts are searched; the others are held out."""
        return max(1, prompts - math.ceil(prompts * self.held_out))


Progress = Callable[[str, Sequence[Trial]], object]
"""Called with what was just done, and the trials so far."""


def tune(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: TuneSettings,
    progress: Progress = lambda done, trials: None,
) -> TuneResult:
    """Search the cheapest setting whose responses agree with the dense loop's.

    loaded: the model, not compiled. prompts: token ids; the last ones are held out.

    Raises:
        FocusError: settings out of range, no prompts, or a model that runs exactly.
    """
    settings.check()
    if not prompts:
        raise OptionError("tune: no prompts; give at least one")
    begun = time.perf_counter()
    judge = Judge(loaded, prompts, settings.decoding, settings.measure, settings.lowering)
    judge.answer_densely(lambda: progress("dense answer", ()))
    search = _Search(judge, settings, settings.searched(len(prompts)), progress)
    search.run()
    chosen, reached = search.choose()
    return TuneResult(
        trials=tuple(search.trials),
        chosen=chosen,
        reached=reached,
        target=settings.target,
        measure=settings.measure,
        importance=importance(search.trials, search.knobs, settings.seed),
        fixed=_fixed(settings),
        model=loaded.description | describe_model(loaded.model),
        measured=_measured(settings, prompts, search.searched, time.perf_counter() - begun),
    )


class _Search:
    """Trials in order, each of another setting."""

    def __init__(
        self, judge: Judge, settings: TuneSettings, searched: int, progress: Progress
    ) -> None:
        self.judge, self.settings, self.searched = judge, settings, searched
        self.trials: list[Trial] = []
        self.knobs = Knobs(
            layers=judge.shape.layers,
            fixed=settings.fixed.keys(),
            calls_per_block=settings.decoding.calls_per_block,
            blocks=settings.decoding.blocks,
        )
        self.study = self._study()
        self._progress = progress
        self._known: dict[str, Trial] = {}

    def run(self) -> None:
        """All trials."""
        first = self.knobs.first()
        for options in first:
            self.study.enqueue_trial(options)
        self._uncut = len(first)
        self.study.optimize(
            self._objective, n_trials=self.settings.trials, timeout=self.settings.timeout
        )

    def choose(self) -> tuple[Trial, bool]:
        """The cheapest trial that reaches the target on the prompts held out too; or the one that
        agrees best, and False."""
        target = self.settings.target
        done = [trial for trial in self.trials if trial.complete]
        for trial in sorted(done, key=lambda t: t.score.cost):
            if trial.score.agreement >= target:
                trial = self._check(trial)
                if trial.agreement >= target:
                    return trial, True
        best = [trial for trial in self.trials if trial.complete]
        return max(best, key=lambda t: (t.agreement, -t.score.cost)), False

    def _study(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=self.settings.seed,
                n_startup_trials=STARTUP_TRIALS,
                multivariate=True,
                group=True,
            )
        pruner = optuna.pruners.ThresholdPruner(lower=self.settings.target)
        return optuna.create_study(sampler=sampler, pruner=pruner)

    def _objective(self, trial: optuna.Trial) -> float:
        """Cost of a setting; what it is short of the target is the constraint."""
        options = self.knobs.suggest(trial)
        key = json.dumps(options, sort_keys=True)
        if key not in self._known:
            self._known[key] = self._ask(trial, options)
            self.trials.append(self._known[key])
        found = self._known[key]
        trial.set_constraint("agreement", self.settings.target - found.score.agreement)
        self._progress(f"trial {trial.number + 1}", self.trials)
        if not found.complete:
            raise optuna.TrialPruned
        return found.score.cost

    def _ask(self, trial: optuna.Trial, options: dict[str, Any]) -> Trial:
        """Prompt after prompt, until the target is out of reach."""
        self.judge.use(_fixed(self.settings) | options)
        score = Score(0, 0)
        for number in range(self.searched):
            score += self.judge.score(number)
            left = range(number + 1, self.searched)
            trial.report(self._most_agreement(score, left), number)
            if left and trial.number >= self._uncut and trial.should_prune():
                return Trial(trial.number, options, score, complete=False)
        return Trial(trial.number, options, score, complete=True)

    def _most_agreement(self, score: Score, left: Sequence[int]) -> float:
        """Agreement where all other prompts are answered as dense does."""
        ahead = sum(map(self.judge.dense_tokens, left))
        return (score.same + ahead) / max(1, score.compared + ahead)

    def _check(self, trial: Trial) -> Trial:
        """The trial with its score on the prompts held out."""
        held_out = range(self.searched, len(self.judge))
        if not held_out:
            return trial
        self.judge.use(_fixed(self.settings) | trial.options)
        checked = sum((self.judge.score(number) for number in held_out), Score(0, 0))
        trial = replace(trial, checked=checked)
        self.trials = [trial if known.number == trial.number else known for known in self.trials]
        self._progress(f"check of trial {trial.number + 1}", self.trials)
        return trial


def importance(trials: Sequence[Trial], knobs: Knobs, seed: int) -> dict[str, dict[str, float]]:
    """Of agreement and of cost: the share of their variance that each option explains, by fANOVA.

    Trials cut short count with the prompts they were asked. Options that only some trials have are
    left out; with too few trials to tell there is nothing.
    """
    if len(trials) < FEWEST_FOR_IMPORTANCE:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    values: dict[str, Callable[[Trial], float]] = {
        "agreement": lambda trial: trial.score.agreement,
        "cost": lambda trial: trial.score.cost,
    }
    found = {}
    for name, value in values.items():
        if len({value(trial) for trial in trials}) < 2:
            continue
        study = optuna.create_study()
        for trial in trials:
            asked = optuna.trial.FixedTrial(trial.options)
            knobs.suggest(asked)
            study.add_trial(
                optuna.create_trial(
                    params=asked.params, distributions=asked.distributions, value=value(trial)
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        found[name] = {name: float(share) for name, share in shares.items()}
    return found


def _fixed(settings: TuneSettings) -> dict[str, Any]:
    return {
        "policy": "focus-dllm",
        "mask_token_id": settings.decoding.mask_token_id,
        "block_length": settings.decoding.block_length,
    } | settings.fixed


def _measured(
    settings: TuneSettings, prompts: Sequence[Sequence[int]], searched: int, seconds: float
) -> dict[str, Any]:
    lengths = [len(ids) for ids in prompts]
    digest = hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()
    known = {name: value for name, value in asdict(settings).items() if name != "fixed"}
    return (
        known
        | {
            "prompts": len(prompts),
            "prompts_searched": searched,
            "prompt_tokens": [min(lengths), max(lengths)],
            "prompts_sha256": digest,
            "seconds": seconds,
            "optuna": optuna.__version__,
            "focus_compile": package_version("focus-compile"),
        }
        | environment.describe()
    )
