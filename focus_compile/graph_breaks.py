"""Where Dynamo cut a forward: a graph that holds half of a model cannot be planned."""

from __future__ import annotations

import re
import traceback

from torch import fx
from torch._dynamo.utils import graph_break_reasons

from focus_compile.passes.graph_tools import TORCH

__all__ = ["latest_break", "uncut"]

_FRAME = re.compile(r'File "(.+)", line \d+, in (.+)')
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")
_WRAPPERS = {"wrapper", "inner", "__call__"}
"""Functions around those of many models, which tell none from another."""


def latest_break(graph: fx.Graph) -> str:
    """`Dynamo cut a forward at file.py:12 in forward: code`; empty if it cut none of the functions
    that the graph comes from."""
    functions = {
        (file, _plain(name))
        for node in graph.nodes
        for file, name in _FRAME.findall(node.meta.get("stack_trace") or "")
        if TORCH not in file
    }
    for reason in reversed(graph_break_reasons):
        cut = {(frame.filename, _plain(frame.name)) for frame in reason.user_stack}
        if any(name not in _WRAPPERS for _, name in functions & cut):
            return f"Dynamo cut a forward{_line(reason.user_stack)}"
    return ""


def _plain(name: str) -> str:
    """Of a function, or of what Dynamo made of the rest of it."""
    resumed = _RESUMED.fullmatch(name)
    return name if resumed is None else resumed[1]


def _line(stack: list[traceback.FrameSummary]) -> str:
    """The innermost frame outside torch."""
    frames = [frame for frame in stack if TORCH not in frame.filename] or stack
    if not frames:
        return ""
    frame = frames[-1]
    path = frame.filename.rsplit("/", 1)[-1]
    return f" at {path}:{frame.lineno} in {frame.name}: {frame.line}"


def uncut(remedy: str, graph: fx.Graph) -> str:
    """The remedy, and where Dynamo last cut the forward that the graph is part of, if it did."""
    cut = latest_break(graph)
    if not cut:
        return remedy
    found = (
        f"{cut} (TORCH_LOGS=graph_breaks says why): no graph holds the whole of it. Where experts "
        'in a loop are why, model.set_experts_implementation("grouped_mm") avoids it.'
    )
    return f"{remedy} {found}" if remedy else found
