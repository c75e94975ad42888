"""Results files: one flat list of rows, written after every arm of every cell, and merged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["KEY", "add_break_even", "empty", "load", "merge", "write"]

KEY = ("device", "model", "context", "block", "per_step", "alpha", "arm")
LABEL = (
    "Compute ratios: stock models of the shapes with random weights. They say how fast the work is "
    "done, nothing about answers."
)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def empty() -> dict[str, Any]:
    """A result without rows."""
    return {"label": LABEL, "runs": {}, "checks": {}, "refused": {}, "rows": []}


def load(file: Path) -> dict[str, Any]:
    """A results file, or an empty one."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else empty()


def write(file: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: a run may be killed at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def merge(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All runs and rows; a row measured again replaces the older one.

    Ratios are only formed between rows of one run, so a cell whose arms come from several runs
    keeps the rows of each: a row's key and its run identify it, and the newest run with the arms
    that a ratio needs is used.
    """
    merged = empty()
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        for model in {row["model"] for row in result["rows"]}:
            merged["refused"].pop(model, None)
        for name in ("runs", "checks", "refused"):
            merged[name] |= result.get(name, {})
        for name in ("environment", "ceilings", "commit", "suite"):
            if name in result:
                merged[name] = result[name]
        merged.setdefault("composition", []).extend(result.get("composition", []))
        for row in result["rows"]:
            rows[(*key(row), row.get("run"))] = row
    merged["rows"] = list(rows.values())
    return merged


def add_break_even(rows: list[dict[str, Any]], generated: int) -> None:
    """Tokens after which an arm's compilation has paid for itself against eager vanilla."""
    eager = {
        (*key(row)[:-1], row["run"]): row["total_s"]
        for row in rows
        if row["arm"] == "a" and row.get("total_s")
    }
    for row in rows:
        baseline = eager.get((*key(row)[:-1], row["run"]))
        if baseline is None or not row.get("total_s"):
            continue
        saved = (baseline - row["total_s"]) / generated
        row["break_even_tokens"] = row["compile_s"] / saved if saved > 0 else None
