"""The command line: `python -m focus_compile` or `focus-compile`. One command a file.

Commands import torch and transformers only when they run, so that `--help` is quick. Exit codes:
0, or 1 where the answer is no (`doctor`, `explain`, `tune`) or runs differ (`diff`, `replay`) or an
error was not foreseen, or 2 where the input is to be mended.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from focus_compile.cli.bench import bench_command
from focus_compile.cli.common import debugging
from focus_compile.cli.demo import demo_command
from focus_compile.cli.doctor import doctor_command
from focus_compile.cli.eval import eval_command
from focus_compile.cli.explain import explain_command
from focus_compile.cli.fidelity import fidelity_command
from focus_compile.cli.generate import generate_command
from focus_compile.cli.records import (
    diff_command,
    record_command,
    replay_command,
    report_command,
)
from focus_compile.cli.tune import tune_command

app = typer.Typer(
    name="focus-compile",
    help="Make diffusion language models incremental through torch.compile.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo_command)
app.command("doctor")(doctor_command)
app.command("explain")(explain_command)
app.command("bench")(bench_command)
app.command("generate")(generate_command)
app.command("eval")(eval_command)
app.command("fidelity")(fidelity_command)
app.command("record")(record_command)
app.command("replay")(replay_command)
app.command("diff")(diff_command)
app.command("report")(report_command)
app.command("tune")(tune_command)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"focus-compile {version('focus-compile')}")
    except PackageNotFoundError:
        typer.echo("focus-compile, not installed")
    raise typer.Exit


@app.callback()
def settings(
    debug: Annotated[
        bool, typer.Option("--debug", help="Keep the stack traces of errors.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Make diffusion language models incremental through torch.compile."""
    debugging.set(debug)
