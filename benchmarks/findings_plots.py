"""Draws the studies of `benchmarks.findings` into docs/images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["draw"]

IMAGES = Path("docs/images")
KINDS = ("needle", "table")
Rows = Sequence[Mapping[str, Any]]


def draw(document: Mapping[str, Any]) -> None:
    """A plot of every study that the document holds.

    document: what benchmarks/results/findings.json holds.
    """
    by_study: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in document["rows"]:
        by_study[row["study"]].append(row)
    plt.rcParams["svg.hashsalt"] = "focus_compile"
    for study, rows in by_study.items():
        figure = _PLOTS[study](rows)
        figure.savefig(IMAGES / f"findings_{study}.svg", metadata={"Date": None})
        plt.close(figure)


def _recall(rows: Rows) -> Figure:
    """By call, a panel for each kind, a line for each number of tokens a call."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True, layout="constrained")
    for panel, kind in zip(axes, KINDS, strict=True):
        for row in (row for row in rows if row["kind"] == kind):
            tokens = np.arange(len(row["recall"])) * row["per_step"]
            values = [np.nan if value is None else value for value in row["recall"]]
            panel.plot(tokens, values, label=row["name"], linewidth=1.2)
        panel.set_title(kind)
        panel.set_xlabel("tokens decoded")
    axes[0].set_ylabel("recall of the focus rows")
    axes[0].set_ylim(0, 1.02)
    axes[1].legend(title="tokens")
    return figure


def _rows(rows: Rows) -> Figure:
    """Values right and recall, confident rows beside random ones."""
    return _bars(rows, [row["name"] for row in rows if row["kind"] == KINDS[0]])


def _reuse(rows: Rows) -> Figure:
    """Values right by the number of steps that lists serve; a line for each kind and alpha."""
    figure, panel = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        name = f"{row['kind']}, α={row['options']['keep_ratio']:g}"
        point = (row["options"]["list_reuse"], 100 * row["right"] / row["asked"])
        lines[name].append(point)
    for name, points in lines.items():
        panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
    _log_axis(panel, {x for points in lines.values() for x, _ in points})
    panel.set_xlabel("steps that read the same lists")
    panel.set_ylabel("values right, %")
    panel.set_ylim(0, 103)
    panel.legend()
    return figure


def _bars(rows: Rows, names: Sequence[str]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True, layout="constrained")
    at = np.arange(len(names))
    measures: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("values right, %", lambda row: 100 * row["right"] / row["asked"]),
        ("recall, %", lambda row: 100 * _mean(row["recall"])),
    )
    for panel, (title, value) in zip(axes, measures, strict=True):
        for number, kind in enumerate(KINDS):
            values = [value(row) for row in rows if row["kind"] == kind]
            panel.barh(at + 0.4 * number - 0.2, values, 0.38, label=kind)
        panel.set_xlabel(title)
        panel.set_xlim(0, 102)
    axes[0].set_yticks(at, names)
    axes[0].invert_yaxis()
    axes[1].legend()
    return figure


