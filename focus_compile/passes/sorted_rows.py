"""Rows sorted by expert and put back: the row-wise part of a grouped mixture of experts.

    order = sort(expert of each row); x[order] -> one product per group of rows -> [inverse order]

A sort mixes rows, yet what comes back in the rows' own order does not, if every op in between
treats each row by itself. `RowAxes.order` names the sort of a value whose rows are in its order.
*Places* (the order, its inverse, where groups end) say where rows are among those that are
computed. They are no values of rows: for other rows they are computed anew, and they may only lead
into the order or out of it, or end the groups of a product.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from focus_compile.passes.graph_tools import (
    divides,
    fake_of,
    op_name,
    position,
    shape_of,
    tensor_of,
)
from focus_compile.plan import Factor, RowAxes

if TYPE_CHECKING:
    from focus_compile.passes.token_axis import Demands

__all__ = ["add_back", "divided", "element_of_sort", "grouped_product", "move_rows", "places_rule"]

_MOVES = {"reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "slice", "select",
          "clone", "expand", "_to_copy"}  # fmt: skip
"""Every element of the result is an element of the first argument, or a cast one."""
_INTEGERS = (torch.int32, torch.int64)
_HOLD_EXPERTS = (*_INTEGERS, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Places:
    """An index of places: `sort`'s order, or its inverse, in units of `each` neighbours."""

    sort: fx.Node
    each: int = 1
    inverse: bool = False


def _name(node: Any) -> str:
    return op_name(node).rsplit(".", 1)[0] if isinstance(node, fx.Node) else ""


