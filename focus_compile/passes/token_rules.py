"""One rule per kind of op: rows demanded of its result become rows demanded of its inputs.

A rule `(demands, node, axes) -> None` calls `demands.need_rows / need_full / need_broadcast`, or
refuses. An op without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from focus_compile.passes.graph_tools import (
    arg,
    divides,
    fake_of,
    op_name,
    position,
    shape_of,
    tensor_of,
)
from focus_compile.passes.sorted_rows import (
    add_back,
    divided,
    element_of_sort,
    grouped_product,
    move_rows,
)
from focus_compile.plan import Factor, RowAxes

if TYPE_CHECKING:
    from focus_compile.passes.token_axis import Demands

__all__ = ["Rule", "is_elementwise", "moved_by_reshape", "rule_for"]

Rule = Callable[["Demands", fx.Node, RowAxes], None]

ELEMENTWISE = {
    "_to_copy", "clone", "where", "masked_fill", "type_as", "to", "zeros_like", "ones_like",
    "full_like", "add", "sub", "rsub", "mul", "div", "neg", "pow", "silu", "gelu", "relu",
    "logical_not", "contiguous", "alias", "clamp", "softplus", "mish", "hardtanh", "leaky_relu",
}  # fmt: skip
REDUCTIONS = {
    "mean", "sum", "amax", "amin", "any", "all", "prod", "var", "std", "norm", "linalg_vector_norm",
    "logsumexp", "argmax", "argmin", "max", "min",
}  # fmt: skip
ALONG_AXIS = {"softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort",
              "topk", "argsort", "flip", "roll", "glu", "logcumsumexp"}  # fmt: skip
_INDICES = (torch.int32, torch.int64)


def rule_for(node: fx.Node) -> Rule:
    """The rule of the node's op."""
    name = op_name(node).rsplit(".", 1)[0]
    if name in _RULES:
        return _RULES[name]
    if name in REDUCTIONS and not op_name(node).endswith(".other"):
        return _reduction
    if name in ALONG_AXIS:
        return _along_axis
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return _random
    return _elementwise if is_elementwise(node) else _unknown


def is_elementwise(node: fx.Node) -> bool:
    """Whether each element is made from the same one of every input, as broadcast."""
    tags = getattr(node.target, "tags", ())
    return op_name(node).rsplit(".", 1)[0] in ELEMENTWISE or torch.Tag.pointwise in tags


