"""Does the quality guard know when answers are lost? Poor settings, unguarded and guarded.

    python -m benchmarks.guard_scatter --length 512 --examples 8
    python -m benchmarks.guard_scatter --plot-only

Each setting answers the questions of the retrieval task three times: unguarded, which gives the
values lost; with a fifth of the steps guarded and no bar, which gives the agreement that the guard
sees; and with its default bar, which gives the values that it keeps. Op by op.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

import focus_compile
from focus_compile import demo
from focus_compile.demo import environment, retrieval
from focus_compile.demo.arms import Arm, answer_all
from focus_compile.runtime.quality_guard import QualityGuard
from focus_compile.runtime.store import STORE

matplotlib.use("svg")
from matplotlib import pyplot as plt

RESULT = Path("benchmarks/results/guard_scatter.json")
PLOT = Path("docs/images/guard_scatter.svg")
GEN_LENGTH, BLOCK_LENGTH, GUARD = 64, 32, 0.2
MEAN = {"block_summary": "mean", "key_block": 16, "sink_tokens": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "α=.1": {"keep_ratio": 0.1},
    "α=.25, mean keys, no sinks": MEAN | {"keep_ratio": 0.25},
    "α=.1, mean keys": MEAN | {"keep_ratio": 0.1, "sink_tokens": 16},
    "α=.1, mean keys, no sinks": MEAN | {"keep_ratio": 0.1},
    "α=.05, mean keys, no sinks": MEAN | {"keep_ratio": 0.05},
    "α=.02, no sinks, all layers sparse": MEAN | {"keep_ratio": 0.02, "dense_layers": 0},
}


@dataclass(frozen=True)
class Cell:
    """One setting on one kind of question: values right of those asked, and what the guard saw."""

    setting: str
    kind: str
    asked: int
    unguarded: int
    guarded: int
    """With the default bar."""
    agreement: float | None
    drift: float
    level: str
    """Where the guard with the default bar ended."""
    cost: float
    """Share of the rows that it asked for."""

    @property
    def lost(self) -> float:
        return 1 - self.unguarded / self.asked


def measure(
    model: Any, tokenizer: Any, setting: str, kind: retrieval.Kind, length: int, examples: int
) -> Cell:
    """The three runs of one cell; dense states every value at these lengths."""
    questions = [
        retrieval.make(tokenizer, length, kind=kind, questions=4, response=GEN_LENGTH, seed=seed)
        for seed in range(examples)
    ]
    common = SETTINGS[setting] | {"block_length": BLOCK_LENGTH, "lowering": "eager"}
    runs = ({}, {"guard": GUARD, "guard_agreement": 0.0}, {"guard": GUARD})
    right, guards = [], []
    for options in runs:
        compiled = Arm(setting, common | options).compile(model)
        with focus_compile.record() as history:
            answers = answer_all(
                compiled, tokenizer, questions, gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH
            )
        right.append(sum(sum(answer.right) for answer in answers))
        guards.append((STORE.guard(next(model.parameters())), history))
    seen: QualityGuard = guards[2][0]
    checks = [record for record in guards[1][1] if record.agreement is not None]
    agreement = float(np.mean([record.agreement for record in checks])) if checks else None
    drift = float(np.mean([record.drift for record in checks])) if checks else 0.0
    asked = 4 * examples
    return Cell(setting, kind, asked, right[0], right[2], agreement, drift, seen.measure, seen.cost)


def correlation(cells: Sequence[Cell]) -> float:
    """Between disagreement and values lost, Pearson's."""
    pairs = [(1 - cell.agreement, cell.lost) for cell in cells if cell.agreement is not None]
    if len({lost for _, lost in pairs}) < 2 or len({seen for seen, _ in pairs}) < 2:
        return 0.0
    return float(np.corrcoef(np.array(pairs).T)[0, 1])


def plot(cells: Sequence[Cell], file: Path) -> None:
    """Values lost against disagreement; what the guard leaves of them below."""
    figure, axes = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    seen = [100 * (1 - (cell.agreement or 0)) for cell in cells]
    axes.scatter(seen, [100 * cell.lost for cell in cells], label="unguarded")
    kept = [100 * (1 - cell.guarded / cell.asked) for cell in cells]
    axes.scatter(seen, kept, marker="x", label="guarded")
    axes.set_xlabel("guarded steps whose token is not the dense one, %")
    axes.set_ylabel("values lost, %")
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--examples", type=int, default=8, help="of each kind")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--plot-only", action="store_true", help="of the results there are")
    args = parser.parse_args()
    if not args.plot_only:
        model, tokenizer = demo.load()
        cells: list[Cell] = []
        for setting in SETTINGS:
            for kind in retrieval.KINDS:
                cells.append(measure(model, tokenizer, setting, kind, args.length, args.examples))
                print(cells[-1], flush=True)
            result = {
                "correlation": correlation(cells),
                "cells": [asdict(cell) for cell in cells],
                "settings": {"length": args.length, "examples": args.examples, "guard": GUARD}
                | environment.describe(),
                "options": SETTINGS,
            }
            args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    torch.compiler.reset()
    known = json.loads(args.json.read_text(encoding="utf-8"))
    plot([Cell(**cell) for cell in known["cells"]], args.plot)


if __name__ == "__main__":
    main()
