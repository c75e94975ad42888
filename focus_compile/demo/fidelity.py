"""How many answers each policy keeps: what `python -m focus_compile fidelity` shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from focus_compile import demo
from focus_compile.config import FocusConfig
from focus_compile.decode.sampler import count_blocks
from focus_compile.demo import environment, retrieval
from focus_compile.demo.arms import Arm, answer_all
from focus_compile.errors import OptionError
from focus_compile.runtime.record import StepRecord

__all__ = ["KEEP_RATIOS", "FidelityResult", "FidelitySettings", "Score", "arms", "run", "table"]

KEEP_RATIOS = (0.5, 0.25, 0.1)
NEVER = 1 << 30
"""Calls between refreshes that no answer takes."""
MEAN_SUMMARIES = {"keep_ratio": 0.1, "block_summary": "mean", "key_block": 16}
"""Selection by mean keys: where it errs, sinks show what they are for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelitySettings:
    """What to ask and how to decode it."""

    length: int = 1024
    """Tokens of prompt and response together."""
    examples: int = 16
    """Questions of each kind."""
    batch: int = 8
    """Questions decoded side by side."""
    gen_length: int = 64
    """Tokens of the response, decoded one a call."""
    block_length: int = 32
    """Tokens per decode block."""
    questions: int = 4
    """Facts asked for in each question."""
    seed: int = 0
    """Seed of the first example; the others count up from it."""
    device: str = "cpu"
    """Where the model runs, as torch names it."""
    lowering: str = "inductor"
    """What runs the programs; "eager" spares each arm its compilation."""
    refresh: str = "block"
    """"block": arms differ by the keys they read; "adaptive": by what a block entry refreshes."""
    dense: bool = True
    """Whether dense is asked too, which takes longer than all others together."""
    only: tuple[str, ...] = ()
    """Names of the other arms to ask; empty: all."""


@dataclass(frozen=True, slots=True)
class Score:
    """One arm on one kind of question."""

    right: int
    """Values stated correctly."""
    asked: int
    accuracy: float
    """right / asked."""
    kept: float | None
    """Of the values that dense states correctly, the share that this arm does too."""
    recall: float | None
    """Share of the positions just decoded that the focus set had predicted, mean over the calls."""
    refreshed: float | None
    """Prompt rows that refreshes computed, of those that one refresh a block computes."""
    error: float | None
    """Relative error of attention outputs that partial refreshes left, estimated: the largest."""
    seconds: float
    """Decoding all examples, compilation of new programs included."""


@dataclass(frozen=True, slots=True)
class FidelityResult:
    """All arms so far on all kinds."""

    scores: dict[str, dict[str, Score]]
    """By the arm's name, then by kind."""
    options: dict[str, dict[str, Any] | None]
    """The options of each arm; None for dense."""
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {
            "arms": [
                {"name": name, "options": self.options[name]}
                | {kind: asdict(score) for kind, score in kinds.items()}
                for name, kinds in self.scores.items()
            ],
            "settings": self.settings,
        }


def arms(settings: FidelitySettings) -> list[Arm]:
    """Dense, the dual cache, and focus at falling keep ratios with sinks and without."""
    common = {"block_length": settings.block_length, "lowering": settings.lowering}
    if settings.refresh == "adaptive":
        found = _refreshes(common)
    elif settings.refresh == "block":
        found = [Arm("dual-cache", {"policy": "dual-cache"} | common)]
        for ratio in KEEP_RATIOS:
            focus = {"policy": "focus-dllm", "keep_ratio": ratio} | common
            found += _with_and_without_sinks(f"focus α={ratio}", focus)
        found += _with_and_without_sinks("mean keys α=0.1", common | MEAN_SUMMARIES)
    else:
        raise OptionError.unknown(settings.refresh, ("block", "adaptive"), kind="refresh")
    count_blocks(settings.gen_length, settings.block_length)
    for arm in found:
        FocusConfig.from_options(arm.options)
    names = [arm.name for arm in found]
    for name in settings.only:
        if name not in names:
            raise OptionError.unknown(name, names, kind="arm")
    found = [arm for arm in found if not settings.only or arm.name in settings.only]
    return [Arm("dense"), *found] if settings.dense else found


def _refreshes(common: dict[str, Any]) -> list[Arm]:
    """The schedules: each part of the adaptive one by itself, and at other tolerances."""
    adaptive = {"refresh": "adaptive"} | common
    return [
        Arm("block refresh", common),
        Arm("refreshed once", {"refresh": NEVER} | common),
        Arm("adaptive", adaptive),
        Arm("adaptive, tolerance .1", adaptive | {"tolerance": 0.1}),
        Arm("adaptive, tolerance .5", adaptive | {"tolerance": 0.5}),
        Arm("rows read most and oldest, no gate", adaptive | {"tolerance": 1e9}),
        Arm("drift gate, no rows read most", adaptive | {"refresh_rows": 0.0}),
    ]


