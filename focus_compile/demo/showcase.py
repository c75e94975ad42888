"""Dense against focus on one long question: what `python -m focus_compile demo` shows.

The dense arm is `torch.compile(model)`; the focus arm is `focus_compile.compile(model)`. Each is
compiled and warmed up first, then decodes the same question once, timed. Nothing runs between a
decode's first call and its last but the calls, the sampler and the live canvas, and the canvas's
own time is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from focus_compile import demo
from focus_compile.config import FocusConfig
from focus_compile.decode.canvas import Canvas
from focus_compile.decode.sampler import count_blocks
from focus_compile.demo import environment, retrieval
from focus_compile.demo.arms import Answer, Arm, answer
from focus_compile.records import Record, recording

__all__ = ["ArmResult", "ShowcaseResult", "ShowcaseSettings", "run", "table"]

_DENSE_WARM_UP_CALLS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowcaseSettings:
    """What to ask and how to decode it."""

    length: int = 2048
    """Tokens of prompt and response together."""
    gen_length: int = 64
    """Tokens of the response, decoded one a call."""
    block_length: int = 32
    """Tokens per decode block."""
    policy: str = "focus-dllm"
    keep_ratio: float = 0.5
    refresh: str = "block"
    kind: retrieval.Kind = "needle"
    seed: int = 0
    questions: int = 4
    """Facts asked for."""

    def arms(self) -> tuple[Arm, Arm]:
        """Dense and focus, with every setting checked."""
        options = {
            "policy": self.policy,
            "keep_ratio": self.keep_ratio,
            "block_length": self.block_length,
            "refresh": self.refresh,
        }
        FocusConfig.from_options(options)
        count_blocks(self.gen_length, self.block_length)
        return Arm("dense"), Arm("focus", options)


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What one arm did."""

    right: int
    """Values stated correctly."""
    asked: int
    seconds: float
    """Decoding, compilation and drawing left out."""
    compile_seconds: float
    """From the uncompiled model to the end of a throw-away warm-up."""
    model_calls: int
    rows: int
    """Token rows computed, summed over the calls."""


@dataclass(frozen=True, slots=True)
class ShowcaseResult:
    """Both arms side by side."""

    dense: ArmResult
    focus: ArmResult
    same_answers: bool
    """Whether both arms state the same values."""
    settings: dict[str, Any]
    record: Record | None = None
    """Of the focus arm's decode once more, where it was asked for."""

    @property
    def speedup(self) -> float:
        """Dense seconds by focus seconds."""
        return self.dense.seconds / self.focus.seconds

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {
            "speedup": self.speedup,
            "dense": asdict(self.dense),
            "focus": asdict(self.focus),
            "settings": self.settings,
        }


def run(settings: ShowcaseSettings, console: Console, *, recorded: bool = False) -> ShowcaseResult:
    """Ask both arms the same question and measure them; progress goes to the console.

    recorded: afterwards let the focus arm answer once more, and record that.

    Raises:
        FocusError: settings out of range, or a question that does not fit the length.
    """
    arms = settings.arms()
    model, tokenizer = demo.load()
    example = retrieval.make(
        tokenizer,
        settings.length,
        kind=settings.kind,
        questions=settings.questions,
        response=settings.gen_length,
        seed=settings.seed,
    )
    console.print(
        f"{settings.length} tokens ({settings.kind}), asking for "
        + ", ".join(f"{key} ({value})" for key, value in example.pairs)
    )
    (dense, dense_answer, _), (focus, focus_answer, compiled) = (
        _run_arm(arm, model, tokenizer, example, settings, console) for arm in arms
    )
    record = None
    if recorded:
        with console.status("focus: recording"):
            record = _record(compiled, tokenizer, example, settings)
        measured = zip(arms, (dense, focus), (dense_answer, focus_answer), strict=True)
        for arm, result, found in measured:
            tokens = [list(found.ids[len(example.prompt_ids) :])]
            record.arms[arm.name] = asdict(result) | {"tokens": tokens, "text": found.text}
    return ShowcaseResult(
        dense=dense,
        focus=focus,
        same_answers=dense_answer.right == focus_answer.right,
        settings=asdict(settings) | environment.describe(),
        record=record,
    )


