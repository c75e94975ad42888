"""Selecting the active rows of a value that is computed in full, and sizes at the active count."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from focus_compile.errors import PassError
from focus_compile.plan import Factor, Operand, RowAxes

__all__ = ["ACTIVE", "RowValues"]

aten = torch.ops.aten
ACTIVE = sympy.Symbol("active_rows", integer=True, positive=True)
"""The number of active rows per sequence, wherever a size names it."""


@dataclass
class RowValues:
    """Emits row selections and sizes into the graph of a step.

    rows: node of the active positions [batch, active]; ids: node of the ids [batch, length].
    """

    graph: fx.Graph
    rows: fx.Node
    ids: fx.Node
    batch: sympy.Expr
    length: sympy.Expr
    _selected: dict[tuple[str, RowAxes, int], fx.Node] = field(default_factory=dict)
    _sizes: dict[sympy.Expr, fx.Node] = field(default_factory=dict)
    _shared: dict[str, fx.Node] = field(default_factory=dict)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def select(self, value: fx.Node, shape: list[sympy.Expr], operand: Operand) -> fx.Node:
        """The active rows of `value`, of shape `shape`, as `operand` reads it."""
        assert operand.axes is not None
        if operand.axes.order:
            raise PassError(f"cannot select rows of {value.name} at {operand.axes}")
        key = (value.name, operand.axes, operand.rank)
        if key not in self._selected:
            for _ in range(operand.rank - len(shape)):
                value = self.call(aten.unsqueeze.default, value, 0)
            padded = [sympy.Integer(1)] * (operand.rank - len(shape)) + shape
            self._selected[key] = self._select(value, padded, operand.axes)
        return self._selected[key]

    def _select(self, value: fx.Node, shape: list[sympy.Expr], axes: RowAxes) -> fx.Node:
        token, batch = axes.token, axes.batch
        if batch is None:
            return self._select_one_sequence(value, shape, token)
        if batch.axis == token.axis:
            return self._select_merged(value, shape, axes)
        if token.inner != 1 or batch.inner != 1 or shape[token.axis] != self.length:
            raise PassError(f"cannot select rows of {value.name} at {axes}")
        if shape[batch.axis] == self.batch:
            return self._select_batched(value, len(shape), batch.axis, token.axis)
        if shape[batch.axis] != 1:
            raise PassError(f"cannot select rows of {value.name} at {axes}")
        value = self.call(aten.select.int, value, batch.axis, 0)
        at = token.axis - (batch.axis < token.axis)
        picked = self.call(aten.index.Tensor, value, [None] * at + [self.rows])
        order = [axis for axis in range(len(shape)) if axis != at]
        order.insert(batch.axis, at)
        return self.call(aten.permute.default, picked, order)

    def _select_one_sequence(
        self, value: fx.Node, shape: list[sympy.Expr], token: Factor
    ) -> fx.Node:
        if token.inner == 1 and shape[token.axis] == self.length:
            return self.call(aten.index_select.default, value, token.axis, self.positions())
        outer = sympy.cancel(shape[token.axis] / (self.length * token.inner))
        split = [*shape[: token.axis], outer, self.length, token.inner, *shape[token.axis + 1 :]]
        value = self.call(aten.reshape.default, value, self.sizes(split))
        value = self.call(aten.index_select.default, value, token.axis + 1, self.positions())
        merged = list(shape)
        merged[token.axis] = outer * ACTIVE * token.inner
        return self.call(aten.reshape.default, value, self.sizes(merged))

    def _select_merged(self, value: fx.Node, shape: list[sympy.Expr], axes: RowAxes) -> fx.Node:
        """Batch and tokens in one axis, [batch * length * inner]."""
        at, inner = axes.token.axis, axes.token.inner
        if shape[at] != self.batch * self.length * inner:
            raise PassError(f"cannot select rows of {value.name} at {axes}")
        split = [*shape[:at], self.batch, self.length, inner, *shape[at + 1 :]]
        value = self.call(aten.reshape.default, value, self.sizes(split))
        value = self._select_batched(value, len(split), at, at + 1)
        merged = [*shape[:at], self.batch * ACTIVE * inner, *shape[at + 1 :]]
        return self.call(aten.reshape.default, value, self.sizes(merged))

    def _select_batched(self, value: fx.Node, rank: int, batch: int, token: int) -> fx.Node:
        """value[..., sequence, ..., rows[sequence], ...]."""
        indices: list[fx.Node | None] = [None] * (max(batch, token) + 1)
        indices[batch], indices[token] = self.sequences(), self.rows
        picked = self.call(aten.index.Tensor, value, indices)
        if abs(batch - token) == 1:
            order = list(range(rank))
            if token < batch:
                order[token], order[batch] = batch, token
        else:
            rest = iter(range(2, rank))
            order = [0 if a == batch else 1 if a == token else next(rest) for a in range(rank)]
        if order == list(range(rank)):
            return picked
        return self.call(aten.permute.default, picked, order)

    def positions(self) -> fx.Node:
        """The active positions of the only sequence, [active]."""
        return self._once("positions", lambda: self.call(aten.select.int, self.rows, 0, 0))

    def sequences(self) -> fx.Node:
        """Index of each sequence, [batch, 1]."""

        def build() -> fx.Node:
            count = self.call(aten.sym_size.int, self.rows, 0)
            device = self.rows.meta["device"]
            arange = self.graph.call_function(aten.arange.default, (count,), {"device": device})
            return self.call(aten.unsqueeze.default, arange, 1)

        return self._once("sequences", build)

    def sizes(self, shape: list[sympy.Expr]) -> list[Any]:
        """Arguments of a reshape: ints where known, -1 for the only unknown, else size nodes."""
        unknown = [size for size in shape if not size.is_Integer]
        if len(unknown) == 1:
            return [int(size) if size.is_Integer else -1 for size in shape]
        return [self.size(size) for size in shape]

    def size(self, size: sympy.Expr) -> Any:
        """A product of known sizes as an int or a node."""
        if size.is_Integer:
            return int(size)
        if size not in self._sizes:
            self._sizes[size] = self._build_size(size)
        return self._sizes[size]

    def _build_size(self, size: sympy.Expr) -> fx.Node:
        sources = {ACTIVE: (self.rows, 1), self.batch: (self.ids, 0), self.length: (self.ids, 1)}
        if size in sources:
            return self.call(aten.sym_size.int, *sources[size])
        if not isinstance(size, sympy.Mul):
            raise PassError(f"cannot express the size {size} of an active value")
        result = self.size(size.args[0])
        for factor in size.args[1:]:
            result = self.call(operator.mul, result, self.size(factor))
        return result

    def _once(self, name: str, build: Any) -> fx.Node:
        if name not in self._shared:
            self._shared[name] = build()
        return self._shared[name]
