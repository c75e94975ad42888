"""Token-axis analysis: prove, backwards from the outputs, that every op commutes with selecting
rows, or refuse with the op and the user's line.

A demand says "this value, at the active rows only". Each op's rule (token_rules.py) turns a demand
on its result into demands on its inputs. A value of hidden states can only be demanded by row; a
value free of hidden states (position tables, masks, anything of the ids alone) is computed in full
and its rows are selected; an attention site stops the walk, since its keys come from the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import NoReturn

import sympy
import torch
from torch import fx

from focus_compile.passes.graph_tools import (
    divides,
    fake_of,
    op_name,
    shape_of,
    size_expression,
    tensor_of,
    user_line,
)
from focus_compile.passes.sorted_rows import places_rule
from focus_compile.passes.token_rules import rule_for
from focus_compile.plan import Factor, Operand, OutputRows, Refusal, RowAxes, RowOp

__all__ = ["Demands", "NotTokenWise", "RowProof", "graph_outputs", "hidden_values", "prove_rows"]


class NotTokenWise(Exception):
    """An op that cannot be proven token-wise; carries the refusal, and the node if it is one's."""

    def __init__(self, refusal: Refusal, node: fx.Node | None = None) -> None:
        super().__init__(str(refusal))
        self.refusal, self.node = refusal, node

    @classmethod
    def of(cls, reason: str, remedy: str = "") -> NotTokenWise:
        return cls(Refusal(reason, remedy=remedy))


@dataclass(frozen=True)
class RowProof:
    """The row-wise ops in graph order, and the axes of the outputs' rows."""

    rows: tuple[RowOp, ...]
    outputs: tuple[OutputRows, ...]
    operations: tuple[tuple[str, int], ...]


def prove_rows(
    gm: fx.GraphModule,
    ids: fx.Node,
    weights: set[fx.Node],
    *,
    outputs: Sequence[fx.Node] | None = None,
    within: Set[fx.Node] | None = None,
) -> RowProof:
    """Walk the graph backwards from its outputs.

    Args:
        gm: canonical graph with attention sites.
        ids: the placeholder of the token ids, [batch, tokens].
        weights: placeholders of parameters and buffers.
        outputs: values to begin from instead.
        within: the nodes to prove; others are taken for granted.

    Raises:
        NotTokenWise: the first op, from the outputs backwards, that mixes rows.
    """
    batch, length = shape_of(ids)
    demands = Demands(batch, length, hidden_values(gm.graph, ids, weights))
    begin = graph_outputs(gm.graph) if outputs is None else outputs
    proven = tuple(_demand_output(demands, node) for node in begin)
    rows: list[RowOp] = []
    counts: Counter[str] = Counter()
    for node in reversed(gm.graph.nodes):
        axes = demands.rows.get(node)
        if axes is None or (within is not None and node not in within):
            continue
        if node.op != "call_function":
            raise NotTokenWise(Refusal(f"the input {node.name} holds hidden states"))
        demands.consumer = node
        rule = places_rule if axes.places else rule_for(node)
        rule(demands, node, axes)
        operands = demands.operands.pop(node, {})
        _require_all_read(demands, node, operands)
        rows.append(RowOp(node.name, axes, tuple(operands.values())))
        counts[_kind(node)] += 1
    return RowProof(tuple(reversed(rows)), proven, tuple(sorted(counts.items())))


def _require_all_read(demands: Demands, node: fx.Node, operands: dict[str, Operand]) -> None:
    """Every tensor input must have been demanded somehow; sizes of shapes are built anew."""
    for source in node.all_input_nodes:
        if source.name not in operands and tensor_of(source) is not None:
            demands.refuse(f"focus_compile has no rule for how it reads {source.name}")


def _kind(node: fx.Node) -> str:
    return op_name(node).removeprefix("focus_compile.").rsplit(".", 1)[0]


def hidden_values(graph: fx.Graph, ids: fx.Node, weights: set[fx.Node]) -> set[fx.Node]:
    """Values of one row a token that depend on ids through a weight, and all that follows them."""
    length = shape_of(ids)[1]
    of_ids, of_weights, with_rows = {ids}, set(weights), {ids}
    hidden: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            of_weights.add(node)
        inputs = node.all_input_nodes
        value = tensor_of(node)
        if not inputs or (value is None and not isinstance(node.meta.get("val"), (tuple, list))):
            continue
        for known in (of_ids, of_weights, hidden):
            if any(n in known for n in inputs):
                known.add(node)
        if any(n in with_rows for n in inputs) and _may_hold_rows(value, length):
            with_rows.add(node)
        floating = value is None or value.dtype.is_floating_point
        if floating and node in of_ids and node in of_weights and node in with_rows:
            hidden.add(node)
    return hidden


def _may_hold_rows(value: torch.Tensor | None, length: sympy.Expr) -> bool:
    """Whether some axis could count tokens: a value without one holds no rows from there on."""
    return value is None or any(divides(length, size_expression(size)) for size in value.shape)


