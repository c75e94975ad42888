"""What token eviction costs in answers: `python -m focus_compile fidelity --policy focus-evict`.

All arms decode the same questions by the same rule: so many tokens of a sequence a step, or every
token of at least some probability. Rows are listed while their K/V are not final; those kept go
past the cut. Random eviction is the control: the same budget, spent without looking. With
`--policy focus-dllm+evict` the sparse layers also read some finished key blocks only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from rich.table import Table

from focus_compile.block_diffusion.batch_generator import BatchGenerator
from focus_compile.config import COMBINED
from focus_compile.demo import block_arms, environment, retrieval
from focus_compile.demo.block_arms import BlockArm, BlockQuestions, Responses

__all__ = [
    "EvictFidelityResult",
    "EvictFidelitySettings",
    "EvictScore",
    "arms",
    "rules",
    "run",
    "table",
]

ALPHAS = (1.0, 2.0, 3.0, math.inf)
"""Budgets that are shown beside the one asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvictFidelitySettings:
    """What to ask and how to decode it."""

    length: int = 1024
    """Tokens of prompt and response together."""
    examples: int = 16
    """Questions of each kind."""
    batch: int = 8
    """Questions decoded side by side."""
    gen_length: int = 64
    """Tokens of the response."""
    questions: int = 12
    """Facts asked for in each question: most of the response."""
    alpha: float = 1.5
    keep_ratios: tuple[float, ...] = ()
    """Shares of the finished key blocks that sparse layers read, an arm of the combined policy for
    each."""
    tokens_per_step: tuple[int, ...] = (1, 4)
    """Decode so many tokens of each sequence a step."""
    threshold: float | None = None
    """Decode by this threshold as well."""
    seed: int = 0
    """Seed of the first example; the others count up from it."""
    device: str = "cpu"
    """Where the model runs, as torch names it."""
    lowering: str = "inductor"


@dataclass(frozen=True, slots=True)
class EvictScore:
    """One arm on all questions of one kind by one rule."""

    right: int
    """Values stated correctly."""
    asked: int
    accuracy: float
    kept_answers: float | None
    """Of the values that plain block diffusion states correctly, the share that this arm does."""
    same_tokens: float
    """Share of the responses' tokens that are those of plain block diffusion."""
    steps: int
    listed_rows_per_token: float
    """Rows that began a step, for each decoded token."""
    kept_rows_per_token: float
    """Rows that went through all layers, for each decoded token."""
    tokens_per_step: float
    """Tokens that a sequence decoded in a step, commits counted."""
    seconds: float
    """Decoding all of it, compilation of new programs included."""


