"""Draws the figures of docs/concepts.md: `python docs/figures.py`.

`knobs` and `regions` are sketches; `trajectory` is a recorded run of the bundled model.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import focus_compile
from focus_compile import demo
from focus_compile.decode import generate
from focus_compile.demo import retrieval
from focus_compile.records.document import Record
from focus_compile.report.numbers import RunNumbers

IMAGES = Path(__file__).parent / "images"
LENGTH, RESPONSE, BLOCK = 256, 64, 32
OPTIONS = {"block_length": BLOCK, "keep_ratio": 0.5, "lowering": "eager", "dense_if_faster": False}
BLUE, LIGHT, ORANGE = "#2a6fbb", "#9db7d9", "#e08a1e"
GREY, DARK = "#e6e8eb", "#59636e"


def recorded() -> Record:
    """A question decoded by the bundled model, one token a call."""
    model, tokenizer = demo.load()
    question = retrieval.make(tokenizer, LENGTH, response=RESPONSE)
    compiled = focus_compile.compile(model, **OPTIONS)
    prompt = torch.tensor([question.prompt_ids])
    with focus_compile.recording() as run:
        generate(compiled, prompt, gen_length=RESPONSE, block_length=BLOCK)
    return run.record


def knobs() -> None:
    """The three questions that a policy answers, over one layer's attention and all layers."""
    figure, (rows, keys, depth) = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    tokens, prompt, layers = 32, 20, 8
    active = [22, 23, 24, 27, 28]
    computed = torch.zeros(tokens, tokens)
    computed[active] = 1
    _cells(rows, computed, "rows: which tokens are computed?", "keys", "rows")
    read = torch.zeros(tokens, tokens)
    kept = [*range(4), *range(8, 12), *range(prompt, tokens)]
    for row in active:
        read[row, kept] = 1
    _cells(keys, read, "keys: which keys does a layer read?", "keys", "rows")
    left = torch.zeros(layers, tokens)
    left[:2, active] = 1
    left[2:, active[:3]] = 1
    _cells(depth, left, "depth: where do rows leave?", "tokens", "layers")
    for axes in (rows, keys, depth):
        axes.axvline(prompt - 0.5, color=DARK, linewidth=1, linestyle=":")
    _save(figure, "knobs")


def regions() -> None:
    """What each layer of a sparse step reads."""
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    names = ["dense prefix"] * 3 + ["sink capture"] + ["sparse suffix"] * 5 + ["dense tail"]
    tokens, prompt = 64, 48
    read = torch.ones(len(names), tokens)
    for layer in range(4, 9):
        read[layer, :prompt] = 0
        for block in [(0, 5), (2, 4), (1, 5), (3, 4), (0, 3)][layer - 4]:
            read[layer, block * 8 : block * 8 + 8] = 1
        read[layer, [1, 19]] = 2
    read[3, [1, 19]] = 2
    colors = ListedColormap([GREY, BLUE, ORANGE])
    axes.imshow(read, aspect="auto", cmap=colors, vmin=0, vmax=2, interpolation="nearest")
    axes.axvline(prompt - 0.5, color=DARK, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), [f"{name}  {at}" for at, name in enumerate(names)])
    axes.set_xticks([prompt / 2, (prompt + tokens) / 2], ["prompt, in key blocks", "response"])
    labels = zip((BLUE, ORANGE, GREY), ("read", "sinks", "not read"), strict=True)
    handles = [Patch(color=color, label=label) for color, label in labels]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
    _save(figure, "regions")


def trajectory(record: Record) -> None:
    """Rows computed and positions decided in every call of the run."""
    states, first = RunNumbers(record).timeline()
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    colors = ListedColormap([GREY, LIGHT, BLUE, ORANGE])
    calls, positions = states.shape
    axes.imshow(
        states, aspect="auto", cmap=colors, vmin=0, vmax=3, interpolation="nearest",
        extent=(first, first + positions, calls, 0),
    )  # fmt: skip
    axes.set_xlabel("position")
    axes.set_ylabel("call")
    names = ("computed", "computed, expected to decode", "decided after the call", "kept")
    labels = zip((LIGHT, BLUE, ORANGE, GREY), names, strict=True)
    handles = [Patch(color=color, label=label) for color, label in labels]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False)
    _save(figure, "trajectory")


def _cells(axes: Axes, values: torch.Tensor, title: str, across: str, down: str) -> None:
    axes.imshow(values, aspect="auto", cmap=ListedColormap([GREY, BLUE]), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(f"{across}: prompt ⋮ response")
    axes.set_ylabel(down)
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: plt.Figure, name: str) -> None:
    figure.savefig(IMAGES / f"concept_{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    mpl.rcParams |= {"svg.hashsalt": "focus_compile", "font.size": 9, "axes.edgecolor": DARK}
    knobs()
    regions()
    trajectory(recorded())


if __name__ == "__main__":
    main()
