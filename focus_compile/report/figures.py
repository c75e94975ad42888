"""The figures of a report: SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from focus_compile.errors import OptionError
from focus_compile.report.numbers import COMPUTED, DECIDED, FOCUS, Curves

__all__ = [
    "confidence",
    "consistency",
    "kept_keys",
    "milliseconds",
    "missing",
    "recall",
    "time_split",
    "timeline",
]

INK, FAINT = "#010203", "#010204"
"""Stand for the page's text and grid colours."""
SERIES = ("#3b7dd8", "#d9822b", "#2a9d6f", "#b04a8f", "#8a8f98")
"""Of like lightness, so that they can be told from a light page and a dark one."""
STATES = {COMPUTED: "#9db7d9", FOCUS: SERIES[0], DECIDED: SERIES[1]}
MAP = "viridis"
_WIDTH = 9.0


def timeline(states: Tensor, first: int, name: str) -> str:
    """States of positions from `first` on, int64 [calls, positions]."""

    def draw(axes: Any) -> None:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        colours = ListedColormap(["none", *STATES.values()])
        calls, positions = states.shape
        axes.imshow(
            states.numpy(), aspect="auto", interpolation="none", cmap=colours, vmin=-0.5, vmax=3.5,
            extent=(first - 0.5, first + positions - 0.5, calls - 0.5, -0.5),
        )  # fmt: skip
        axes.set_xlabel("position")
        axes.set_ylabel("call")
        labels = ("computed", "computed, expected to decode", "decided after the call")
        patches = [Patch(color=c, label=t) for c, t in zip(STATES.values(), labels, strict=True)]
        _legend(axes, patches)

    return _svg(draw, name, height=min(6.0, 2.2 + 0.05 * states.shape[0]))


def milliseconds(values: Sequence[float], programs: Sequence[str], name: str) -> str:
    """Time of every call, by program."""

    def draw(axes: Any) -> None:
        for number, program in enumerate(dict.fromkeys(programs)):
            chosen = [(at, values[at]) for at, own in enumerate(programs) if own == program]
            axes.scatter(*zip(*chosen, strict=True), s=14, color=SERIES[number], label=program)
        axes.set_xlabel("call")
        axes.set_ylabel("milliseconds")
        axes.set_yscale("log")
        _plain_numbers(axes)
        _legend(axes)

    return _svg(draw, name, height=2.8)


def kept_keys(layers: Sequence[int], share: Tensor, sinks: Tensor | None, name: str) -> str:
    """Share of steps in which layers kept the prompt's key blocks, [layers, blocks], and in which
    positions were sinks, [positions]."""

    def draw(axes: Any) -> None:
        _, blocks = share.shape
        image = axes.imshow(
            share.numpy(), aspect="auto", interpolation="none", cmap=MAP, vmin=0, vmax=1,
            extent=(-0.5, blocks - 0.5, len(layers) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_ylabel("layer")
        axes.set_xlabel("key block of the prompt")
        _bar(axes, image, "share of steps")
        if sinks is not None:
            per_block = len(sinks) / blocks
            places = [int(place) for place in sinks.nonzero()[:, 0]]
            at = [place / per_block - 0.5 for place in places]
            below = [len(layers) - 0.1] * len(at)
            sizes = [6 + 30 * float(sinks[place]) for place in places]
            axes.scatter(
                at, below, s=sizes, marker="^", color=SERIES[1], clip_on=False, label="sink"
            )
            axes.set_ylim(len(layers) + 0.3, -0.5)
            _legend(axes)

    return _svg(draw, name, height=1.8 + 0.24 * len(layers))


def consistency(share: Tensor, name: str) -> str:
    """Share of positions that layers have in common, [layers, layers]."""

    def draw(axes: Any) -> None:
        image = axes.imshow(share.numpy(), interpolation="none", cmap=MAP, vmin=0, vmax=1)
        axes.set_xlabel("layer")
        axes.set_ylabel("layer")
        _bar(axes, image, "share in common")

    return _svg(draw, name, height=4.2, width=5.4)


def confidence(curves: Curves, name: str) -> str:
    """Mean confidence by call."""

    def draw(axes: Any) -> None:
        _line(axes, curves.decided, 1, "decided after the call")
        _line(axes, curves.undecided, 0, "left undecided")
        _share_axes(axes, "mean confidence")
        least = min(v for v in (*curves.decided, *curves.undecided) if v is not None)
        span = max(1 - least, 1e-3)
        axes.set_ylim(max(-0.04, least - 0.1 * span), 1 + 0.08 * span)
        axes.yaxis.get_major_formatter().set_useOffset(False)

    return _svg(draw, name, height=2.8)


def recall(curves: Curves, name: str) -> str:
    """Share of the decided positions that were expected, by call."""

    def draw(axes: Any) -> None:
        _line(axes, curves.recall, 0, "this call", line="")
        _line(axes, curves.recall_so_far, 1, "all calls so far", marker="")
        _share_axes(axes, "share expected")

    return _svg(draw, name, height=2.8)


def time_split(split: dict[str, float], name: str) -> str:
    """Seconds by what they went into, as one bar."""

    def draw(axes: Any) -> None:
        left = 0.0
        for number, (part, seconds) in enumerate(split.items()):
            label = f"{part} {seconds:.2f} s"
            axes.barh([0], [seconds], left=left, color=SERIES[number % len(SERIES)], label=label)
            left += seconds
        axes.set_yticks([])
        axes.set_xlim(0, left or 1)
        axes.set_xlabel("seconds")
        _legend(axes)

    return _svg(draw, name, height=1.6)


def _line(
    axes: Any,
    values: Sequence[float | None],
    colour: int,
    label: str,
    line: str = "-",
    marker: str = ".",
) -> None:
    known = [(at, value) for at, value in enumerate(values) if value is not None]
    if known:
        style = {"linestyle": line or "none", "marker": marker}
        axes.plot(*zip(*known, strict=True), color=SERIES[colour], label=label, **style)


def _share_axes(axes: Any, label: str) -> None:
    axes.set_xlabel("call")
    axes.set_ylabel(label)
    axes.set_ylim(-0.04, 1.04)
    axes.grid(axis="y", color=FAINT, alpha=0.25)
    _legend(axes)


def _legend(axes: Any, handles: Sequence[Any] | None = None) -> None:
    found = handles if handles is not None else axes.get_legend_handles_labels()[0]
    if found:
        axes.legend(
            handles=list(found), loc="lower left", bbox_to_anchor=(0, 1), ncols=len(found),
            frameon=False, fontsize=9, borderaxespad=0.2, handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bar(axes: Any, image: Any, label: str) -> None:
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(label)
    bar.outline.set_edgecolor(INK)


_RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _svg(draw: Callable[[Any], None], name: str, *, height: float, width: float = _WIDTH) -> str:
    """An SVG element whose ids begin with `name`, labelled by the page."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib") from None
    with rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), name)


def missing(library: str) -> OptionError:
    """What to say where an optional library is not installed."""
    return OptionError(f"a report needs {library}: pip install focus-compile[report]")


def _inline(text: str, name: str) -> str:
    """A matplotlib SVG file as an element of a page: ids of its own, colours of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    text = text.replace(INK, "currentColor").replace(FAINT, "currentColor")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    start = re.search(r"<svg[^>]*>", text)
    assert start is not None
    box = re.search(r'viewBox="[^"]*"', start.group())
    assert box is not None
    opened = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group()} role="img" aria-labelledby="{name}-caption">'
    )
    return opened + text[start.end() :].strip()
