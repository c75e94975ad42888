"""The command line: `python -m focus_compile` or `focus-compile`.

Commands import torch and transformers only when they run, so that `--help` is quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from focus_compile.errors import FocusError, OptionError

app = typer.Typer(
    name="focus-compile",
    help="Make diffusion language models incremental through torch.compile.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result here.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Tokens of prompt and response together.")]
GenLengthOption = Annotated[int, typer.Option(min=1, help="Tokens to decode, one a call.")]
BlockLengthOption = Annotated[int, typer.Option(min=1, help="Tokens per decode block.")]
QuestionsOption = Annotated[int, typer.Option(min=1, help="Facts asked for in a question.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the (first) question.")]


@app.command("demo")
def demo_command(
    length: LengthOption = 2048,
    gen_length: GenLengthOption = 64,
    block_length: BlockLengthOption = 32,
    policy: Annotated[
        str, typer.Option(help="focus-dllm, dual-cache, prefix-cache or exact.")
    ] = "focus-dllm",
    keep_ratio: Annotated[
        float, typer.Option(help="Share of the prompt's key blocks that sparse layers read.")
    ] = 0.5,
    kind: Annotated[str, typer.Option(help="Question: needle or table.")] = "needle",
    seed: SeedOption = 0,
    questions: QuestionsOption = 4,
    json_file: JsonOption = None,
) -> None:
    """Decode one long question with the bundled model, dense against focus."""
    with _plain_errors():
        _check_writable(json_file)
        _quiet_transformers()
        from focus_compile.demo import retrieval, showcase

        settings = showcase.ShowcaseSettings(
            length=length,
            gen_length=gen_length,
            block_length=block_length,
            policy=policy,
            keep_ratio=keep_ratio,
            kind=retrieval.as_kind(kind),
            seed=seed,
            questions=questions,
        )
        console = Console()
        result = showcase.run(settings, console)
        console.print(showcase.table(result))
        same = "the same answers as" if result.same_answers else "other answers than"
        console.print(f"focus: {same} dense, {result.speedup:.1f} times as fast")
        _write(json_file, result.to_dict())


@app.command("fidelity")
def fidelity_command(
    length: LengthOption = 1024,
    examples: Annotated[int, typer.Option(min=1, help="Questions of each kind.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Questions decoded side by side.")] = 8,
    gen_length: GenLengthOption = 64,
    block_length: BlockLengthOption = 32,
    questions: QuestionsOption = 4,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")] = "cpu",
    lowering: Annotated[
        str, typer.Option(help="inductor, or eager: slower calls without compilation.")
    ] = "inductor",
    json_file: JsonOption = None,
) -> None:
    """Count the answers that each policy keeps, and how well focus rows are predicted."""
    with _plain_errors():
        _check_writable(json_file)
        _quiet_transformers()
        from focus_compile.demo import fidelity, retrieval

        settings = fidelity.FidelitySettings(
            length=length,
            examples=examples,
            batch=batch,
            gen_length=gen_length,
            block_length=block_length,
            questions=questions,
            seed=seed,
            device=device,
            lowering=lowering,
        )
        console = Console()
        each = len(retrieval.KINDS) * examples
        with _answers_bar(console) as bar:
            task = bar.add_task("dense", total=len(fidelity.arms(settings)) * each)

            def advance(arm: str, answers: int) -> None:
                bar.update(task, advance=answers, description=arm)

            for result in fidelity.run(settings, advance):
                _write(json_file, result.to_dict())
                if not console.is_terminal:
                    arm = list(result.scores)[-1]
                    console.print(f"{arm}: {each} answers")
        console.print(fidelity.table(result))


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