def _record(
    model: Any, tokenizer: Any, example: retrieval.Example, settings: ShowcaseSettings
) -> Record:
    with recording(attention=True) as run:
        found = answer(
            model,
            tokenizer,
            example,
            gen_length=settings.gen_length,
            block_length=settings.block_length,
        )
        run.record.output = {"ids": [list(found.ids)], "text": [found.text]}
        run.note(**asdict(settings))
        run.record.model |= {"name": "tiny", "dtype": "float32"}
    return run.record


def table(result: ShowcaseResult) -> Table:
    """The comparison for people."""
    dense, focus = result.dense, result.focus
    rows = Table(title="dense (torch.compile, Inductor) against focus")
    for column in ("", "dense", "focus", "dense / focus"):
        rows.add_column(column, justify="right" if column else "left")
    rows.add_row(
        "answers right", f"{dense.right}/{dense.asked}", f"{focus.right}/{focus.asked}", ""
    )
    rows.add_row("model calls", str(dense.model_calls), str(focus.model_calls), "")
    rows.add_row(
        "rows computed", f"{dense.rows:,}", f"{focus.rows:,}", f"{dense.rows / focus.rows:.1f}x"
    )
    rows.add_row(
        "seconds", f"{dense.seconds:.2f}", f"{focus.seconds:.2f}", f"[bold]{result.speedup:.1f}x"
    )
    rows.add_row(
        "compile seconds", f"{dense.compile_seconds:.1f}", f"{focus.compile_seconds:.1f}", ""
    )
    return rows


def _run_arm(
    arm: Arm,
    model: Any,
    tokenizer: Any,
    example: retrieval.Example,
    settings: ShowcaseSettings,
    console: Console,
) -> tuple[ArmResult, Answer, Any]:
    """What the arm did, its answer, and the compiled model."""
    import focus_compile

    with console.status(f"{arm.name}: compiling"):
        compiled, compile_seconds = _warm_up(arm, model, tokenizer, example, settings)
    console.print(f"{arm.name}: compiled and warmed up in {compile_seconds:.1f} s")
    with (
        focus_compile.record() as history,
        Canvas(
            tokenizer,
            title=arm.name,
            prompt_tokens=len(example.prompt_ids),
            response_tokens=settings.gen_length,
            mask_token_id=model.config.mask_token_id,
            program=lambda: _last_program(history),
            console=console,
        ) as canvas,
    ):
        begun = time.perf_counter()
        found = answer(
            compiled,
            tokenizer,
            example,
            gen_length=settings.gen_length,
            block_length=settings.block_length,
            progress=canvas,
        )
        seconds = time.perf_counter() - begun - canvas.seconds
    dense_rows = found.model_calls * settings.length
    result = ArmResult(
        right=sum(found.right),
        asked=len(found.right),
        seconds=seconds,
        compile_seconds=compile_seconds,
        model_calls=found.model_calls,
        rows=dense_rows if arm.options is None else sum(record.rows for record in history),
    )
    return result, found, compiled


def _warm_up(
    arm: Arm, model: Any, tokenizer: Any, example: retrieval.Example, settings: ShowcaseSettings
) -> tuple[Any, float]:
    """The compiled model once all its programs exist, and the seconds that took.

    Dense has one program, so two calls do. Focus decodes the whole question once, since which
    programs a step needs depends on what is decoded.
    """
    import torch

    begun = time.perf_counter()
    compiled = arm.compile(model)
    if arm.options is None:
        masks = [model.config.mask_token_id] * settings.gen_length
        ids = torch.tensor([[*example.prompt_ids, *masks]])
        with torch.no_grad():
            for _ in range(_DENSE_WARM_UP_CALLS):
                compiled(ids)
    else:
        answer(
            compiled,
            tokenizer,
            example,
            gen_length=settings.gen_length,
            block_length=settings.block_length,
        )
    return compiled, time.perf_counter() - begun


def _last_program(history: Sequence[Any]) -> str:
    return history[-1].program if history else "dense"
