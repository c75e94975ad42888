"""Renders results into docs/performance.md and its plots.

python -m benchmarks.report
python -m benchmarks.report benchmarks/results/gpu_h100.json more.json --merged all.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.suite import results
from benchmarks.suite.plots import draw
from benchmarks.suite.tables import document

ROOT = Path(__file__).resolve().parents[1]
app = typer.Typer(add_completion=False)
console = Console()


@app.command()
def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Results; all gpu_*.json of the folder if none.")
    ] = None,
    out: Path = ROOT / "docs" / "performance.md",
    merged: Annotated[Path | None, typer.Option(help="Write the merged results too.")] = None,
) -> None:
    """Merge results files, draw, and write the page."""
    given = files or sorted((ROOT / "benchmarks" / "results").glob("gpu_*.json"))
    if not given:
        console.print("no results: run python -m benchmarks.run first")
        raise typer.Exit(1)
    result = results.merge(map(results.load, given))
    if merged is not None:
        results.write(merged, result)
    drawn = draw(result, out.parent / "images")
    if not drawn:
        console.print('no plots: pip install "focus-compile\\[benchmarks]"')
    links = {
        part: [file.relative_to(out.parent).as_posix() for file in images]
        for part, images in drawn.items()
    }
    out.write_text(document(result, links), encoding="utf-8")
    console.print(f"wrote {out} from {len(result['rows'])} rows of {len(given)} files")


if __name__ == "__main__":
    app()