def _alpha(rows: Rows) -> Figure:
    """Values right by alpha: a panel for each kind, a line for each way of judging blocks."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True, layout="constrained")
    for panel, kind in zip(axes, KINDS, strict=True):
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in (row for row in rows if row["kind"] == kind):
            name = row["name"].rpartition(" α=")[0]
            lines[name].append((row["options"]["keep_ratio"], 100 * row["right"] / row["asked"]))
        for name, points in lines.items():
            style = "--" if name.endswith("no sinks") else "-"
            panel.plot(
                *zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=name
            )
        panel.set_title(kind)
        _log_axis(panel, {x for points in lines.values() for x, _ in points})
        panel.set_xlabel("α, share of key blocks kept")
    axes[0].set_ylabel("values right, %")
    axes[0].set_ylim(0, 103)
    axes[1].legend()
    return figure


def _width(rows: Rows) -> Figure:
    """Recall against the rows that a step computes, a colour for each rho, both kinds."""
    per_step = sorted({row["per_step"] for row in rows})
    figure, axes = plt.subplots(
        1, len(per_step), figsize=(8.4, 3.2), sharey=True, layout="constrained"
    )
    for panel, calls in zip(axes, per_step, strict=True):
        for kind, marker in zip(KINDS, "os", strict=True):
            lines: dict[int, list[tuple[float, float]]] = defaultdict(list)
            for row in rows:
                if row["kind"] == kind and row["per_step"] == calls:
                    point = (row["rows"], _mean(row["recall"]))
                    lines[row["options"]["expansion"]].append(point)
            for colour, (rho, points) in enumerate(sorted(lines.items())):
                panel.plot(
                    *zip(*sorted(points), strict=True),
                    color=f"C{colour}",
                    marker=marker,
                    markersize=4,
                    label=f"ρ={rho}, {kind}",
                )
        panel.set_title(f"{calls} token{'s' if calls > 1 else ''} a call")
        panel.set_xlabel("rows a step computes")
    axes[0].set_ylabel("recall of the focus rows")
    axes[0].set_ylim(0.8, 1.005)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize="small", loc="outside right upper")
    return figure


def _scaling(rows: Rows) -> Figure:
    """Values right and recall by length."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    for kind in KINDS:
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["length"])
        lengths = [row["length"] for row in mine]
        right = [100 * row["right"] / row["asked"] for row in mine]
        axes[0].plot(lengths, right, marker="o", label=kind)
        axes[1].plot(lengths, [_mean(row["recall"]) for row in mine], marker="o", label=kind)
    for panel, title in zip(axes, ("values right, %", "recall of the focus rows"), strict=True):
        _log_axis(panel, {row["length"] for row in rows})
        panel.set_xlabel("tokens of prompt and response")
        panel.set_ylabel(title)
    axes[0].set_ylim(0, 103)
    axes[1].set_ylim(0, 1.02)
    axes[1].legend()
    return figure


def _sinks(rows: Rows) -> Figure:
    """Overlap between layers, the longest of each kind; between calls, layer by layer."""
    longest = max(row["length"] for row in rows)
    mine = [row for row in rows if row["length"] == longest]
    figure, axes = plt.subplots(1, len(mine) + 1, figsize=(10.5, 3.3), layout="constrained")
    for panel, row in zip(axes[:-1], mine, strict=True):
        image = panel.imshow(row["layers"], vmin=0, vmax=1, cmap="viridis")
        panel.set_title(f"{row['kind']}, {longest:,} tokens", fontsize="medium")
        panel.set_xlabel("layer")
        panel.set_ylabel("layer")
    figure.colorbar(image, ax=axes[:-1], label="overlap (Jaccard)", shrink=0.8)
    for row in mine:
        layers = range(len(row["steps"]))
        axes[-1].plot(
            layers, row["steps"], marker="o", markersize=3, label=f"{row['kind']}: last call"
        )
        axes[-1].plot(
            layers, row["block"], marker="s", markersize=3, label=f"{row['kind']}: block entry"
        )
    axes[-1].set_xlabel("layer")
    axes[-1].set_title("same layer, other call", fontsize="medium")
    axes[-1].set_ylim(0, 1.02)
    axes[-1].legend(fontsize="small")
    return figure


def _log_axis(panel: Any, values: set[float]) -> None:
    """A logarithmic axis that names the values measured."""
    panel.set_xscale("log")
    panel.set_xticks(sorted(values), [f"{value:,g}" for value in sorted(values)])
    panel.minorticks_off()


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


_PLOTS: Mapping[str, Callable[[Rows], Figure]] = {
    "recall": _recall,
    "rows": _rows,
    "alpha": _alpha,
    "width": _width,
    "reuse": _reuse,
    "scaling": _scaling,
    "sinks": _sinks,
}