def _with_and_without_sinks(name: str, options: dict[str, Any]) -> list[Arm]:
    return [Arm(name, options), Arm(f"{name}, no sinks", options | {"sink_tokens": 0})]


def run(
    settings: FidelitySettings, advance: Callable[[str, int], object] = lambda arm, answers: None
) -> Iterator[FidelityResult]:
    """Ask every arm the same questions; after each arm, the result so far.

    advance: called with the arm's name and a number of new answers after each batch;
    `len(arms(settings)) * 2 * settings.examples` answers in all.

    Raises:
        FocusError: settings out of range, or questions that do not fit the length.
    """
    everyone = arms(settings)
    model, tokenizer = demo.load()
    model.to(settings.device)
    questions = {kind: _examples(tokenizer, settings, kind) for kind in retrieval.KINDS}
    result = FidelityResult({}, {}, asdict(settings) | environment.describe())
    by_dense: dict[str, list[bool]] = {}
    for arm in everyone:
        compiled = arm.compile(model)
        scores: dict[str, Score] = {}
        for kind, examples in questions.items():
            marks, history, seconds = _ask(compiled, tokenizer, examples, settings, arm, advance)
            if arm.options is None:
                by_dense[kind] = marks
            scores[kind] = _score(marks, by_dense.get(kind), history, seconds, settings)
        options = None if arm.options is None else dict(arm.options)
        result = replace(
            result,
            scores=result.scores | {arm.name: scores},
            options=result.options | {arm.name: options},
        )
        yield result


def table(result: FidelityResult) -> Table:
    """The scores for people."""
    rows = Table(title=f"values right at {result.settings['length']} tokens")
    last = "prompt rows refreshed" if result.settings["refresh"] == "adaptive" else "recall"
    for column in ("", "kind", "right", "accuracy", "kept of dense", last):
        rows.add_column(column, justify="right" if column not in ("", "kind") else "left")
    for name, kinds in result.scores.items():
        for kind, score in kinds.items():
            rows.add_row(
                name if kind == retrieval.KINDS[0] else "",
                kind,
                f"{score.right}/{score.asked}",
                f"{score.accuracy:.3f}",
                _share(score.kept),
                _share(score.recall if last == "recall" else score.refreshed),
                end_section=kind == retrieval.KINDS[-1],
            )
    return rows


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _examples(
    tokenizer: Any, settings: FidelitySettings, kind: retrieval.Kind
) -> list[retrieval.Example]:
    return [
        retrieval.make(
            tokenizer,
            settings.length,
            kind=kind,
            questions=settings.questions,
            response=settings.gen_length,
            seed=settings.seed + number,
        )
        for number in range(settings.examples)
    ]


def _ask(
    compiled: Any,
    tokenizer: Any,
    examples: Sequence[retrieval.Example],
    settings: FidelitySettings,
    arm: Arm,
    advance: Callable[[str, int], object],
) -> tuple[list[bool], list[StepRecord], float]:
    """Whether each value is right, over all examples; the calls; the seconds taken."""
    import focus_compile

    marks: list[bool] = []
    begun = time.perf_counter()
    with focus_compile.record() as history:
        for start in range(0, len(examples), settings.batch):
            batch = examples[start : start + settings.batch]
            answers = answer_all(
                compiled,
                tokenizer,
                batch,
                gen_length=settings.gen_length,
                block_length=settings.block_length,
            )
            for found in answers:
                marks += found.right
            advance(arm.name, len(batch))
    return marks, history, time.perf_counter() - begun


def _score(
    marks: Sequence[bool],
    reference: Sequence[bool] | None,
    history: Sequence[StepRecord],
    seconds: float,
    settings: FidelitySettings,
) -> Score:
    kept = None
    if reference is not None and any(reference):
        both = sum(mine and dense for mine, dense in zip(marks, reference, strict=True))
        kept = both / sum(reference)
    blocks = count_blocks(settings.gen_length, settings.block_length) * settings.examples
    refreshed = [r.prompt_rows for r in history if r.prompt_rows is not None]
    a_refresh = settings.length - settings.gen_length
    errors = [r.error for r in history if r.error is not None]
    return Score(
        right=sum(marks),
        asked=len(marks),
        accuracy=sum(marks) / len(marks),
        kept=kept,
        recall=_mean(record.recall for record in history),
        refreshed=sum(refreshed) / (blocks * a_refresh) if refreshed else None,
        error=max(errors, default=None),
        seconds=seconds,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
