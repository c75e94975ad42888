"""The command line: `python -m focus_compile` or `focus-compile`.

Commands import torch and transformers only when they run, so that `--help` is quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from focus_compile.errors import FocusError, OptionError

if TYPE_CHECKING:
    from focus_compile.demo.evict_showcase import EvictShowcaseSettings

app = typer.Typer(
    name="focus-compile",
    help="Make diffusion language models incremental through torch.compile.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result here.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Tokens of prompt and response together.")]
BlockLengthOption = Annotated[int, typer.Option(min=1, help="Tokens per decode block.")]
QuestionsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Facts asked for in a question; 4, or 12 with focus-evict."),
]
AlphaOption = Annotated[
    float, typer.Option(help="focus-evict: rows kept for each token decoded in a step.")
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(help="focus-evict: decode all that is at least so probable."),
]

COMBINED = "focus-dllm+evict"
EVICTION = ("focus-evict", COMBINED, "delayed-cache", "block-diffusion")
KEEP_RATIOS = (0.5, 0.25, 0.1)
"""Shares of the key blocks that are compared with the combined policy."""
BLOCK_LENGTH = 32
SeedOption = Annotated[int, typer.Option(help="Seed of the (first) question.")]


@app.command("demo")
def demo_command(
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of prompt and response together; 2048, or 1024 with focus-evict.",
        ),
    ] = None,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 64,
    block_length: BlockLengthOption = 32,
    policy: Annotated[
        str,
        typer.Option(
            help="focus-dllm, dual-cache, prefix-cache, exact; focus-evict, focus-dllm+evict."
        ),
    ] = "focus-dllm",
    keep_ratio: Annotated[
        float, typer.Option(help="Share of the prompt's key blocks that sparse layers read.")
    ] = 0.5,
    kind: Annotated[str, typer.Option(help="Question: needle or table.")] = "needle",
    seed: SeedOption = 0,
    questions: QuestionsOption = None,
    alpha: AlphaOption = 1.5,
    batch: Annotated[
        int, typer.Option(min=1, help="focus-evict: questions decoded side by side.")
    ] = 8,
    tokens_per_step: Annotated[
        int, typer.Option(min=1, help="focus-evict: tokens of each sequence decoded a step.")
    ] = 2,
    threshold: ThresholdOption = None,
    lowering: Annotated[
        str, typer.Option(help="focus-evict: inductor, or eager without compilation.")
    ] = "inductor",
    json_file: JsonOption = None,
) -> None:
    """Decode long questions with a bundled model: dense against focus.

    With --policy focus-evict: the block-diffusion model, whole blocks and the delayed cache against
    token eviction; with focus-dllm+evict, sparse keys in addition.
    """
    with _plain_errors():
        _check_writable(json_file)
        _quiet_transformers()
        from focus_compile.demo import retrieval

        kind = retrieval.as_kind(kind)
        if policy in EVICTION:
            from focus_compile.demo import evict_showcase

            _check_blocks(block_length)
            evicting = evict_showcase.EvictShowcaseSettings(
                length=length or 1024,
                gen_length=gen_length,
                batch=batch,
                questions=questions or 12,
                kind=kind,
                alpha=alpha,
                keep_ratio=keep_ratio if policy == COMBINED else None,
                tokens_per_step=tokens_per_step if threshold is None else None,
                threshold=1.0 if threshold is None else threshold,
                seed=seed,
                lowering=lowering,
            )
            _demo_of_eviction(evicting, json_file)
            return
        from focus_compile.demo import showcase

        settings = showcase.ShowcaseSettings(
            length=length or 2048,
            gen_length=gen_length,
            block_length=block_length,
            policy=policy,
            keep_ratio=keep_ratio,
            kind=kind,
            seed=seed,
            questions=questions or 4,
        )
        console = Console()
        result = showcase.run(settings, console)
        console.print(showcase.table(result))
        same = "the same answers as" if result.same_answers else "other answers than"
        console.print(f"focus: {same} dense, {result.speedup:.1f} times as fast")
        _write(json_file, result.to_dict())


def _demo_of_eviction(settings: EvictShowcaseSettings, json_file: Path | None) -> None:
    from focus_compile.demo import evict_showcase

    console = Console()
    result = evict_showcase.run(settings, console)
    console.print(evict_showcase.table(result))
    same = "the same answers" if result.same_answers else "answers that differ"
    (_, plain), *_, (name, evicting) = result.arms.items()
    rows = plain.kept_rows_per_token / evicting.kept_rows_per_token
    console.print(
        f"{name}: {same}, {rows:.1f} times fewer rows past the cut than block diffusion, "
        f"decoded {plain.seconds / evicting.seconds:.1f} times as fast"
    )
    _write(json_file, result.to_dict())


@app.command("fidelity")
def fidelity_command(
    length: LengthOption = 1024,
    examples: Annotated[int, typer.Option(min=1, help="Questions of each kind.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Questions decoded side by side.")] = 8,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 64,
    block_length: BlockLengthOption = 32,
    policy: Annotated[
        str,
        typer.Option(
            help="focus-dllm: all of its arms; focus-evict: those of eviction; "
            "focus-dllm+evict: these, and some with sparse keys."
        ),
    ] = "focus-dllm",
    questions: QuestionsOption = None,
    seed: SeedOption = 0,
    alpha: AlphaOption = 1.5,
    tokens_per_step: Annotated[
        list[int] | None,
        typer.Option(min=1, help="focus-evict: tokens of each sequence decoded a step; 1 and 4."),
    ] = None,
    threshold: ThresholdOption = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")] = "cpu",
    lowering: Annotated[
        str, typer.Option(help="inductor, or eager: slower calls without compilation.")
    ] = "inductor",
    json_file: JsonOption = None,
) -> None:
    """Count the answers that each policy keeps, and how well focus rows are predicted.

    With --policy focus-evict: what token eviction costs the block-diffusion model, beside random
    eviction; with focus-dllm+evict, what sparse keys cost in addition.
    """
    with _plain_errors():
        _check_writable(json_file)
        _quiet_transformers()
        from focus_compile.demo import evict_fidelity, fidelity, retrieval

        each = len(retrieval.KINDS) * examples
        if policy in EVICTION:
            _check_blocks(block_length)
            evicting = evict_fidelity.EvictFidelitySettings(
                length=length,
                examples=examples,
                batch=batch,
                gen_length=gen_length,
                questions=questions or 12,
                alpha=alpha,
                keep_ratios=KEEP_RATIOS if policy == COMBINED else (),
                tokens_per_step=tuple(tokens_per_step or (1, 4)),
                threshold=threshold,
                seed=seed,
                device=device,
                lowering=lowering,
            )
            total = len(evict_fidelity.arms(evicting)) * len(evict_fidelity.rules(evicting)) * each
            steps = partial(evict_fidelity.run, evicting)
            _show_arms(steps, evict_fidelity.table, total, json_file)
            return
        if policy != "focus-dllm":
            raise OptionError.unknown(policy, ("focus-dllm", *EVICTION), kind="policy")
        settings = fidelity.FidelitySettings(
            length=length,
            examples=examples,
            batch=batch,
            gen_length=gen_length,
            block_length=block_length,
            questions=questions or 4,
            seed=seed,
            device=device,
            lowering=lowering,
        )
        total = len(fidelity.arms(settings)) * each
        _show_arms(partial(fidelity.run, settings), fidelity.table, total, json_file)


def _show_arms(
    run: Callable[[Callable[[str, int], object]], Iterator[Any]],
    table: Callable[[Any], Table],
    total: int,
    json_file: Path | None,
) -> None:
    """Follow a fidelity run arm by arm; its results file is written after each."""
    console = Console()
    answered: dict[str, int] = {}
    with _answers_bar(console) as bar:
        task = bar.add_task("", total=total)

        def advance(arm: str, answers: int) -> None:
            answered[arm] = answered.get(arm, 0) + answers
            bar.update(task, advance=answers, description=arm)

        for result in run(advance):
            _write(json_file, result.to_dict())
            if not console.is_terminal:
                arm, answers = list(answered.items())[-1]
                console.print(f"{arm}: {answers} answers")
    console.print(table(result))


def _check_blocks(block_length: int) -> None:
    if block_length != BLOCK_LENGTH:
        raise OptionError.invalid(
            "block_length", block_length, f"{BLOCK_LENGTH}, as the bundled model was trained"
        )


def _answers_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A failure that focus_compile raised on purpose ends in its message and exit code 2.

    torch wraps what a backend raises while it compiles, so the chain of causes is searched.
    """
    try:
        yield
    except Exception as error:
        ours = _focus_error(error)
        if ours is None:
            raise
        Console(stderr=True).print(
            f"error: {ours}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(2) from None


def _focus_error(error: BaseException | None) -> FocusError | None:
    while error is not None and not isinstance(error, FocusError):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error


def _check_writable(json_file: Path | None) -> None:
    """A results file that cannot be written is found out before the work, not after it."""
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise OptionError(f"--json {json_file}: not a file in an existing folder")


def _write(json_file: Path | None, result: dict[str, Any]) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _quiet_transformers() -> None:
    """Keep transformers' bar for loading weights out of the view."""
    from transformers.utils import logging

    logging.disable_progress_bar()