@dataclass(frozen=True, slots=True)
class EvictFidelityResult:
    """All arms so far."""

    scores: dict[str, dict[str, dict[str, EvictScore]]]
    """By rule, then by the arm's name, then by kind."""
    same_as_delayed: dict[str, bool]
    """Whether alpha = infinity gave the tokens of the delayed cache, by rule."""
    options: dict[str, dict[str, Any]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        rules = {
            rule: [
                {"name": name, "options": self.options[name]}
                | {kind: asdict(score) for kind, score in kinds.items()}
                for name, kinds in found.items()
            ]
            for rule, found in self.scores.items()
        }
        return {
            "rules": rules,
            "infinite_alpha_equals_delayed_cache": self.same_as_delayed,
            "settings": self.settings,
        }


def arms(settings: EvictFidelitySettings) -> list[BlockArm]:
    """Plain block diffusion, delayed caches, eviction at falling budgets, and the controls."""
    alpha = settings.alpha
    budgets = sorted({alpha, *ALPHAS}, reverse=True)
    evicting = [BlockArm(_name(budget), "focus-evict", alpha=budget) for budget in budgets]
    combined = [
        BlockArm(f"{COMBINED} keys={share:g}", COMBINED, alpha=alpha, keep_ratio=share)
        for share in settings.keep_ratios
    ]
    return [
        BlockArm("block diffusion", "block-diffusion"),
        BlockArm("delayed cache", "delayed-cache"),
        BlockArm("delayed cache, delayed commit", "delayed-cache", commit="delayed"),
        *evicting,
        BlockArm(f"random α={alpha:g}", "focus-evict", alpha=alpha, rank="random"),
        BlockArm(f"worst first α={alpha:g}", "focus-evict", alpha=alpha, rank="reversed"),
        *combined,
    ]


def _name(alpha: float) -> str:
    return "focus-evict α=∞" if math.isinf(alpha) else f"focus-evict α={alpha:g}"


def rules(settings: EvictFidelitySettings) -> dict[str, tuple[int | None, float]]:
    """By name: tokens a step, or None, and the threshold that then decides.

    Raises:
        OptionError: out of range.
    """
    found: dict[str, tuple[int | None, float]] = {
        f"{count} a step": (count, 1.0) for count in settings.tokens_per_step
    }
    if settings.threshold is not None:
        found[f"τ={settings.threshold:g}"] = (None, settings.threshold)
    for count, threshold in found.values():
        block_arms.check_rule(count, threshold)
    return found


def run(
    settings: EvictFidelitySettings,
    advance: Callable[[str, int], object] = lambda arm, answers: None,
) -> Iterator[EvictFidelityResult]:
    """Ask every arm the same questions; after each arm, the result so far.

    advance: called with the arm's name and a number of new answers after each kind of question;
    `len(rules(settings)) * len(arms(settings)) * 2 * settings.examples` in all.

    Raises:
        FocusError: settings out of range, or questions that do not fit the length.
    """
    wanted = rules(settings)
    model, tokenizer = block_arms.load()
    model.to(settings.device)
    asked = BlockQuestions(
        length=settings.length,
        gen_length=settings.gen_length,
        questions=settings.questions,
        block_length=block_arms.block_length_of(model),
        seed=settings.seed,
    )
    questions = {kind: asked.make(tokenizer, kind, settings.examples) for kind in retrieval.KINDS}
    generator = BatchGenerator(
        model,
        block_length=asked.block_length,
        max_length=settings.length,
        max_batch=settings.batch,
        policy=COMBINED if settings.keep_ratios else "focus-evict",
        alpha=settings.alpha,
        evict_if_faster=False,
        lowering=settings.lowering,
        cuda_graphs=False,  # every arm sets other options
    )
    everyone = arms(settings)
    result = EvictFidelityResult(
        {}, {}, {arm.name: arm.options() for arm in everyone}, asdict(settings)
    )
    result = replace(result, settings=result.settings | environment.describe())
    for rule, (count, threshold) in wanted.items():
        block_arms.set_rule(generator, count, threshold)
        found: dict[str, dict[str, Responses]] = {}
        for arm in everyone:
            arm.set(generator, settings.seed)
            scores: dict[str, EvictScore] = {}
            for kind, examples in questions.items():
                begun = time.perf_counter()
                responses = block_arms.decode(generator, tokenizer, examples, settings.gen_length)
                seconds = time.perf_counter() - begun
                found.setdefault(arm.name, {})[kind] = responses
                scores[kind] = _score(responses, found[everyone[0].name][kind], seconds)
                advance(f"{rule}, {arm.name}", len(examples))
            result = _with(result, rule, arm.name, scores, found)
            yield result


def _with(
    result: EvictFidelityResult,
    rule: str,
    arm: str,
    scores: dict[str, EvictScore],
    found: dict[str, dict[str, Responses]],
) -> EvictFidelityResult:
    """The result and one more arm."""
    same = dict(result.same_as_delayed)
    if arm == _name(math.inf):
        delayed = found["delayed cache"]
        same[rule] = all(found[arm][kind].tokens == delayed[kind].tokens for kind in delayed)
    of_rule = result.scores.get(rule, {}) | {arm: scores}
    return replace(result, scores=result.scores | {rule: of_rule}, same_as_delayed=same)


def _score(responses: Responses, plain: Responses, seconds: float) -> EvictScore:
    marks, reference = responses.marks(), plain.marks()
    both = sum(mine and theirs for mine, theirs in zip(marks, reference, strict=True))
    work = responses.work
    return EvictScore(
        right=sum(marks),
        asked=len(marks),
        accuracy=sum(marks) / len(marks),
        kept_answers=both / sum(reference) if any(reference) else None,
        same_tokens=_agreement(responses.tokens, plain.tokens),
        steps=work.steps,
        listed_rows_per_token=work.listed / work.decoded,
        kept_rows_per_token=work.kept / work.decoded,
        tokens_per_step=work.decoded / work.sequence_steps,
        seconds=seconds,
    )


def _agreement(tokens: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Of responses of equal lengths."""
    mine, theirs = chain.from_iterable(tokens), chain.from_iterable(others)
    same = [one == other for one, other in zip(mine, theirs, strict=True)]
    return sum(same) / len(same)


def table(result: EvictFidelityResult) -> Table:
    """The scores for people, kinds side by side."""
    rows = Table(title=f"values right at {result.settings['length']} tokens")
    columns = ("", "right", "of plain's", "same tokens", "steps", "rows listed", "kept, a token")
    for column in columns:
        rows.add_column(column, justify="right" if column else "left")
    for rule, found in result.scores.items():
        rows.add_row(f"[bold]{rule}")
        for name, kinds in found.items():
            scores = list(kinds.values())
            rows.add_row(
                name,
                ", ".join(f"{score.right}/{score.asked}" for score in scores),
                ", ".join(_share(score.kept_answers) for score in scores),
                ", ".join(f"{score.same_tokens:.3f}" for score in scores),
                ", ".join(str(score.steps) for score in scores),
                ", ".join(f"{score.listed_rows_per_token:.2f}" for score in scores),
                ", ".join(f"{score.kept_rows_per_token:.2f}" for score in scores),
            )
        rows.add_section()
    return rows


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
