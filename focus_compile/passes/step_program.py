"""The step program: the same graph at the active rows, with keys from the cache.

Reads only the plan. Every row-wise op is instantiated at [batch, active] rows; each site writes
its active rows' K/V into the cache and attends as its region says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from focus_compile.kernels.block_selection import op as _selection  # noqa: F401
from focus_compile.kernels.sink_capture import op as _sinks  # noqa: F401
from focus_compile.kernels.sparse_attention import op as _sparse  # noqa: F401
from focus_compile.passes.graph_tools import op_name, shape_of, tensor_of
from focus_compile.passes.row_values import ACTIVE, RowValues
from focus_compile.plan import Operand, Plan, RowOp, Site

__all__ = ["STEP_INPUTS", "BuildStep", "cache_names"]

aten = torch.ops.aten
STEP_INPUTS = ("rows", "row_weight", "focus_weight", "candidates", "keep")
"""Inputs of a step after the model's own: rows int64 [batch, active], their weights in sink
capture and in block relevance fp32 [batch, active], and per sequence the number of selectable and
of kept prompt blocks int64 [batch]."""


def cache_names(plan: Plan) -> list[str]:
    """State tensors in order: key and value of every site, summaries of the sparse ones."""
    names = []
    for site in plan.sites:
        names += [f"key_cache_{site.index}", f"value_cache_{site.index}"]
    names += [f"summaries_{site.index}" for site in plan.sites_of("sparse-suffix")]
    return names


@dataclass(frozen=True)
class BuildStep:
    """Needs: the canonical graph that the plan was made from. Does not change it."""

    name: ClassVar[str] = "build-step"
    plan: Plan = field(repr=False)

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, STEP_INPUTS, state) -> (*row outputs, sinks)."""
        return _StepBuilder(gm, self.plan).build()


class _StepBuilder:
    """One walk over the canonical graph."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        self.gm, self.plan = gm, plan
        self.graph = fx.Graph()
        self.rows_of = {row.node: row for row in plan.rows}
        self.sites = {site.node: site for site in plan.sites}
        self.by_name = {node.name: node for node in gm.graph.nodes}
        self.full: dict[str, fx.Node] = {}
        self.active: dict[str, fx.Node] = {}
        self.sinks: fx.Node | None = None

    def build(self) -> fx.GraphModule:
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        for node in placeholders:
            self.full[node.name] = self.graph.placeholder(node.name)
        names = [*STEP_INPUTS, *cache_names(self.plan)]
        self.inputs = {name: self.graph.placeholder(name) for name in names}
        ids = placeholders[self.plan.ids.position]
        tensor = tensor_of(ids)
        assert tensor is not None
        rows = self.inputs["rows"]
        rows.meta["device"] = tensor.device
        self.values = RowValues(
            self.graph, rows, self.full[ids.name], self.plan.batch, self.plan.length
        )
        needed = self._needed_in_full()
        for node in self.gm.graph.nodes:
            if node.name in needed and node.name not in self.full:
                self.full[node.name] = self.graph.node_copy(node, lambda n: self.full[n.name])
            if node.name in self.rows_of:
                self.active[node.name] = self._row_op(node, self.rows_of[node.name])
        outputs = [self.active[output.node] for output in self.plan.outputs]
        self.graph.output((*outputs, self.sinks) if self.sinks is not None else tuple(outputs))
        self.graph.lint()
        return fx.GraphModule(self.gm, self.graph)

    def _needed_in_full(self) -> set[str]:
        pending = [
            self.by_name[operand.node]
            for row in self.plan.rows
            for operand in row.operands
            if operand.use != "rows"
        ]
        needed: set[str] = set()
        while pending:
            node = pending.pop()
            if node.name not in needed:
                needed.add(node.name)
                pending.extend(node.all_input_nodes)
        return needed

    def _row_op(self, node: fx.Node, row: RowOp) -> fx.Node:
        if node.name in self.sites:
            new = self._site(node, row, self.sites[node.name])
        elif op_name(node) in ("reshape.default", "expand.default"):
            source = self._argument(node.args[0], row)
            sizes = self._active_shape(node, row)
            if op_name(node) == "expand.default":
                arguments = [self.values.size(size) for size in sizes]
            else:
                arguments = self.values.sizes(sizes)
            new = self.graph.call_function(node.target, (source, arguments))  # type: ignore[arg-type]
        else:
            args = fx.map_arg(node.args, lambda n: self._argument(n, row))
            kwargs = fx.map_arg(node.kwargs, lambda n: self._argument(n, row))
            new = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        new.meta["stack_trace"] = node.meta.get("stack_trace")
        return new

    def _argument(self, argument: Any, row: RowOp) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        operand = next(o for o in row.operands if o.node == argument.name)
        return self._operand(argument, operand)

    def _operand(self, node: fx.Node, operand: Operand) -> fx.Node:
        if operand.use == "rows":
            return self.active[node.name]
        if operand.use == "gather":
            return self.values.select(self.full[node.name], shape_of(node), operand)
        return self.full[node.name]

    def _active_shape(self, node: fx.Node, row: RowOp) -> list[sympy.Expr]:
        shape = shape_of(node)
        axis = row.axes.token.axis
        shape[axis] = sympy.cancel(shape[axis] * ACTIVE / self.plan.length)
        return shape

    def _site(self, node: fx.Node, row: RowOp, site: Site) -> fx.Node:
        ops = torch.ops.focus_compile
        query, new_key, new_value = (self._argument(a, row) for a in node.args[:3])
        mask = self._argument(node.args[3], row)
        scale = node.args[4]
        key = self._write(f"key_cache_{site.index}", new_key)
        value = self._write(f"value_cache_{site.index}", new_value)
        call, inputs = self.graph.call_function, self.inputs
        if site.region == "sparse-suffix":
            assert self.sinks is not None
            blocks = call(
                ops.select_blocks.default,
                (query, inputs["focus_weight"], inputs[f"summaries_{site.index}"],
                 inputs["candidates"], inputs["keep"]),
            )  # fmt: skip
            return call(
                ops.sparse_attention.default,
                (query, key, value, blocks, self.sinks, inputs["candidates"],
                 self.plan.key_block, mask, scale),
            )  # fmt: skip
        if site.region == "sink-capture":
            limit = self.values.call(aten.mul.Tensor, inputs["candidates"], self.plan.key_block)
            self.sinks = call(
                ops.capture_sinks.default,
                (query, key, inputs["row_weight"], mask, limit, self.plan.sink_tokens, scale),
            )
        return call(ops.attention.default, (query, key, value, mask, scale))

    def _write(self, name: str, rows: fx.Node) -> fx.Node:
        """Active K or V rows into the cache [batch, heads, length, d], in place."""
        cache = self.inputs[name]
        if self.plan.batch == 1:
            indices: list[fx.Node | None] = [None, None, self.values.positions()]
        else:
            indices = [self.values.sequences(), None, self.inputs["rows"]]
            rows = self.values.call(aten.transpose.int, rows, 1, 2)
        self.values.call(aten.index_put_.default, cache, indices, rows)
        return cache
