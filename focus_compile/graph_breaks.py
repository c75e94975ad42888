"""Where Dynamo cut a forward: a graph that holds half of a model cannot be planned."""

from __future__ import annotations

import traceback

from torch._dynamo.utils import graph_break_reasons

from focus_compile.passes.graph_tools import TORCH

__all__ = ["latest_break", "uncut"]


def latest_break() -> str:
    """`Dynamo cut a forward at file.py:12 in forward: code`; empty if it cut none."""
    if not graph_break_reasons:
        return ""
    return f"Dynamo cut a forward{_line(graph_break_reasons[-1].user_stack)}"


def _line(stack: list[traceback.FrameSummary]) -> str:
    """The innermost frame outside torch."""
    frames = [frame for frame in stack if TORCH not in frame.filename] or stack
    if not frames:
        return ""
    frame = frames[-1]
    path = frame.filename.rsplit("/", 1)[-1]
    return f" at {path}:{frame.lineno} in {frame.name}: {frame.line}"


def uncut(remedy: str) -> str:
    """The remedy, and where Dynamo last cut a forward, if it did."""
    cut = latest_break()
    if not cut:
        return remedy
    found = (
        f"{cut} (TORCH_LOGS=graph_breaks says why): no graph holds the whole of it. Where experts "
        'in a loop are why, model.set_experts_implementation("grouped_mm") avoids it.'
    )
    return f"{remedy} {found}" if remedy else found