def _unknown(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    demands.refuse("focus_compile has no rule for it")


def _random(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    demands.refuse("it draws random numbers (of dropout, model.eval() makes nothing)")


def _factors(axes: RowAxes) -> list[Factor]:
    return [axes.token] if axes.batch is None else [axes.token, axes.batch]


def _map(axes: RowAxes, move: Callable[[Factor], Factor]) -> RowAxes:
    batch = None if axes.batch is None else move(axes.batch)
    return replace(axes, token=move(axes.token), batch=batch)


def _on_axis(axes: RowAxes, axis: int) -> bool:
    return any(factor.axis == axis for factor in _factors(axes))


def _forbid(demands: Demands, axes: RowAxes, forbidden: Iterable[int], what: str) -> None:
    if any(_on_axis(axes, axis) for axis in forbidden):
        which = "token" if axes.token.axis in set(forbidden) else "batch"
        demands.refuse(f"{what} the {which} axis")


def _rank(node: Any) -> int:
    return len(shape_of(node))


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _elementwise(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    out_shape = shape_of(node)
    for operand in (*node.args, *node.kwargs.values()):
        demands.need_broadcast(operand, axes, out_shape)


def _embedding(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    _forbid(demands, axes, [_rank(node) - 1], "looks up along")
    demands.need_full(arg(node, 0))
    demands.need_rows(arg(node, 1), axes)


def _linear(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    _forbid(demands, axes, [_rank(node) - 1], "produces features along")
    demands.need_rows(arg(node, 0), axes)
    for weight in (*node.args[1:], *node.kwargs.values()):
        demands.need_full(weight)


def _matmul(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    _product(demands, node, axes, arg(node, 0), arg(node, 1))


def _addmm(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    demands.need_broadcast(arg(node, 0), axes, shape_of(node))
    _product(demands, node, axes, arg(node, 1), arg(node, 2))


def _product(demands: Demands, node: fx.Node, axes: RowAxes, left: Any, right: Any) -> None:
    """[..., m, k] @ [..., k, n]: m belongs to the left operand only, n to the right one only."""
    rank = _rank(node)
    if _rank(left) < 2 or _rank(right) < 2:
        demands.refuse("multiplies a vector")
    out_shape = shape_of(node)
    for operand, own, foreign in ((left, rank - 2, rank - 1), (right, rank - 1, rank - 2)):
        padding = rank - _rank(operand)
        if axes.token.axis == foreign:
            demands.need_full(operand)
            continue
        shape = [sympy.Integer(1)] * padding + shape_of(operand)
        if axes.token.axis != own and shape[axes.token.axis] != out_shape[axes.token.axis]:
            demands.need_full(operand)
            continue
        if axes.batch is not None and axes.batch.axis == foreign:
            demands.refuse("contracts over the batch axis")
        demands.need_rows(operand, axes, rank=rank)


def _normalisation(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """layer_norm, rms_norm(input, normalized_shape, ...): over the last axes."""
    rank, width = _rank(node), len(arg(node, 1))
    _forbid(demands, axes, range(rank - width, rank), "normalises over")
    demands.need_rows(arg(node, 0), axes)
    for weight in (*node.args[2:], *node.kwargs.values()):
        demands.need_full(weight)


def _reduction(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    source = arg(node, 0)
    rank = _rank(source)
    dims = _argument(node, 1, "dim", None)
    if op_name(node).split(".")[0] in ("norm", "linalg_vector_norm"):
        dims = _argument(node, 2, "dim", None)
    if dims is None or dims == []:
        demands.refuse("reduces over the token axis")
    reduced = {position(int(d), rank) for d in ([dims] if isinstance(dims, int) else dims)}
    out_rank = len(_first_tensor(node).shape)
    kept = [axis for axis in range(rank) if out_rank == rank or axis not in reduced]
    inner = _map(axes, lambda factor: Factor(kept[factor.axis], factor.inner))
    _forbid(demands, inner, reduced, "reduces over")
    demands.need_rows(source, inner)


def _first_tensor(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value


def _along_axis(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """Softmax, cumsum, sort, flip, ...: fine along any axis but the rows'."""
    source = arg(node, 0)
    name = op_name(node).split(".")[0]
    index = {"topk": 2, "roll": 2}.get(name, 1)
    keyword = "dims" if name in ("flip", "roll") else "dim"
    dims = _argument(node, index, keyword, -1)
    if dims == []:
        demands.refuse("works along the flattened tokens")
    dims = [dims] if isinstance(dims, int) else dims
    _forbid(demands, axes, [position(int(d), _rank(source)) for d in dims], "works along")
    demands.need_rows(source, axes)


def _transpose(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    rank = _rank(node)
    order = list(range(rank))
    a, b = position(arg(node, 1), rank), position(arg(node, 2), rank)
    order[a], order[b] = order[b], order[a]
    demands.need_rows(arg(node, 0), _map(axes, lambda f: Factor(order[f.axis], f.inner)))


def _matrix_transpose(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    rank = _rank(node)
    order = [*range(rank - 2), rank - 1, rank - 2]
    demands.need_rows(arg(node, 0), _map(axes, lambda f: Factor(order[f.axis], f.inner)))


def _permute(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    order = [position(int(d), _rank(node)) for d in arg(node, 1)]
    demands.need_rows(arg(node, 0), _map(axes, lambda f: Factor(order[f.axis], f.inner)))


def _unsqueeze(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    new = position(int(arg(node, 1)), _rank(node))
    _forbid(demands, axes, [new], "inserts")
    demands.need_rows(arg(node, 0), _map(axes, lambda f: Factor(f.axis - (f.axis > new), f.inner)))


def _squeeze(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    source = arg(node, 0)
    shape, dims = shape_of(source), _argument(node, 1, "dim", None)
    if dims is None:
        dims = range(len(shape))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in dims if shape[d % len(shape)] == 1}
    kept = [axis for axis in range(len(shape)) if axis not in gone]
    demands.need_rows(source, _map(axes, lambda f: Factor(kept[f.axis], f.inner)))


def _expand(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    demands.need_broadcast(arg(node, 0), axes, shape_of(node))


def moved_by_reshape(
    factor: Factor, size: sympy.Expr, before: list[sympy.Expr], after: list[sympy.Expr]
) -> Factor | None:
    """Where a factor of `size` lands when a row-major value of shape `before` becomes `after`.

    The factor's stride in flattened order is the same on both sides; the axis that spans
    [stride, stride * size] holds it. None if no single axis does.
    """
    stride = factor.inner
    for extent in before[factor.axis + 1 :]:
        stride = stride * extent
    suffix: sympy.Expr = sympy.Integer(1)
    for axis in reversed(range(len(after))):
        whole = suffix * after[axis]
        if after[axis] != 1 and divides(suffix, stride) and divides(stride * size, whole):
            return Factor(axis, sympy.cancel(stride / suffix))
        suffix = whole
    return None


def _reshape(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    source = arg(node, 0)
    before, after = shape_of(node), shape_of(source)
    if axes.order:
        demands.need_rows(source, _moved_whole(demands, axes, before, after))
        return
    token = moved_by_reshape(axes.token, demands.length, before, after)
    batch = None
    if axes.batch is not None:
        batch = moved_by_reshape(axes.batch, demands.batch, before, after)
    if token is None or (axes.batch is not None and batch is None):
        demands.refuse(f"reshapes {after} to {before}, which cuts through the rows")
    demands.need_rows(source, RowAxes(token, batch))


def _moved_whole(
    demands: Demands, axes: RowAxes, before: list[sympy.Expr], after: list[sympy.Expr]
) -> RowAxes:
    """Rows in a sort's order lie anywhere on their axis: it moves as a whole."""
    size = before[axes.token.axis]
    moved = moved_by_reshape(Factor(axes.token.axis), size, before, after)
    if moved is None or after[moved.axis] != size:
        demands.refuse(f"reshapes {after} to {before}, which cuts through the sorted rows")
    return _map(axes, lambda factor: Factor(moved.axis, factor.inner))


def _cat(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    axis = position(int(_argument(node, 1, "dim", 0)), _rank(node))
    _forbid(demands, axes, [axis], "concatenates along")
    for operand in arg(node, 0):
        demands.need_rows(operand, axes)


def _stack(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    new = position(int(_argument(node, 1, "dim", 0)), _rank(node))
    _forbid(demands, axes, [new], "stacks along")
    for operand in arg(node, 0):
        demands.need_rows(operand, _map(axes, lambda f: Factor(f.axis - (f.axis > new), f.inner)))


def _slice(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    axis = position(int(_argument(node, 1, "dim", 0)), _rank(node))
    _forbid(demands, axes, [axis], "slices")
    for bound in node.args[2:]:
        if isinstance(bound, fx.Node):
            demands.need_size(bound)
    demands.need_rows(arg(node, 0), axes)


def _select(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    axis = position(int(arg(node, 1)), _rank(arg(node, 0)))
    inner = _map(axes, lambda f: Factor(f.axis + (f.axis >= axis), f.inner))
    demands.need_rows(arg(node, 0), inner)


def _split(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    axis = position(int(_argument(node, 2, "dim", 0)), _rank(arg(node, 0)))
    _forbid(demands, axes, [axis], "splits")
    demands.need_rows(arg(node, 0), axes)


def _unbind(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    axis = position(int(_argument(node, 1, "dim", 0)), _rank(arg(node, 0)))
    inner = _map(axes, lambda f: Factor(f.axis + (f.axis >= axis), f.inner))
    demands.need_rows(arg(node, 0), inner)


def _getitem(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """An element of a tuple: its axes are those of every element."""
    source = arg(node, 0)
    assert isinstance(source, fx.Node)
    if not element_of_sort(demands, node, axes):
        demands.need_tuple(source, axes)


def _index(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """source[:, ..., index]: a look-up by row, features picked from each row, or sorted rows."""
    source, indices = arg(node, 0), list(arg(node, 1))
    at = next(axis for axis, index in enumerate(indices) if index is not None)
    index, width = indices[at], _rank(indices[at])
    if sum(item is not None for item in indices) > 1 or fake_of(index).dtype not in _INDICES:
        demands.refuse("focus_compile has no rule for this form of it")
    if not any(_on_axis(axes, axis) for axis in range(at, at + width)):
        demands.need_full(index)
        demands.need_rows(
            source, _map(axes, lambda f: f if f.axis < at else Factor(f.axis - width + 1, f.inner))
        )
        return
    if not all(at <= factor.axis < at + width for factor in _factors(axes)):
        demands.refuse("indexes the token axis")
    if move_rows(demands, node, axes, index):
        return
    demands.need_full(source)
    demands.need_rows(index, _map(axes, lambda f: Factor(f.axis - at, f.inner)))


def _gather(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    axis = position(int(arg(node, 1)), _rank(node))
    _forbid(demands, axes, [axis], "gathers along")
    source, out_shape = shape_of(arg(node, 0)), shape_of(node)
    if any(source[f.axis] != out_shape[f.axis] for f in _factors(axes)):
        demands.refuse("gathers from a value with other rows")
    demands.need_rows(arg(node, 0), axes)
    demands.need_rows(arg(node, 2), axes)


def _scatter(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """scatter(base, axis, index, values or a number): within each row."""
    base, axis, index, values = node.args[:4]
    assert isinstance(axis, int)
    _forbid(demands, axes, [position(axis, _rank(node))], "scatters along")
    for operand in (index, values):
        if not isinstance(operand, fx.Node):
            continue
        shape, out_shape = shape_of(operand), shape_of(node)
        if any(shape[f.axis] != out_shape[f.axis] for f in _factors(axes)):
            demands.refuse("scatters from a value with other rows")
        demands.need_rows(operand, axes)
    demands.need_rows(base, axes)


def _index_select(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    axis = position(int(arg(node, 1)), _rank(node))
    _forbid(demands, axes, [axis], "indexes")
    demands.need_rows(arg(node, 0), axes)
    demands.need_full(arg(node, 2))


def _pad(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    rank, widths = _rank(node), arg(node, 1)
    padded = [rank - 1 - i // 2 for i, width in enumerate(widths) if width != 0]
    _forbid(demands, axes, padded, "pads")
    demands.need_rows(arg(node, 0), axes)


def _repeat(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    source, counts = arg(node, 0), arg(node, 1)
    rank, shift = len(counts), len(counts) - _rank(source)
    repeated = [axis for axis in range(rank) if counts[axis] != 1 and axis >= shift]
    _forbid(demands, axes, repeated, "repeats")
    demands.need_rows(source, axes, rank=rank)


def _repeat_interleave(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    axis, count = _argument(node, 2, "dim", None), arg(node, 1)
    if axis is None:
        demands.refuse("repeats the flattened tokens")
    axis = position(int(axis), _rank(node))
    if _on_axis(axes, axis):
        if not isinstance(count, int) or axes.order or node.kwargs.get("output_size") is not None:
            demands.refuse("repeats the token axis")
        if not all(factor.axis == axis for factor in _factors(axes)):
            demands.refuse("repeats the token axis")
        axes = divided(demands, axes, count)
    demands.need_rows(arg(node, 0), axes)


def _confidence(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """A pair of values without the last axis."""
    demands.need_rows(arg(node, 0), axes)


def _one_hot(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """one_hot(classes, count): a new last axis. A count of -1 depends on all rows."""
    count = _argument(node, 1, "num_classes", -1)
    if not isinstance(count, int) or count < 0:
        demands.refuse("counts the classes of all tokens")
    _forbid(demands, axes, [_rank(node) - 1], "makes")
    demands.need_rows(arg(node, 0), axes)


def _view_as_complex(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """Pairs of the last axis become numbers."""
    demands.need_rows(arg(node, 0), axes)


def _view_as_real(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """Numbers become pairs, on a new last axis."""
    _forbid(demands, axes, [_rank(node) - 1], "makes")
    demands.need_rows(arg(node, 0), axes)


def _attention(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """A site: queries, keys and values by row; the other keys come from the cache."""
    query, key, value, mask, _ = node.args
    expected = RowAxes(Factor(2), None if demands.batch == 1 else Factor(0))
    if axes != expected:
        demands.refuse(f"its rows are needed at {axes}, expected {expected}")
    if len({query, key, value}) != 3:
        demands.refuse("two of query, key and value are one tensor")
    for operand in (query, key, value):
        demands.need_rows(operand, axes)
    if isinstance(mask, fx.Node):
        if tensor_of(mask) is None:
            demands.refuse("the mask is no tensor")
        demands.need_broadcast(mask, axes, [*shape_of(node)[:3], demands.length])


def _of_ranks(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """A sum over ranks, or the wait for a collective: every rank has the same rows."""
    demands.need_rows(arg(node, 0), axes)


def _gather_ranks(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """The first axis of every rank's value, one after the other."""
    _forbid(demands, axes, [0], "gathers from all ranks along")
    demands.need_rows(arg(node, 0), axes)


def _scatter_ranks(demands: Demands, node: fx.Node, axes: RowAxes) -> None:
    """A sum over ranks, a part of the first axis for each."""
    _forbid(demands, axes, [0], "deals out to the ranks")
    demands.need_rows(arg(node, 0), axes)


_RULES: dict[str, Rule] = {
    "embedding": _embedding,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "_int_mm": _matmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "layer_norm": _normalisation,
    "rms_norm": _normalisation,
    "native_layer_norm": _normalisation,
    "_fused_rms_norm": _normalisation,
    "transpose": _transpose,
    "t": _matrix_transpose,
    "mT": _matrix_transpose,
    "numpy_T": _matrix_transpose,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "reshape": _reshape,
    "cat": _cat,
    "stack": _stack,
    "slice": _slice,
    "select": _select,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "unbind": _unbind,
    "getitem": _getitem,
    "gather": _gather,
    "scatter": _scatter,
    "index_select": _index_select,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "index": _index,
    "one_hot": _one_hot,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
    "index_add": add_back,
    "_grouped_mm": grouped_product,
    "transformers.grouped_mm_fallback": grouped_product,
    "_c10d_functional.all_reduce": _of_ranks,
    "_c10d_functional.wait_tensor": _of_ranks,
    "_c10d_functional.all_gather_into_tensor": _gather_ranks,
    "_c10d_functional.reduce_scatter_tensor": _scatter_ranks,
    "focus_compile.attention": _attention,
    "focus_compile.confidence": _confidence,
}
