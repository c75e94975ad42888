"""The plots of docs/performance.md: speed-up by context, time split, and the roofline."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.suite.cellbook import CellBook, Entry, headline

__all__ = ["draw"]

PEERS = {"a": "over eager", "b": "over Inductor", "c": "over Fast-dLLM", "d": "over compiled dual"}
CACHED = "cdefgh"


def draw(result: dict[str, Any], folder: Path) -> dict[tuple[str, str], list[Path]]:
    """SVG files by (device, model). Needs matplotlib; without it there are none."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "focus_compile"
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[tuple[str, str], list[Path]] = {}
    for device, model, entries in CellBook.of(result["rows"]).parts():
        chosen = headline(entries)
        run = next(iter(sorted(chosen[0].runs, reverse=True)))
        ceilings = result["runs"][run]["ceilings"]
        stem = f"performance_{_slug(device)}_{model}"
        plots: dict[str, Callable[[Any], None]] = {
            "speedup": lambda axes, chosen=chosen: _speedup(axes, chosen),
            "split": lambda axes, chosen=chosen: _split(axes, chosen),
            "roofline": lambda axes, chosen=chosen, ceilings=ceilings: _roofline(
                axes, chosen, ceilings
            ),
        }
        for name, plot in plots.items():
            file = folder / f"{stem}_{name}.svg"
            _save(plot, f"{model}, {device}", file)
            drawn.setdefault((device, model), []).append(file)
    return drawn


def _slug(device: str) -> str:
    known = re.search(r"\b([A-Z]{1,3}\d{2,4})\b", device)
    return known.group(1).lower() if known else "cpu"


def _save(plot: Callable[[Any], None], title: str, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    plot(axes)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _speedup(axes: Any, entries: list[Entry]) -> None:
    for block in sorted({entry.block for entry in entries}):
        for number, (letter, label) in enumerate(PEERS.items()):
            points = [
                (e.context, ratio)
                for e in entries
                if e.block == block and (ratio := e.ratio(letter)) is not None
            ]
            if points:
                line = "-" if block >= 64 else "--"
                name = f"{label}, block {block}"
                axes.plot(
                    *zip(*points, strict=True), line, color=f"C{number}", marker="o", label=name
                )
    _contexts(axes, entries)
    axes.set_ylabel("times faster, 256 tokens")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def _contexts(axes: Any, entries: list[Entry]) -> None:
    contexts = sorted({entry.context for entry in entries})
    axes.set_xticks(contexts, [f"{context / 1024:g}K" for context in contexts])
    axes.set_xlabel("prompt tokens")


def _split(axes: Any, entries: list[Entry]) -> None:
    """Stacked bars: refreshes below, steps above, of the largest block."""
    block = max(entry.block for entry in entries)
    labels: list[str] = []
    parts: tuple[list[float], list[float]] = ([], [])
    for entry in entries:
        if entry.block != block:
            continue
        for letter in CACHED:
            row = entry.arm(letter)
            if row is None or row.get("step_ms") is None:
                continue
            refreshes = row["refreshes"] * row["refresh_ms"] / 1e3
            labels.append(f"{entry.context // 1024}K {letter}")
            parts[0].append(refreshes)
            parts[1].append(row["total_s"] - refreshes)
    places = range(len(labels))
    axes.bar(places, parts[0], label="refresh")
    axes.bar(places, parts[1], bottom=parts[0], label="steps and sampler")
    axes.set_xticks(list(places), labels, rotation=60, fontsize=7)
    axes.set_ylabel(f"seconds, block {block}")


def _roofline(axes: Any, entries: list[Entry], ceilings: dict[str, float]) -> None:
    """Useful bytes a second of a step, against the copy bandwidth of the same run."""
    block = max(entry.block for entry in entries)
    for letter in CACHED:
        points = [
            (e.context, row["step_tb_s"])
            for e in entries
            if e.block == block and (row := e.arm(letter)) is not None and row.get("step_tb_s")
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"({letter})")
    axes.axhline(ceilings["copy_tb_s"], color="black", linestyle=":", label="copy bandwidth")
    _contexts(axes, entries)
    axes.set_ylabel("TB/s that a step needed to read")
    axes.set_ylim(bottom=0)
