"""`bench`: dense against focus on a model, by length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from focus_compile.cli.common import (
    JsonOption,
    check_writable,
    counting_bar,
    output,
    plain_errors,
    write_json,
    write_progress,
)
from focus_compile.cli.decoding import GenLengthOption
from focus_compile.cli.model_request import ModelRequest, with_model

if TYPE_CHECKING:
    from focus_compile.bench import BenchCell, BenchResult


@with_model()
def bench_command(
    request: ModelRequest,
    length: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Tokens of prompt and response; may be repeated. 1024."),
    ] = None,
    gen_length: GenLengthOption = 64,
    tokens_per_call: Annotated[int, typer.Option(min=1, help="Tokens decoded in a call.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Generations that are timed.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Time a model compiled by Inductor against the same with focus, taking turns in one run.

    Prompts are random ids: this measures speed, and says nothing about answers.
    """
    with plain_errors():
        check_writable(json_file)
        request.check()
        console = output(json_file)
        from focus_compile import bench

        with console.status(f"loading {request.name}"):
            loaded = request.load()
            options = request.focus_options(
                loaded, needs_mask=True, tokenizer=request.tokenizer_or_none()
            )
        settings = bench.BenchSettings(
            options=options,
            lengths=tuple(length or (1024,)),
            gen_length=gen_length,
            tokens_per_call=tokens_per_call,
            rounds=rounds,
            seed=seed,
        )
        settings.check()
        loaded.check_length(max(settings.lengths))
        with counting_bar() as bar:
            task = bar.add_task("compiling", total=bench.phases(settings))

            def advance(phase: str) -> None:
                bar.update(task, advance=1, description=phase)

            for result in bench.run(loaded, settings, advance):
                write_progress(json_file, result.to_dict())
        console.print(_title(result), highlight=False, soft_wrap=True)
        console.print(_table(result))
        for line in _remarks(result):
            console.print(line, highlight=False, soft_wrap=True)
        write_json(json_file, result.to_dict())


def _title(result: BenchResult) -> str:
    known = result.settings
    return (
        f"{known['model']} ({known['class']}, {known['parameters'] / 1e6:,.1f}M parameters), "
        f"{known['dtype']} on {known['device']}; random prompts: speed only"
    )


def _table(result: BenchResult) -> Table:
    rows = Table()
    rows.add_column("tokens")
    for cell in result.cells:
        rows.add_column(f"{cell.length:,}", justify="right", style="red" if cell.loses else "")

    def row(name: str, of: Callable[[BenchCell], str]) -> None:
        rows.add_row(name, *map(of, result.cells))

    row("dense call, ms", lambda cell: _number(cell.dense_ms, 1))
    row("refresh, ms", lambda cell: _number(cell.refresh_ms, 1))
    row("step, ms", lambda cell: _number(cell.step_ms, 1))
    row("rows a step", lambda cell: _number(cell.rows_per_step, 1))
    row("dense, generation s", lambda cell: _number(cell.dense_seconds, 2))
    row("focus, generation s", lambda cell: _number(cell.focus_seconds, 2))
    row("dense / focus", lambda cell: f"{cell.ratio:.2f}x" + (" slower" if cell.loses else ""))
    row("  least, most", lambda cell: f"{min(cell.ratios):.2f}, {max(cell.ratios):.2f}")
    row("dense, compile s", lambda cell: _number(cell.dense_compile_seconds, 1))
    row("focus, compile s", lambda cell: _number(cell.focus_compile_seconds, 1))
    if any(cell.dense_peak_gib is not None for cell in result.cells):
        row("dense, peak GiB", lambda cell: _number(cell.dense_peak_gib, 2))
        row("focus, peak GiB", lambda cell: _number(cell.focus_peak_gib, 2))
    return rows


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _remarks(result: BenchResult) -> list[str]:
    """What a reader should know of the cells."""
    lines = []
    for cell in result.cells:
        at = f"{cell.length:,} tokens"
        lines += [f"{at}: calls ran the model itself: {why}" for why in cell.exact_because]
        if cell.loses:
            lines.append(f"{at}: focus is not faster here; dense (policy=exact) is the choice")
        elif cell.pays_after:
            lines.append(f"{at}: compiling focus pays from generation {cell.pays_after + 1} on")
    if any(cell.dense_peak_gib is None for cell in result.cells):
        lines.append("Peak memory is known on a GPU only; `explain` says what a trajectory takes.")
    return lines
