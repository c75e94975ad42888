"""The step program: the same graph at the active rows, with keys from the cache.

Reads only the plan. Every row-wise op is instantiated at [batch, active] rows; each site writes
its active rows' K/V into the cache and attends as its region says.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from focus_compile.kernels.block_selection import op as _selection  # noqa: F401
from focus_compile.kernels.sink_capture import op as _sinks  # noqa: F401
from focus_compile.kernels.sparse_attention import op as _sparse  # noqa: F401
from focus_compile.passes.collectives import insert_sum_over_ranks
from focus_compile.passes.row_builder import RowBuilder
from focus_compile.plan import Plan, RowOp, Site

__all__ = ["STEP_INPUTS", "ActiveRowsBuilder", "BuildStep", "StepBuilder"]

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
    choose: bool = True
    """Whether the keys that sparse layers read are chosen; else they are those that an earlier step
    left in the state."""

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, STEP_INPUTS, state) -> (*row outputs, sinks)."""
        return StepBuilder(gm, self.plan, self.choose).build()


class ActiveRowsBuilder(RowBuilder):
    """Everything at the active rows, but for what no row is computed from."""

    def build(self) -> fx.GraphModule:
        needed = self.ancestors(
            [o.node for row in self.plan.rows for o in row.operands if o.use != "rows"]
        )
        for node in self.gm.graph.nodes:
            if node.name in needed and node.name not in self.full:
                self.full[node.name] = self.copy(node)
            if node.name in self.rows_of:
                self.active[node.name] = self.row_op(node, self.rows_of[node.name])
        return self.finish(*self.extra())

    def extra(self) -> Sequence[fx.Node]:
        """Outputs after the rows'."""
        raise NotImplementedError

    def write(self, name: str, rows: fx.Node) -> fx.Node:
        """Active K or V rows into the cache [batch, heads, length, d], in place."""
        cache = self.inputs[name]
        if self.plan.batch == 1:
            indices: list[fx.Node | None] = [None, None, self.values.positions()]
        else:
            indices = [self.values.sequences(), None, self.inputs["rows"]]
            rows = self.values.call(aten.transpose.int, rows, 1, 2)
        self.values.call(aten.index_put_.default, cache, indices, rows)
        return cache


class StepBuilder(ActiveRowsBuilder):
    """Each site attends as its region says."""

    def __init__(self, gm: fx.GraphModule, plan: Plan, choose: bool) -> None:
        super().__init__(gm, plan, STEP_INPUTS)
        self.choose = choose
        self.sinks: fx.Node | None = None if choose else self.inputs.get("kept_sinks")

    def extra(self) -> Sequence[fx.Node]:
        return [] if self.sinks is None else [self.sinks]

    def site(self, node: fx.Node, row: RowOp, site: Site) -> fx.Node:
        query, new_key, new_value = (self.argument(a, row) for a in node.args[:3])
        key = self.write(f"key_cache_{site.index}", new_key)
        value = self.write(f"value_cache_{site.index}", new_value)
        return self.attend(node, row, site, query, key, value)

    def attend(
        self, node: fx.Node, row: RowOp, site: Site, query: fx.Node, key: fx.Node, value: fx.Node
    ) -> fx.Node:
        """The attention of the active rows' queries to the caches."""
        ops, call, inputs = torch.ops.focus_compile, self.graph.call_function, self.inputs
        mask, scale = self.argument(node.args[3], row), node.args[4]
        if site.region == "sparse-suffix":
            blocks = self.blocks(site, query)
            return call(
                ops.sparse_attention.default,
                (query, key, value, blocks, self.sinks_read(), inputs["candidates"],
                 self.plan.key_block, mask, scale),
            )  # fmt: skip
        if site.region == "sink-capture" and self.choose:
            attended = call(ops.attention_with_lse.default, (query, key, value, mask, scale))
            lse = call(operator.getitem, (attended, 1))
            self.capture((query, key, lse, inputs["row_weight"], mask), scale)
            return call(operator.getitem, (attended, 0))
        return call(ops.attention.default, (query, key, value, mask, scale))

    def capture(self, attention: tuple[Any, ...], scale: Any) -> None:
        """Have the layers that follow read the sinks of this attention (query, key, lse, weight,
        mask)."""
        limit = self.values.call(aten.mul.Tensor, self.inputs["candidates"], self.plan.key_block)
        self.sinks = self._left("kept_sinks", self.captured_sinks(attention, limit, scale))

    def blocks(self, site: Site, query: fx.Node) -> fx.Node:
        """The key blocks that a sparse site reads, [batch, blocks], chosen by the heads of all
        ranks, or by an earlier step."""
        ops, call, inputs = torch.ops.focus_compile, self.graph.call_function, self.inputs
        name = f"kept_blocks_{site.index}"
        if not self.choose:
            return inputs[name]
        relevance = (query, inputs["focus_weight"], inputs[f"summaries_{site.index}"])
        kept = (inputs["candidates"], inputs["keep"])
        if self.plan.ranks is None and self.plan.shards is None:
            return self._left(name, call(ops.select_blocks.default, (*relevance, *kept)))
        scores = self.relevance_of_all(call(ops.block_relevance.default, relevance))
        return self._left(name, call(ops.keep_blocks.default, (scores, *kept)))

    def relevance_of_all(self, scores: fx.Node) -> fx.Node:
        """The relevance [batch, blocks] of all key blocks to all heads, of what this rank knows."""
        assert self.plan.ranks is not None
        return insert_sum_over_ranks(self.graph, scores, self.plan.ranks.group)

    def _left(self, name: str, chosen: fx.Node) -> fx.Node:
        """What was chosen, left in the state where later steps read it."""
        if name not in self.inputs:
            return chosen
        return self.graph.call_function(aten.copy_.default, (self.inputs[name], chosen))

    def captured_sinks(self, attention: tuple[Any, ...], limit: fx.Node, scale: Any) -> fx.Node:
        """The sinks before `limit`, by the attention of all ranks' heads."""
        ops, call, count = torch.ops.focus_compile, self.graph.call_function, self.plan.sink_tokens
        if self.plan.ranks is None:
            return call(ops.capture_sinks.default, (*attention, limit, count, scale))
        scores = call(ops.sink_scores.default, (*attention, limit, scale))
        scores = insert_sum_over_ranks(self.graph, scores, self.plan.ranks.group)
        return call(ops.keep_sinks.default, (scores, limit, count))

    def sinks_read(self) -> fx.Node:
        """The sinks of a sparse layer, [batch, sink_tokens]: the first positions where no layer
        captures them."""
        if self.sinks is None:
            self.sinks = self._first_positions()
        return self.sinks

    def _first_positions(self) -> fx.Node:
        count, device = self.plan.sink_tokens, self.inputs["rows"].meta["device"]
        first = self.graph.call_function(aten.arange.default, (count,), {"device": device})
        return self.values.call(
            aten.expand.default, first, [self.values.size(self.plan.batch), count]
        )
