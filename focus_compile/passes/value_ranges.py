"""What values a tensor can hold, whatever its size: enough to see that a mask hides nothing.

Ranges over the whole tensor, propagated through the few ops that masks are made of: index
arithmetic, comparisons, logic, and whatever only moves elements about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import SymPyValueRangeAnalysis as Analysis
from torch.utils._sympy.value_ranges import ValueRanges

from focus_compile.passes.graph_tools import op_name, tensor_of

__all__ = ["range_of"]

MOVES = frozenset(
    "expand unsqueeze squeeze reshape view permute transpose t slice select clone alias detach "
    "contiguous repeat flip roll index index_select gather lift_fresh lift_fresh_copy".split()
)
"""Every element of the result is an element of the first argument."""
POINTWISE: dict[str, Callable[..., Any]] = {
    "bitwise_and": Analysis.and_,
    "logical_and": Analysis.and_,
    "__and__": Analysis.and_,
    "bitwise_or": Analysis.or_,
    "logical_or": Analysis.or_,
    "__or__": Analysis.or_,
    "logical_not": Analysis.not_,
    "bitwise_not": Analysis.not_,
    "ge": Analysis.ge,
    "gt": Analysis.gt,
    "le": Analysis.le,
    "lt": Analysis.lt,
    "add": Analysis.add,
}
LOGIC = frozenset(
    "bitwise_and logical_and __and__ bitwise_or logical_or __or__ bitwise_not".split()
)


def range_of(node: fx.Node, known: dict[fx.Node, Any] | None = None) -> Any:
    """The ValueRanges of a tensor's elements, or None where nothing is known."""
    known = {} if known is None else known
    if node not in known:
        known[node] = None  # while it is looked at
        known[node] = _range(node, known)
    return known[node]


def _range(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    tensor, name = tensor_of(node), op_name(node).split(".")[0]
    if tensor is None or node.op != "call_function":
        return None
    if name in _CREATE:
        return _CREATE[name](node)
    if name == "_to_copy":
        return _converted(range_of(node.all_input_nodes[0], known), tensor.dtype)
    if name in MOVES:
        source = node.args[0]
        return range_of(source, known) if isinstance(source, fx.Node) else None
    if name not in POINTWISE or node.kwargs.get("alpha", 1) != 1:
        return None
    operands = [_operand(argument, known) for argument in node.args]
    if any(operand is None for operand in operands):
        return None
    if name in LOGIC and not all(operand.is_bool for operand in operands):
        return None
    return POINTWISE[name](*operands)


def _operand(argument: Any, known: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return range_of(argument, known)
    return _single(argument)


def _single(value: Any) -> Any:
    if isinstance(value, bool):
        return ValueRanges.wrap(sympy.true if value else sympy.false)
    return ValueRanges.wrap(value) if isinstance(value, (int, float)) else None


def _converted(values: Any, dtype: torch.dtype) -> Any:
    """The range after a cast that keeps its meaning: between bools, or between integers."""
    if values is None or values.is_bool != (dtype == torch.bool):
        return None
    return values if values.is_bool or not dtype.is_floating_point else None


def _filled(node: fx.Node) -> Any:
    value, tensor = node.args[-1], tensor_of(node)
    assert tensor is not None
    if tensor.dtype == torch.bool and isinstance(value, (bool, int)):
        value = bool(value)
    return _single(value)


def _ones(node: fx.Node) -> Any:
    tensor = tensor_of(node)
    assert tensor is not None
    return _single(True if tensor.dtype == torch.bool else 1)


def _zeros(node: fx.Node) -> Any:
    tensor = tensor_of(node)
    assert tensor is not None
    return _single(False if tensor.dtype == torch.bool else 0)


def _arange(node: fx.Node) -> Any:
    """Counts up from its start, 0 where only the end is given; steps of other sizes: unknown."""
    form = op_name(node)
    start = {"arange.default": 0}.get(form, node.args[0] if node.args else None)
    if form == "arange.start_step" and len(node.args) > 2 and node.args[2] != 1:
        return None
    return ValueRanges(start, int_oo) if isinstance(start, int) else None


_CREATE: dict[str, Callable[[fx.Node], Any]] = {
    "full": _filled,
    "full_like": _filled,
    "new_full": _filled,
    "scalar_tensor": _filled,
    "ones": _ones,
    "ones_like": _ones,
    "new_ones": _ones,
    "zeros": _zeros,
    "zeros_like": _zeros,
    "new_zeros": _zeros,
    "arange": _arange,
}
