"""Small questions that several passes ask of an ATen graph."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

TORCH = str(Path(torch.__file__).parent)

__all__ = [
    "arg",
    "concrete",
    "divides",
    "fake_of",
    "fake_result",
    "insert_call",
    "op_name",
    "position",
    "shape_of",
    "size_expression",
    "tensor_of",
    "user_line",
]


def arg(node: fx.Node, index: int) -> Any:
    """A positional argument of a node, whatever its kind."""
    return node.args[index]


def op_name(node: fx.Node) -> str:
    """`softmax.int` of `aten.softmax.int`; other namespaces keep theirs; other nodes: the kind."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.")
    return node.op if node.op != "call_function" else getattr(node.target, "__name__", "function")


def tensor_of(node: Any) -> torch.Tensor | None:
    """The node's fake tensor, or None if it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def fake_of(node: Any) -> torch.Tensor:
    """The node's fake tensor; asserts that there is one."""
    tensor = tensor_of(node)
    assert tensor is not None, f"{node} has no tensor value"
    return tensor


def size_expression(size: Any) -> sympy.Expr:
    """An int or SymInt as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def shape_of(node: Any) -> list[sympy.Expr]:
    """The node's shape as sympy expressions."""
    return [size_expression(size) for size in fake_of(node).shape]


def divides(divisor: sympy.Expr, value: sympy.Expr) -> bool:
    """True where `divisor` provably divides `value` (both positive)."""
    return bool(sympy.cancel(value / divisor).is_integer)


def position(axis: int, rank: int) -> int:
    """The axis counted from the front."""
    return axis + rank if axis < 0 else axis


def concrete(size: Any) -> int:
    """An int, or the hint of a SymInt."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def user_line(node: fx.Node) -> str:
    """`file.py:12 in forward: code` of the innermost frame outside torch that made this node."""
    trace = (node.meta.get("stack_trace") or node.stack_trace or "").strip().splitlines()
    frames = [i for i, line in enumerate(trace) if line.lstrip().startswith("File ")]
    if not frames:
        return node.name
    frames = [i for i in frames if TORCH not in trace[i]] or frames
    file, line, function = (part.strip() for part in trace[frames[-1]].split(",")[:3])
    path = file.removeprefix("File ").strip('"').rsplit("/", 1)[-1]
    code = trace[frames[-1] + 1].strip() if frames[-1] + 1 < len(trace) else ""
    return f"{path}:{line.removeprefix('line ')} {function}: {code}"


def insert_call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call node at the graph's insertion point, with its fake value computed."""
    node = graph.call_function(target, args)
    node.meta["val"] = fake_result(target, args)
    return node


def fake_result(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """The value that `target` has on the fake values of its arguments."""
    values = fx.map_arg(args, lambda n: n.meta["val"])
    named = fx.map_arg(kwargs or {}, lambda n: n.meta["val"])
    mode = detect_fake_mode(list(values))
    # C++ composites of torch 2.11 (linear) ask symbolic tensors for plain sizes without it.
    with mode or contextlib.nullcontext(), enable_python_dispatcher():
        return target(*values, **named)
