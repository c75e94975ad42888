"""Slices along the tokens, made behind the row-wise ops that read them.

A sampler may slice first and compute then: `logits[:, prompt:].argmax(-1)`, or, for a model whose
rows predict the token after their own, `torch.cat([logits[:, :1], logits[:, :-1]], 1)`; a model may
slice before its head (`logits_to_keep`). What picks rows mixes none of their values, so u(slice(x))
is slice(u(x)) for a row-wise u; then u runs at the active rows, and the slice at what is left of a
row: a token and its probability.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from focus_compile.passes.graph_tools import fake_result, op_name, position, shape_of, tensor_of
from focus_compile.passes.token_rules import is_elementwise

__all__ = ["PostponeSlices"]

aten = torch.ops.aten
TOKENS = 1
"""The axis that is sliced."""
_DIM: dict[str, tuple[int, Any]] = {
    # Ops that work along one axis, or several: where it is among the arguments, and its default.
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp"), (1, None)),
    **dict.fromkeys(("argmax", "argmin", "amax", "amin", "max", "min", "sum", "mean"), (1, None)),
    **dict.fromkeys(("any", "all", "cumsum", "select", "slice", "squeeze", "gather"), (1, None)),
    "topk": (2, -1),
    "sort": (1, -1),
    "argsort": (1, -1),
    "unsqueeze": (1, None),
}


@dataclass(frozen=True)
class _Late:
    """A value that is `moves`, in order, of `source`."""

    source: fx.Node
    moves: tuple[Any, ...]


@dataclass(frozen=True)
class PostponeSlices:
    """Needs: the canonical graph. Keeps every value.

    ids: the placeholder of the token ids.
    """

    name: ClassVar[str] = "postpone-slices"
    ids: fx.Node

    def apply(self, gm: fx.GraphModule) -> int:
        """Number of ops that now come before the slices."""
        late: dict[fx.Node, _Late] = {}
        done = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            moved = self._moved(node, late)
            if moved is not None:
                late[node] = moved
            elif (moves := _shared_moves(node, late)) and _commutes(node, late):
                self._before(node, moves, late)
                done += 1
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return done

    def _moved(self, node: fx.Node, late: dict[fx.Node, _Late]) -> _Late | None:
        """What the node is a selection of tokens of, if it is one."""
        if op_name(node) == "slice.Tensor" and _argument(node, 1, 0) == TOKENS:
            of = self._source(node.args[0], late)
            how = (_argument(node, at, default) for at, default in ((2, None), (3, None), (4, 1)))
            return of and _Late(of.source, (*of.moves, ("slice", *how)))
        if op_name(node) == "cat.default" and _argument(node, 1, 0) == TOKENS:
            parts: Any = node.args[0]
            found = [self._source(part, late) for part in parts]
            known = [of for of in found if of is not None]
            if len(known) == len(found) and len({of.source for of in known}) == 1:
                return _Late(known[0].source, (("cat", tuple(of.moves for of in known)),))
        return None

    def _source(self, value: Any, late: dict[fx.Node, _Late]) -> _Late | None:
        if value in late:
            return late[value]
        return _Late(value, ()) if self._has_wide_rows(value) else None

    def _has_wide_rows(self, value: Any) -> bool:
        """Whether it holds features of every token: hidden states, or logits."""
        tensor = tensor_of(value)
        if tensor is None or tensor.dim() != 3 or not tensor.is_floating_point():
            return False
        return shape_of(value)[:2] == shape_of(self.ids)

    @staticmethod
    def _before(node: fx.Node, moves: tuple[Any, ...], late: dict[fx.Node, _Late]) -> None:
        """Compute the node of the sources, and slice that."""
        target: Any = node.target
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: late[n].source if n in late else n
        )
        with node.graph.inserting_after(node):
            early = node.graph.call_function(target, args, kwargs)
        early.meta = dict(node.meta) | {"val": fake_result(target, args, kwargs)}
        if tensor_of(early) is None:  # several results: each is picked, then sliced
            late[node] = _Late(early, moves)
            return
        value = _apply(moves, early, early)
        node.replace_all_uses_with(value)
        late[value] = _Late(early, moves)


def _apply(moves: tuple[Any, ...], value: fx.Node, after: fx.Node) -> fx.Node:
    """The selection of a value, inserted behind a node."""
    graph = value.graph

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        nonlocal after
        with graph.inserting_after(after):
            after = graph.call_function(target, args)
        after.meta = dict(value.meta) | {"val": fake_result(target, args)}
        return after

    def apply(moves: tuple[Any, ...], value: fx.Node) -> fx.Node:
        for move, *how in moves:
            if move == "slice":
                value = call(aten.slice.Tensor, value, TOKENS, *how)
            else:
                value = call(aten.cat.default, [apply(part, value) for part in how[0]], TOKENS)
        return value

    return apply(moves, value)


def _argument(node: fx.Node, at: int, default: Any) -> Any:
    """A positional argument of the schema, wherever it is given; `default` if the op has none."""
    if at < len(node.args):
        return node.args[at]
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments[at : at + 1]]
    return node.kwargs.get(names[0], default) if names else default


def _shared_moves(node: fx.Node, late: dict[fx.Node, _Late]) -> tuple[Any, ...] | None:
    """The selection that all inputs of the node that are one share."""
    found = {late[source].moves for source in node.all_input_nodes if source in late}
    return found.pop() if len(found) == 1 else None


def _commutes(node: fx.Node, late: dict[fx.Node, _Late]) -> bool:
    """Whether the node works on each token by itself, and every input has one for each, or one for
    all of them."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False  # it writes, or other sizes draw other numbers
    name = op_name(node).rpartition(".")[0]
    rest = [source for source in node.all_input_nodes if source not in late]
    if name in ("linear", "matmul"):
        return _maps_features(node, late)
    if name in _DIM and op_name(node) not in ("max.other", "min.other"):
        return not any(tensor_of(source) is not None for source in rest) and _spares_tokens(node)
    if not is_elementwise(node) or tensor_of(node) is None:
        return False
    rank = len(shape_of(node))
    own = [source for source in node.all_input_nodes if source in late]
    return all(len(shape_of(source)) == rank for source in own) and all(
        _is_one_for_all(source, rank) for source in rest
    )


def _maps_features(node: fx.Node, late: dict[fx.Node, _Late]) -> bool:
    """Whether a product's left operand alone has tokens, before its last axis."""
    features, *weights = node.args
    if features not in late or any(weight in late for weight in weights):
        return False
    matrix = op_name(node) == "linear.default" or len(shape_of(weights[0])) == 2
    return matrix and len(shape_of(features)) > TOKENS + 1


def _spares_tokens(node: fx.Node) -> bool:
    """Whether the axes that it works along are behind the tokens'."""
    at, default = _DIM[op_name(node).rpartition(".")[0]]
    given = _argument(node, at, default)
    axes = list(given) if isinstance(given, (list, tuple)) else [given]
    rank = len(shape_of(node.args[0])) + (op_name(node) == "unsqueeze.default")
    return bool(axes) and all(
        isinstance(axis, int) and position(axis, rank) > TOKENS for axis in axes
    )


def _is_one_for_all(source: fx.Node, rank: int) -> bool:
    """Whether a tensor is broadcast along the tokens; true of what is no tensor."""
    if tensor_of(source) is None:
        return True
    shape = shape_of(source)
    axis = TOKENS - (rank - len(shape))
    return axis < 0 or shape[axis] == 1
