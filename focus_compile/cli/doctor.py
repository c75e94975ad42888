"""`doctor`: what this installation can do, and a self-test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from focus_compile.cli.common import (
    JsonOption,
    check_writable,
    debugging,
    output,
    plain_errors,
    quiet_transformers,
    write_json,
)
from focus_compile.config import LOWERINGS
from focus_compile.errors import OptionError

if TYPE_CHECKING:
    from focus_compile.doctor import Check

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor_command(
    self_test: Annotated[
        bool, typer.Option(help="Decode a question with the bundled model, dense and with focus.")
    ] = True,
    lowering: Annotated[
        str, typer.Option(help="Of the self-test: eager takes seconds, inductor a minute or two.")
    ] = "eager",
    device: Annotated[
        str | None, typer.Option(help="Of the self-test; the first GPU, or the CPU without one.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Say what will run fast here and what will not, and test it.

    Exit code 0 where nothing stands in the way, 1 where a check or the self-test fails.
    """
    with plain_errors():
        check_writable(json_file)
        if lowering not in LOWERINGS:
            raise OptionError.unknown(lowering, LOWERINGS, kind="lowering")
        console = output(json_file)
        with console.status("looking around"):
            from focus_compile import doctor
            from focus_compile.doctor import self_test as test

            quiet_transformers()
            checks = doctor.examine()
        figures = None
        if self_test:
            with console.status("testing"):
                checks.append(test.check_inductor(device))
                outcome, figures = test.self_test(lowering, device, debug=debugging.get())
                checks.append(outcome)
        console.print(_table(checks))
        result = doctor.to_dict(checks) | {"self_test": figures and figures.to_dict()}
        if result["ok"]:
            console.print("focus_compile works here.", highlight=False)
        write_json(json_file, result)
        if not result["ok"]:
            raise typer.Exit(1)


def _table(checks: list[Check]) -> Table:
    rows = Table(box=None, pad_edge=False)
    for column in ("", "check", "found"):
        rows.add_column(column, overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.advice:
            found.append(f"\n→ {check.advice}", style="italic")
        rows.add_row(Text(check.status, style=_STYLES[check.status]), check.name, found)
    return rows
