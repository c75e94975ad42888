"""What the step and the refresh share: instantiating row-wise ops at selected rows.

Reads only the plan. Values are known in full, at the rows, or both; an op at the rows takes its
operands at the rows, selecting them from the full value where that is what exists.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from focus_compile.passes.graph_tools import op_name, shape_of, tensor_of
from focus_compile.passes.row_values import ACTIVE, RowValues
from focus_compile.plan import Operand, Plan, RowOp, Site

__all__ = ["RowBuilder", "cache_names", "kept_lists"]

aten = torch.ops.aten


def cache_names(plan: Plan) -> list[str]:
    """State tensors in order: key and value of every site, summaries of the sparse ones, and the
    lists that steps go on reading."""
    names = []
    for site in plan.sites:
        names += [f"key_cache_{site.index}", f"value_cache_{site.index}"]
    names += [f"summaries_{site.index}" for site in plan.sites_of("sparse-suffix")]
    return names + kept_lists(plan)


def kept_lists(plan: Plan) -> list[str]:
    """State tensors for what a step chose: the sinks where they are captured, then the key blocks
    of every sparse site."""
    sparse = plan.sites_of("sparse-suffix")
    if not plan.list_reuse or not sparse:
        return []
    sinks = ["kept_sinks"] if plan.sites_of("sink-capture") else []
    return [*sinks, *(f"kept_blocks_{site.index}" for site in sparse)]


class RowBuilder:
    """One walk over the canonical graph. Subclasses say what a site becomes."""

    def __init__(self, gm: fx.GraphModule, plan: Plan, inputs: tuple[str, ...]) -> None:
        """inputs: names of the inputs between the model's own and the state; has "rows"."""
        self.gm, self.plan = gm, plan
        self.graph = fx.Graph()
        self.rows_of = {row.node: row for row in plan.rows}
        self.sites = {site.node: site for site in plan.sites}
        self.by_name = {node.name: node for node in gm.graph.nodes}
        self.full: dict[str, fx.Node] = {}
        self.active: dict[str, fx.Node] = {}
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node in placeholders:
            self.full[node.name] = self.graph.placeholder(node.name)
        names = [*inputs, *cache_names(plan)]
        self.inputs = {name: self.graph.placeholder(name) for name in names}
        ids = placeholders[plan.ids.position]
        tensor = tensor_of(ids)
        assert tensor is not None
        rows = self.inputs["rows"]
        rows.meta["device"] = tensor.device
        self.values = RowValues(self.graph, rows, self.full[ids.name], plan.batch, plan.length)

    def ancestors(self, names: list[str]) -> set[str]:
        """The named nodes and everything they are computed from."""
        pending = [self.by_name[name] for name in names]
        found: set[str] = set()
        while pending:
            node = pending.pop()
            if node.name not in found:
                found.add(node.name)
                pending.extend(node.all_input_nodes)
        return found

    def copy(self, node: fx.Node) -> fx.Node:
        """The node in full, as it is in the canonical graph."""
        return self.graph.node_copy(node, lambda n: self.full[n.name])

    def finish(self, *extra: fx.Node) -> fx.GraphModule:
        """A module that returns every output at the rows, then `extra`."""
        outputs = [self.at_rows(self.by_name[o.node], o.axes) for o in self.plan.outputs]
        self.graph.output((*outputs, *extra))
        self.graph.lint()
        return fx.GraphModule(self.gm, self.graph)

    def site(self, node: fx.Node, row: RowOp, site: Site) -> fx.Node:
        """What the attention site becomes at the rows."""
        raise NotImplementedError

    def row_op(self, node: fx.Node, row: RowOp) -> fx.Node:
        """The op at the rows only."""
        if node.name in self.sites:
            new = self.site(node, row, self.sites[node.name])
        elif op_name(node) in ("reshape.default", "expand.default"):
            source = self.argument(node.args[0], row)
            sizes = self._active_shape(node, row)
            if op_name(node) == "expand.default":
                arguments = [self.values.size(size) for size in sizes]
            else:
                arguments = self.values.sizes(sizes)
            new = self.graph.call_function(node.target, (source, arguments))  # type: ignore[arg-type]
        elif row.axes.places and op_name(node).startswith("arange."):
            count = self.values.size(self._active_shape(node, row)[0])
            new = self.graph.call_function(aten.arange.default, (count,), node.kwargs)
        else:
            args = fx.map_arg(node.args, lambda n: self.argument(n, row))
            kwargs = fx.map_arg(node.kwargs, lambda n: self.argument(n, row))
            new = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        new.meta["stack_trace"] = node.meta.get("stack_trace")
        return new

    def argument(self, argument: Any, row: RowOp) -> Any:
        """An argument of a row-wise op, as the op reads it."""
        if not isinstance(argument, fx.Node):
            return argument
        operand = next(o for o in row.operands if o.node == argument.name)
        if operand.use == "rows":
            return self.at_rows(argument, operand.axes)
        if operand.use == "gather":
            return self.values.select(self.full[argument.name], shape_of(argument), operand)
        return self.full[argument.name]

    def at_rows(self, node: fx.Node, axes: Any) -> fx.Node:
        """A value of rows at the rows: computed there, or selected from the full value."""
        if node.name in self.active:
            return self.active[node.name]
        shape = shape_of(node)
        operand = Operand(node.name, "gather", axes, len(shape))
        return self.values.select(self.full[node.name], shape, operand)

    def _active_shape(self, node: fx.Node, row: RowOp) -> list[sympy.Expr]:
        shape = shape_of(node)
        axis = row.axes.token.axis
        shape[axis] = sympy.cancel(shape[axis] * ACTIVE / self.plan.length)
        return shape