def graph_outputs(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the graph returns."""
    output = graph.output_node().args[0]
    values = output if isinstance(output, (tuple, list)) else (output,)
    return [value for value in values if isinstance(value, fx.Node)]


def _demand_output(demands: Demands, node: fx.Node) -> OutputRows:
    shape = shape_of(node) if tensor_of(node) is not None else []
    if len(shape) < 2 or shape[0] != demands.batch or shape[1] != demands.length:
        raise NotTokenWise(
            Refusal(
                f"the output {node.name} has shape {[str(s) for s in shape]}, expected "
                f"[{demands.batch}, {demands.length}, ...] with one row a token",
                user_line(node),
                "Return logits of all tokens, and no cache (use_cache=False).",
            ),
            node,
        )
    if node not in demands.hidden:
        raise NotTokenWise(Refusal(f"the output {node.name} does not depend on the ids"), node)
    axes = RowAxes(Factor(1), None if demands.batch == 1 else Factor(0))
    demands.rows[node] = axes
    width = sympy.Mul(*shape[2:])
    row_bytes = int(width) * fake_of(node).itemsize if width.is_Integer else 0
    return OutputRows(node.name, axes, row_bytes)


@dataclass
class Demands:
    """What has been demanded so far, and the calls that rules use to demand more."""

    batch: sympy.Expr
    length: sympy.Expr
    hidden: set[fx.Node]
    rows: dict[fx.Node, RowAxes] = field(default_factory=dict)
    operands: dict[fx.Node, dict[str, Operand]] = field(default_factory=dict)
    consumer: fx.Node | None = None

    def need_rows(self, node: object, axes: RowAxes, rank: int | None = None) -> None:
        """Demand `node` at the active rows.

        Args:
            axes: the rows' axes, after left-padding the value to `rank` axes.
            rank: axes the consumer broadcasts it to; its own rank if None.
        """
        if not isinstance(node, fx.Node):
            return
        shift = 0 if rank is None else rank - len(shape_of(node))
        if node not in self.hidden:
            if axes.order:
                self.refuse(f"reads {node.name} by rows that are in the order of {axes.order}")
            self._record(Operand(node.name, "gather", axes, rank or len(shape_of(node))))
            return
        own = _shifted(axes, -shift)
        if own is None or (self.batch != 1 and own.batch is None):
            self.refuse(f"{node.name} loses its batch axis")
        self._require_rows_at(node, own)
        self._record_rows(node, own)

    def need_places(self, node: fx.Node, axes: RowAxes) -> None:
        """Demand where the rows are, whose form the caller has matched (sorted_rows.py)."""
        self._record_rows(node, axes)

    def _record_rows(self, node: fx.Node, axes: RowAxes) -> None:
        known = self.rows.setdefault(node, axes)
        if known != axes:
            self.refuse(f"the rows of {node.name} are needed on two axes ({known}; {axes})")
        self._record(Operand(node.name, "rows", axes))

    def _require_rows_at(self, node: fx.Node, axes: RowAxes) -> None:
        """The axes must be long enough to hold the rows: a broadcast one of size 1 is not."""
        counts = [(axes.token, self.length)]
        if axes.batch is not None:
            counts.append((axes.batch, self.batch))
        for factor, count in counts:
            if not divides(count * factor.inner, shape_of(node)[factor.axis]):
                self.refuse(f"axis {factor.axis} of {node.name} does not hold its rows")

    def need_full(self, node: object) -> None:
        """Demand all of `node`; refused for a value of hidden states."""
        if not isinstance(node, fx.Node):
            return
        if node in self.hidden:
            self.refuse(f"needs every token of {node.name}, a value of hidden states")
        self._record(Operand(node.name, "full"))

    def need_broadcast(self, node: object, axes: RowAxes, out_shape: list[sympy.Expr]) -> None:
        """Demand an operand that broadcasts to `out_shape`, whose rows lie at `axes`."""
        if not isinstance(node, fx.Node):
            return
        if tensor_of(node) is None:
            self.need_size(node)
            return
        shape = [sympy.Integer(1)] * (len(out_shape) - len(shape_of(node))) + shape_of(node)
        if self.carries(shape, axes.token, out_shape):
            if axes.batch is not None and not self.carries(shape, axes.batch, out_shape):
                if node in self.hidden:
                    self.refuse(f"{node.name} is broadcast over the batch")
            self.need_rows(node, axes, rank=len(out_shape))
        else:
            self.need_full(node)

    def need_tuple(self, node: fx.Node, axes: RowAxes) -> None:
        """Demand a tuple of values whose elements all carry their rows at `axes`."""
        if node not in self.hidden:
            self.refuse(f"unpacks {node.name}, which holds no hidden states")
        self._record_rows(node, axes)

    @staticmethod
    def carries(shape: list[sympy.Expr], factor: Factor, out_shape: list[sympy.Expr]) -> bool:
        """Whether a broadcast operand really has the factor's axis."""
        return shape[factor.axis] == out_shape[factor.axis]

    def need_size(self, node: fx.Node) -> None:
        """A number: fine unless it counts tokens, in which case the op depends on the length."""
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            symbols = value.node.expr.free_symbols
            if symbols & self.length.free_symbols:
                self.refuse("computes with the number of tokens")
        self._record(Operand(node.name, "full"))

    def refuse(self, reason: str) -> NoReturn:
        """Raise NotTokenWise for the op at hand."""
        assert self.consumer is not None
        name = op_name(self.consumer)
        raise NotTokenWise(
            Refusal(
                f"{name} is not token-wise: {reason}",
                f"{self.consumer.name}, {user_line(self.consumer)}",
            ),
            self.consumer,
        )

    def _record(self, operand: Operand) -> None:
        assert self.consumer is not None
        known = self.operands.setdefault(self.consumer, {})
        if known.setdefault(operand.node, operand) != operand:
            self.refuse(f"reads {operand.node} in two ways")


def _shifted(axes: RowAxes, by: int) -> RowAxes | None:
    """The axes in a rank that differs by `by` leading axes; None if the token axis falls off."""
    token = axes.token.axis + by
    if token < 0:
        return None
    batch = axes.batch
    if batch is not None:
        moved = batch.axis + by
        batch = Factor(moved, batch.inner) if moved >= 0 else None
    return replace(axes, token=Factor(token, axes.token.inner), batch=batch)