def _given(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _source(node: Any) -> fx.Node | None:
    source = node.args[0] if isinstance(node, fx.Node) and node.args else None
    return source if isinstance(source, fx.Node) else None


def _element(node: Any, index: int, *names: str) -> fx.Node | None:
    """The op whose element `index` this is, if it is one of `names`."""
    source = _source(node)
    found = _name(node) == "getitem" and node.args[1] == index and _name(source) in names
    return source if found else None


def _sort(node: Any) -> fx.Node | None:
    """The sort of one axis whose order `node` is."""
    sort = node if _name(node) == "argsort" else _element(node, 1, "sort")
    source = _source(sort)
    return sort if source is not None and len(shape_of(source)) == 1 else None


def _descends(sort: fx.Node) -> bool:
    at = 3 if op_name(sort).endswith(".stable") else 2
    return bool(_given(sort, at, "descending", False))


def _order(node: Any) -> fx.Node | None:
    """The sort of values of rows whose order `node` is."""
    sort = _sort(node)
    return None if sort is None or _sort(_source(sort)) is not None else sort


def _inverse(node: Any) -> fx.Node | None:
    """The sort whose order `node` is the inverse of: the sort of an order, or 0, 1, ... put into
    the order's places."""
    sort = _sort(node)
    if sort is not None:
        return None if _descends(sort) else _order(_source(sort))
    base, order, counter = None, None, None
    if _name(node) == "index_put" and not _given(node, 3, "accumulate", False):
        base, (order, *more), counter = node.args[:3]
        order = None if more else order
    elif op_name(node) == "scatter.src":
        base, _, order, counter = node.args
    sort = _order(order)
    filled = _name(base).endswith("_like") and _source(base) is order
    if sort is None or not filled or fake_of(node).dtype != torch.int64:
        return None
    return sort if _counts_up(counter, shape_of(order)) else None


def _counts_up(node: Any, shape: list[sympy.Expr]) -> bool:
    """0, 1, 2, ... of that shape."""
    if tensor_of(node) is None or shape_of(node) != shape:
        return False
    from_zero = op_name(node) == "arange.start" and node.args[0] == 0
    return from_zero or op_name(node) == "arange.default"


def _places(node: Any) -> _Places | None:
    """What the index means, if it is one of places."""
    if (sort := _inverse(node)) is not None:
        return _Places(sort, inverse=True)
    if (sort := _order(node)) is not None:
        return _Places(sort)
    rounded = op_name(node) == "div.Tensor_mode" and node.kwargs.get("rounding_mode") == "floor"
    if rounded or _name(node) == "floor_divide":
        order, each = node.args[:2]
        if (sort := _order(order)) is not None and isinstance(each, int) and each > 0:
            return _Places(sort, each)
    return None


def _scaled(axes: RowAxes, by: sympy.Expr) -> RowAxes:
    """The axes where every row is `by` times as many neighbours."""
    token = Factor(axes.token.axis, sympy.cancel(axes.token.inner * by))
    if axes.batch is None:
        return replace(axes, token=token)
    batch = Factor(axes.batch.axis, sympy.cancel(axes.batch.inner * by))
    return replace(axes, token=token, batch=batch)


def divided(demands: Demands, axes: RowAxes, each: int) -> RowAxes:
    """The rows' axes before every element of their axis became `each` neighbours."""
    inner = [axes.token.inner] if axes.batch is None else [axes.token.inner, axes.batch.inner]
    if not all(divides(sympy.Integer(each), size) for size in inner):
        demands.refuse(f"{each} neighbours on the token axis are not of one token")
    return _scaled(axes, sympy.Rational(1, each))


def move_rows(demands: Demands, node: fx.Node, axes: RowAxes, index: fx.Node) -> bool:
    """`source[index]`, into a sort's order or out of it. False if that is not what it does."""
    places, source = _places(index), _source(node)
    if places is None or source is None:
        return False
    name = places.sort.name
    if places.inverse:
        if axes.order:
            demands.refuse(f"puts back by {name} rows that are in the order of {axes.order}")
        inner = replace(axes, order=name)
    else:
        if axes.order != name:
            demands.refuse(f"works along the token axis: nothing undoes the order of {name}")
        inner = divided(demands, replace(axes, order=""), places.each)
    at = axes.token.axis
    if shape_of(source)[at] * places.each != shape_of(node)[at]:
        demands.refuse(f"{source.name} has other rows than {name} sorts")
    _need_order(demands, index, replace(axes, order=name))
    demands.need_rows(source, inner)
    return True


def add_back(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """index_add(base, axis, order // each, rows in that order): the sums of each token's rows."""
    base, axis, index, rows = node.args[:4]
    assert isinstance(axis, int)
    at, places = position(axis, len(shape_of(node))), _places(index)
    on_axis = axes.token.axis == at and (axes.batch is None or axes.batch.axis == at)
    if places is None or places.inverse or axes.order or not on_axis:
        demands.refuse("adds rows up at places that are computed")
    if shape_of(node)[at] * places.each != shape_of(rows)[at]:
        demands.refuse(f"{node.name} has other rows than {places.sort.name} sorts")
    inner = replace(_scaled(axes, sympy.Integer(places.each)), order=places.sort.name)
    _need_order(demands, index, inner)
    demands.need_rows(base, axes)
    demands.need_rows(rows, inner)


def _need_order(demands: Demands, index: Any, axes: RowAxes) -> None:
    """Demand an index of places over rows at `axes`; it must cover the whole axis."""
    token, batch = axes.token, axes.batch
    size = token.inner * demands.length
    if batch is not None:
        if batch.axis != token.axis or batch.inner != size:
            demands.refuse("sorts the rows of each sequence by themselves")
        size = size * demands.batch
    if shape_of(index) != [size]:
        demands.refuse(f"{index} has {shape_of(index)} places for {size} rows")
    first = None if batch is None else Factor(0, batch.inner)
    demands.need_places(index, RowAxes(Factor(0, token.inner), first, axes.order, places=True))


def element_of_sort(demands: Demands, node: fx.Node, axes: RowAxes) -> bool:
    """The sorted values themselves. False if `node` is something else."""
    sort = _element(node, 0, "sort")
    if sort is None or sort.name != axes.order:
        return False
    demands.need_places(sort, replace(axes, places=True))
    return True


def grouped_product(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """grouped_mm(rows [R, k], weights [E, k, n], ends [E]): row r times the weights of its group.

    Row-wise where rows are sorted by their expert and the ends count the experts' rows.
    """
    rows, weights = node.args[:2]
    ends = _given(node, 2, "offs", None)
    if len(shape_of(rows)) != 2 or len(shape_of(weights)) != 3 or _given(node, 3, "bias", None):
        demands.refuse("focus_compile has no rule for this form of it")
    if axes.token.axis != 0 or not axes.order:
        demands.refuse("no sort has put rows of one expert together")
    why = _why_no_ends(ends, axes.order, shape_of(weights)[0])
    if why:
        demands.refuse(f"its groups are not known to be the experts' rows: {why}")
    demands.need_rows(rows, axes)
    demands.need_full(weights)
    demands.need_places(ends, replace(axes, places=True))


def _why_no_ends(ends: Any, order: str, experts: sympy.Expr) -> str:
    """Empty if `ends` are where the rows of each of the experts end in that order."""
    total = _uncast(ends)
    exact = total is not None and fake_of(total).dtype in _HOLD_EXPERTS
    if _name(total) != "cumsum" or len(shape_of(total)) != 1 or not exact:
        return "their ends are no cumulative sum"
    histogram = _uncast(_source(total))
    if _name(histogram) != "histc":
        return "their sizes are no histogram"
    given = ((1, "bins", 100), (2, "min", 0), (3, "max", 0))
    bins, low, high = (_given(histogram, *default) for default in given)
    if bins != experts or bins < 2 or low != 0 or high != bins - 1:
        return f"the histogram has {bins} bins of {low} to {high} for {experts} experts"
    counted = _uncast(_source(histogram))
    chosen = _sorted_values(counted) or counted
    sort = next((user for user in chosen.users if user.name == order), None)
    if sort is None or _descends(sort):
        return f"{order} does not sort by what the histogram counts, in ascending order"
    limit = _choices(chosen)
    if limit is None or limit > bins:
        return f"{chosen} is not known to be one of {bins}"
    return ""


def _sorted_values(node: Any) -> fx.Node | None:
    """The values that `node` holds in the order of their sort."""
    sort = _element(node, 0, "sort")
    if op_name(node) == "index.Tensor" and len(node.args[1]) == 1:
        sort = _order(node.args[1][0])
        return _source(sort) if _source(sort) is _source(node) else None
    return _source(sort)


def _uncast(node: Any) -> Any:
    """What was cast to a dtype that holds the same small integers."""
    while _name(node) == "_to_copy" and fake_of(node).dtype in _HOLD_EXPERTS:
        node = node.args[0]
    return node


def _choices(node: Any) -> int | None:
    """n if the elements are integers of 0 to n - 1, as indices into an axis of size n are."""
    while _name(node) in _MOVES and fake_of(node).dtype in _INTEGERS:
        node = node.args[0]
    op, at = _element(node, 1, "topk", "sort", "max", "min"), 1
    if _name(op) == "topk":
        at = 2
    elif _name(node) in ("argmax", "argmin", "argsort"):
        op = node
    source = _source(op)
    if op is None or source is None or op_name(op).endswith(".stable"):
        return None
    axis, shape = _given(op, at, "dim", None if op is node else -1), shape_of(source)
    if axis is None or not shape:
        return None
    size = shape[position(axis, len(shape))]
    return int(size) if size.is_Integer else None


def places_rule(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """An op of places: its form was matched where the places are used, its inputs are too."""
    rows, source = replace(axes, order="", places=False), _source(node)
    if _name(node) in ("sort", "argsort") and _sort(source) is None:
        demands.need_rows(source, rows)
    elif _name(node) == "histc":
        in_order = _sorted_values(_uncast(source)) is not None
        demands.need_rows(source, replace(rows, order=axes.order) if in_order else rows)
    else:
        for operand in node.all_input_nodes:
            if tensor_of(operand) is not None or node.target is operator.getitem:
                demands.need_places(operand, axes)
