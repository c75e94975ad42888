"""What the commands share: options, errors in one line, results files."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from focus_compile.errors import FocusError, OptionError
from focus_compile.fallback import FocusWarning

JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result here; - prints it instead of anything else"),
]
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
SeedOption = Annotated[int, typer.Option(help="Seed of the (first) question.")]
BLOCK_LENGTH = 32
"""Of the bundled block-diffusion model."""
STDOUT = Path("-")
"""As a results file: standard output."""
BAD_INPUT, UNEXPECTED = 2, 1
"""Exit codes: what the user can mend, and what nobody foresaw."""

debugging: ContextVar[bool] = ContextVar("focus_compile_debugging", default=False)
"""Whether errors keep their stack traces: `--debug` of the app."""
_PASSED_ON = (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError)


@contextmanager
def plain_errors() -> Iterator[None]:
    """A failure ends in one line: what focus_compile raised on purpose with exit code 2, anything
    else with 1; with `--debug` it stays as it was raised. Warnings of ours are one line as well.

    torch wraps what a backend raises while it compiles, so the chain of causes is searched.
    """
    with _plain_warnings():
        try:
            yield
        except _PASSED_ON:
            raise
        except Exception as error:
            if debugging.get():
                raise
            ours = _focus_error(error)
            _say("error", str(ours) if ours is not None else _unexpected(error), "red")
            raise typer.Exit(UNEXPECTED if ours is None else BAD_INPUT) from None


def _focus_error(error: BaseException | None) -> FocusError | None:
    while error is not None and not isinstance(error, FocusError):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error


def _unexpected(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (not foreseen; --debug before the command shows where)"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, FocusWarning):
                _say("warning", str(message), "yellow")
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _say(kind: str, message: str, style: str) -> None:
    Console(stderr=True).print(
        f"{kind}: {message}", style=style, markup=False, highlight=False, soft_wrap=True
    )


def output(json_file: Path | None) -> Console:
    """Where tables go: standard output, or, where that is the result's, standard error."""
    return Console(stderr=json_file == STDOUT)


def counting_bar() -> Progress:
    """A bar of counts, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def check_writable(json_file: Path | None) -> None:
    """A results file that cannot be written is found out before the work, not after it."""
    if json_file is not None and json_file != STDOUT:
        check_output_file("--json", json_file)


def check_output_file(option: str, file: Path) -> None:
    """Raises OptionError unless there may be a file of that name."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise OptionError(f"{option} {file}: not a file in an existing folder")


def check_report(option: str, file: Path | None) -> None:
    """The same for a report, and for the libraries that it needs."""
    if file is None:
        return
    check_output_file(option, file)
    from focus_compile.report.figures import missing

    for library, module in (("matplotlib", "matplotlib"), ("Jinja2", "jinja2")):
        if find_spec(module) is None:
            raise missing(library)


def write_json(json_file: Path | None, result: dict[str, Any]) -> None:
    if json_file is None:
        return
    text = json.dumps(result, indent=2) + "\n"
    if json_file == STDOUT:
        sys.stdout.write(text)
    else:
        json_file.write_text(text, encoding="utf-8")


def write_progress(json_file: Path | None, result: dict[str, Any]) -> None:
    """A result that is not whole yet: to a file, so that what was measured is not lost."""
    if json_file != STDOUT:
        write_json(json_file, result)


def quiet_transformers() -> None:
    """Keep transformers' bar for loading weights out of the view."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def check_blocks(block_length: int) -> None:
    if block_length != BLOCK_LENGTH:
        raise OptionError.invalid(
            "block_length", block_length, f"{BLOCK_LENGTH}, as the bundled model was trained"
        )
