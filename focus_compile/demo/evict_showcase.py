"""With and without token eviction: `python -m focus_compile demo --policy focus-evict`.

Three generators decode the same questions side by side: whole blocks in every step, a delayed cache
(rows leave once their K/V are final), and focus-evict (rows that will not decode now leave after
the cut as well); if asked for, a fourth whose sparse layers choose keys, too (focus-dllm+evict).
Each is compiled and warmed up on all questions first and then timed, the prompts apart and without
the time that drawing takes. The canvas shows the first question's response.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from focus_compile.block_diffusion.batch_generator import BatchGenerator
from focus_compile.block_diffusion.block_model import BlockModel
from focus_compile.config import COMBINED
from focus_compile.decode.canvas import BlockDrawing, Canvas
from focus_compile.demo import block_arms, environment, retrieval
from focus_compile.demo.block_arms import BlockArm, BlockQuestions, Responses

__all__ = ["EvictArmResult", "EvictShowcaseResult", "EvictShowcaseSettings", "run", "table"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvictShowcaseSettings:
    """What to ask and how to decode it."""

    length: int = 1024
    """Tokens of prompt and response together."""
    gen_length: int = 64
    """Tokens of the response."""
    batch: int = 8
    """Questions decoded side by side."""
    questions: int = 12
    """Facts asked for in each: most of the response."""
    kind: retrieval.Kind = "needle"
    alpha: float = 1.5
    keep_ratio: float | None = None
    """Share of the finished key blocks that the combined policy reads; None: without that arm."""
    tokens_per_step: int | None = 2
    """Decode so many tokens of each sequence a step; None: by the threshold."""
    threshold: float = 1.0
    seed: int = 0
    lowering: str = "inductor"

    def arms(self) -> tuple[BlockArm, ...]:
        """What is compared; the first is the reference."""
        arms = (
            BlockArm("block-diffusion", "block-diffusion"),
            BlockArm("delayed-cache", "delayed-cache"),
            BlockArm("focus-evict", "focus-evict", alpha=self.alpha),
        )
        if self.keep_ratio is None:
            return arms
        return (*arms, BlockArm(COMBINED, COMBINED, alpha=self.alpha, keep_ratio=self.keep_ratio))


@dataclass(frozen=True, slots=True)
class EvictArmResult:
    """What one arm did."""

    right: int
    """Values stated correctly."""
    asked: int
    steps: int
    listed_rows_per_token: float
    """Rows that began a step, for each decoded token."""
    kept_rows_per_token: float
    """Rows that went through all layers, for each decoded token."""
    seconds: float
    """All steps but the first; compilation and drawing left out."""
    prompt_seconds: float
    """The first step, before which the prompts are computed."""
    step_milliseconds: float
    """Median of the steps but the first."""
    compile_seconds: float
    """To the end of a throw-away run of all questions; arms share what they compile."""


@dataclass(frozen=True, slots=True)
class EvictShowcaseResult:
    """All arms side by side."""

    arms: dict[str, EvictArmResult]
    same_answers: bool
    """Whether all arms state the same values."""
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        arms = {name: asdict(arm) for name, arm in self.arms.items()}
        return {"arms": arms, "same_answers": self.same_answers, "settings": self.settings}


def run(settings: EvictShowcaseSettings, console: Console) -> EvictShowcaseResult:
    """Ask all arms the same questions and measure them; progress goes to the console.

    Raises:
        FocusError: settings out of range, or questions that do not fit the length.
    """
    block_arms.check_rule(settings.tokens_per_step, settings.threshold)
    model, tokenizer = block_arms.load()
    asked = BlockQuestions(
        length=settings.length,
        gen_length=settings.gen_length,
        questions=settings.questions,
        block_length=block_arms.block_length_of(model),
        seed=settings.seed,
    )
    examples = asked.make(tokenizer, settings.kind, settings.batch)
    console.print(
        f"{settings.batch} questions of {settings.length} tokens ({settings.kind}), "
        f"{settings.questions} values each, {_rule(settings)}"
    )
    results: dict[str, EvictArmResult] = {}
    marks: list[list[bool]] = []
    compiled: dict[bool, BlockModel] = {}
    for arm in settings.arms():
        result, found = _run_arm(
            arm, compiled, model, tokenizer, examples, asked, settings, console
        )
        results[arm.name] = result
        marks.append(found.marks())
    return EvictShowcaseResult(
        arms=results,
        same_answers=all(mine == marks[0] for mine in marks),
        settings=asdict(settings) | environment.describe(),
    )


def table(result: EvictShowcaseResult) -> Table:
    """The comparison for people."""
    rows = Table(title="block diffusion, rows by policy")
    rows.add_column("")
    for name in result.arms:
        rows.add_column(name, justify="right")

    def row(name: str, cell: Callable[[EvictArmResult], str]) -> None:
        rows.add_row(name, *map(cell, result.arms.values()))

    row("values right", lambda arm: f"{arm.right}/{arm.asked}")
    row("steps", lambda arm: str(arm.steps))
    row("rows listed, a token", lambda arm: f"{arm.listed_rows_per_token:.2f}")
    row("rows past the cut, a token", lambda arm: f"{arm.kept_rows_per_token:.2f}")
    row("prompts, seconds", lambda arm: f"{arm.prompt_seconds:.2f}")
    row("decoding, seconds", lambda arm: f"{arm.seconds:.2f}")
    row("a step, ms", lambda arm: f"{arm.step_milliseconds:.0f}")
    row("compile seconds", lambda arm: f"{arm.compile_seconds:.1f}")
    return rows


def _rule(settings: EvictShowcaseSettings) -> str:
    if settings.tokens_per_step is None:
        return f"decoding what is at least {settings.threshold:g} probable"
    return f"decoding {settings.tokens_per_step} tokens a step"


def _run_arm(
    arm: BlockArm,
    compiled: dict[bool, BlockModel],
    model: Any,
    tokenizer: Any,
    examples: list[retrieval.Example],
    asked: BlockQuestions,
    settings: EvictShowcaseSettings,
    console: Console,
) -> tuple[EvictArmResult, Responses]:
    """compiled: what earlier arms compiled, by whether it chooses keys; this one's is added."""
    begun = time.perf_counter()
    chooses_keys = arm.policy == COMBINED
    with console.status(f"{arm.name}: compiling"):
        generator = BatchGenerator(
            compiled.get(chooses_keys, model),
            block_length=asked.block_length,
            max_length=settings.length,
            max_batch=settings.batch,
            policy=arm.policy,
            alpha=arm.alpha,
            evict_if_faster=False,
            lowering=settings.lowering,
            key_options={"keep_ratio": arm.keep_ratio} if chooses_keys else None,
        )
        compiled[chooses_keys] = generator.model
        block_arms.set_rule(generator, settings.tokens_per_step, settings.threshold)
        block_arms.decode(generator, tokenizer, examples, settings.gen_length)
    compile_seconds = time.perf_counter() - begun
    console.print(f"{arm.name}: compiled and warmed up in {compile_seconds:.1f} s")
    with Canvas(
        tokenizer,
        title=arm.name,
        prompt_tokens=0,
        response_tokens=settings.gen_length,
        mask_token_id=model.config.mask_token_id,
        program=lambda: f"{generator.history[-1].kept} rows",
        console=console,
    ) as canvas:
        draw = BlockDrawing(
            canvas, generator.history, settings.gen_length, model.config.mask_token_id
        )
        found = block_arms.decode(generator, tokenizer, examples, settings.gen_length, draw)
    marks, work = found.marks(), found.work
    first, *milliseconds = [step.milliseconds for step in generator.history]
    result = EvictArmResult(
        right=sum(marks),
        asked=len(marks),
        steps=work.steps,
        listed_rows_per_token=work.listed / work.decoded,
        kept_rows_per_token=work.kept / work.decoded,
        seconds=sum(milliseconds) / 1e3,
        prompt_seconds=first / 1e3,
        step_milliseconds=median(milliseconds),
        compile_seconds=compile_seconds,
    )
    return result, found
