"""`python -m tests.fuzz --minutes 60`: search for a case in which the compiler is wrong."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from focus_compile.demo import environment
from tests.fuzz.case import CORPUS, Case
from tests.fuzz.judge import judge
from tests.fuzz.search import Search
from tests.fuzz.source import source_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="How long to search.")] = 10.0,
    seed: Annotated[int | None, typer.Option(help="Of the first round. [default: drawn]")] = None,
    device: Annotated[str, typer.Option(help="Where the compiled models run.")] = "cpu",
    lowering: Annotated[str, typer.Option(help="eager, or inductor as in use.")] = "eager",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    corpus: Annotated[Path, typer.Option(help="Wrong cases are written here.")] = CORPUS,
    replay: Annotated[
        Path | None, typer.Option(help="Judge one case of the corpus instead, and print its model.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Where there is no git.")] = None,
) -> None:
    """Judge generated models against dense attention and the oracle until the time is up.

    Ends with status 1 if a case was wrong.
    """
    torch.set_num_threads(1)
    _compute_in_full_float32()
    if replay is not None:
        raise typer.Exit(_replay(replay, device, lowering))
    first = random.randrange(1 << 20) << 10 if seed is None else seed
    print(f"seeds from {first} on, {device}, lowering {lowering}", flush=True)
    search, started = Search(device, lowering), time.monotonic()

    def result() -> dict[str, Any]:
        where = environment.describe() | ({"commit": commit} if commit else {})
        if device != "cpu":
            where["device_name"] = torch.cuda.get_device_name(device)
        minutes_taken = round((time.monotonic() - started) / 60, 2)
        return {"minutes": minutes_taken, "environment": where} | search.to_dict()

    def report(search: Search) -> None:
        _print_progress(search, time.monotonic() - started)
        if json_file is not None:
            json_file.write_text(json.dumps(result(), indent=1) + "\n", encoding="utf-8")

    search.run(first, minutes * 60, report)
    for found in search.wrong:
        print(f"WRONG, seen {found.seen} times: {found.detail}\n  {found.write(corpus)}")
    shown = {name: value for name, value in result().items() if name not in ("wrong", "features")}
    print(json.dumps(shown, indent=1))
    raise typer.Exit(1 if search.wrong else 0)


def _compute_in_full_float32() -> None:
    """Without TF32, whose rounding would hide wrong rows."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _print_progress(search: Search, seconds: float) -> None:
    counts = search.to_dict()
    print(
        f"{seconds / 60:6.1f} min, seed {search.seeds[-1]}, {search.cases} cases, "
        f"{counts['steps']} steps, {counts['outcomes']}, {counts['coverage']}",
        flush=True,
    )


def _replay(file: Path, device: str, lowering: str) -> int:
    case = Case.from_json(file.read_text(encoding="utf-8"))
    print(source_of(case.architecture))
    verdict = judge(case, device, lowering)
    print(verdict)
    return int(verdict.outcome == "wrong")


if __name__ == "__main__":
    app()
