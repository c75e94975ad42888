"""The step program: the same graph at the active rows, with keys from the cache.

Reads only the plan. Every row-wise op is instantiated at [batch, active] rows; each site writes
its active rows' K/V into the cache and attends as its region says.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from focus_compile.kernels.block_selection import op as _selection  # noqa: F401
from focus_compile.kernels.sink_capture import op as _sinks  # noqa: F401
from focus_compile.kernels.sparse_attention import op as _sparse  # noqa: F401
from focus_compile.passes.row_builder import RowBuilder
from focus_compile.plan import Plan, RowOp, Site

__all__ = ["STEP_INPUTS", "BuildStep"]

aten = torch.ops.aten
STEP_INPUTS = ("rows", "row_weight", "focus_weight", "candidates", "keep")
"""Inputs of a step after the model's own: rows int64 [batch, active], their weights in sink
capture and in block relevance fp32 [batch, active], and per sequence the number of selectable and
of kept prompt blocks int64 [batch]."""


@dataclass(frozen=True)
class BuildStep:
    """Needs: the canonical graph that the plan was made from. Does not change it."""

    name: ClassVar[str] = "build-step"
    plan: Plan = field(repr=False)

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, STEP_INPUTS, state) -> (*row outputs, sinks)."""
        return _StepBuilder(gm, self.plan).build()


class _StepBuilder(RowBuilder):
    """Everything at the active rows, but for what no row is computed from."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        super().__init__(gm, plan, STEP_INPUTS)
        self.sinks: fx.Node | None = None

    def build(self) -> fx.GraphModule:
        needed = self.ancestors(
            [o.node for row in self.plan.rows for o in row.operands if o.use != "rows"]
        )
        for node in self.gm.graph.nodes:
            if node.name in needed and node.name not in self.full:
                self.full[node.name] = self.copy(node)
            if node.name in self.rows_of:
                self.active[node.name] = self.row_op(node, self.rows_of[node.name])
        return self.finish(*([] if self.sinks is None else [self.sinks]))

    def site(self, node: fx.Node, row: RowOp, site: Site) -> fx.Node:
        ops = torch.ops.focus_compile
        query, new_key, new_value = (self.argument(a, row) for a in node.args[:3])
        mask = self.argument(node.args[3], row)
        scale = node.args[4]
        key = self._write(f"key_cache_{site.index}", new_key)
        value = self._write(f"value_cache_{site.index}", new_value)
        call, inputs = self.graph.call_function, self.inputs
        if site.region == "sparse-suffix":
            if self.sinks is None:
                self.sinks = self._first_positions()
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
            attended = call(ops.attention_with_lse.default, (query, key, value, mask, scale))
            lse = call(operator.getitem, (attended, 1))
            limit = self.values.call(aten.mul.Tensor, inputs["candidates"], self.plan.key_block)
            self.sinks = call(
                ops.capture_sinks.default,
                (query, key, lse, inputs["row_weight"], mask, limit, self.plan.sink_tokens, scale),
            )
            return call(operator.getitem, (attended, 0))
        return call(ops.attention.default, (query, key, value, mask, scale))

    def _first_positions(self) -> fx.Node:
        """The sinks where no layer captures them, [batch, sink_tokens]."""
        count, device = self.plan.sink_tokens, self.inputs["rows"].meta["device"]
        first = self.graph.call_function(aten.arange.default, (count,), {"device": device})
        return self.values.call(
            aten.expand.default, first, [self.values.size(self.plan.batch), count]
        )

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
