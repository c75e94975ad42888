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
ARITHMETIC = frozenset("add ge gt le lt".split())
"""Between numbers; all others of POINTWISE are between bools."""


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
        return _CREATE[name](node, tensor.dtype)
    if name in MOVES or name == "_to_copy":
        source = node.args[0]
        moved = tensor_of(source)
        if moved is None or moved.dtype != tensor.dtype:
            return None  # a cast may wrap, round or mean the bits
        return range_of(source, known)  # type: ignore[arg-type]
    if name not in POINTWISE or node.kwargs:
        return None
    if tensor.dtype not in (torch.bool, torch.int64):
        return None  # narrower ones wrap, floating ones round
    operands = [_operand(argument, known) for argument in node.args]
    if any(operand is None or operand.is_bool == (name in ARITHMETIC) for operand in operands):
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


def _filled(node: fx.Node, dtype: torch.dtype) -> Any:
    return _of_dtype(node.args[-1], dtype)


def _of_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The value as elements of that dtype hold it; None unless that is the same number."""
    if not isinstance(value, (bool, int, float)):
        return None
    held = torch.tensor(value, dtype=dtype).item()
    return _single(held) if held == value else None


def _arange(node: fx.Node, dtype: torch.dtype) -> Any:
    """Counts up from its start, 0 where only the end is given; steps of other sizes: unknown."""
    form = op_name(node)
    start = {"arange.default": 0}.get(form, node.args[0] if node.args else None)
    if form == "arange.start_step" and len(node.args) > 2 and node.args[2] != 1:
        return None
    counts = dtype == torch.int64 and isinstance(start, int)
    return ValueRanges(start, int_oo) if counts else None


_CREATE: dict[str, Callable[[fx.Node, torch.dtype], Any]] = {
    "full": _filled,
    "full_like": _filled,
    "new_full": _filled,
    "scalar_tensor": _filled,
    "ones": lambda _, dtype: _of_dtype(1, dtype),
    "ones_like": lambda _, dtype: _of_dtype(1, dtype),
    "new_ones": lambda _, dtype: _of_dtype(1, dtype),
    "zeros": lambda _, dtype: _of_dtype(0, dtype),
    "zeros_like": lambda _, dtype: _of_dtype(0, dtype),
    "new_zeros": lambda _, dtype: _of_dtype(0, dtype),
    "arange": _arange,
}
