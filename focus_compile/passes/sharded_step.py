"""The step over keys and values that are spread over ranks.

Reads only the plan. Every rank computes all active rows, keeps the keys and values of those that
are its own, and attends to its shard; the ranks join what they found by its log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from focus_compile.passes.graph_tools import shape_of
from focus_compile.passes.shard_nodes import ShardNodes
from focus_compile.passes.step_program import StepBuilder
from focus_compile.plan import Plan, RowOp, Site

__all__ = ["BuildShardedStep"]

aten = torch.ops.aten


@dataclass(frozen=True)
class BuildShardedStep:
    """Needs: the canonical graph that the plan was made from. Does not change it."""

    name: ClassVar[str] = "build-sharded-step"
    plan: Plan = field(repr=False)
    choose: bool = True
    """As `BuildStep` has it."""

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, STEP_INPUTS, state) -> (*row outputs, sinks), the same on all
        ranks."""
        return _ShardedStepBuilder(gm, self.plan, self.choose).build()


class _ShardedStepBuilder(StepBuilder):
    """Each site attends as its region says, to this rank's keys."""

    def __init__(self, gm: fx.GraphModule, plan: Plan, choose: bool) -> None:
        super().__init__(gm, plan, choose)
        cache = self.inputs[f"key_cache_{plan.sites[0].index}"]
        self.nodes = ShardNodes(self.graph, plan, cache, self.values.ids)
        self._own: tuple[fx.Node, fx.Node, fx.Node] | None = None

    def write(self, name: str, rows: fx.Node) -> fx.Node:
        """Those active K or V rows that are this rank's into its cache [batch, heads, shard, d]."""
        if self._own is None:
            self._own = self.nodes.writes(self.inputs["rows"])
        slots, places, some = self._own
        cache, call = self.inputs[name], self.values.call
        sequences = self.values.sequences()
        rows = call(aten.transpose.int, rows, 1, 2)
        rows = call(aten.index.Tensor, rows, [sequences, slots])
        first = call(aten.unsqueeze.default, call(aten.select.int, cache, 2, 0), 1)
        for _ in range(3):
            some = call(aten.unsqueeze.default, some, -1)
        rows = call(aten.where.self, some, rows, first)
        call(aten.index_put_.default, cache, [sequences, None, places], rows)
        return cache

    def attend(
        self, node: fx.Node, row: RowOp, site: Site, query: fx.Node, key: fx.Node, value: fx.Node
    ) -> fx.Node:
        ops, call, inputs = torch.ops.focus_compile, self.graph.call_function, self.inputs
        key, value = self.nodes.of_cache(key), self.nodes.of_cache(value)
        mask, scale = self._mask(node, row), node.args[4]
        dtype = getattr(torch, site.dtype)
        if site.region == "sparse-suffix":
            blocks = self.blocks(site, query)
            attended = call(
                ops.sparse_attention_of_shard.default,
                (query, key, value, blocks, self.sinks_read(), inputs["candidates"],
                 self.nodes.first, self.plan.key_block, mask, scale),
            )  # fmt: skip
            return self.nodes.join(attended, dtype)[0]
        attended = call(ops.attention_with_lse.default, (query, key, value, mask, scale))
        out, lse = self.nodes.join(attended, dtype)
        if site.region == "sink-capture" and self.choose:
            self.capture((query, key, lse, inputs["row_weight"], mask), scale)
        return out

    def _mask(self, node: fx.Node, row: RowOp) -> fx.Node | None:
        source = node.args[3]
        if not isinstance(source, fx.Node):
            return None
        return self.nodes.columns(self.argument(source, row), shape_of(source))

    def relevance_of_all(self, scores: fx.Node) -> fx.Node:
        return self.nodes.of_all_blocks(scores)

    def captured_sinks(self, attention: tuple[Any, ...], limit: fx.Node, scale: Any) -> fx.Node:
        ops, call = torch.ops.focus_compile, self.graph.call_function
        own = self.values.call(aten.sub.Tensor, limit, self.nodes.first)
        own = self.values.call(aten.clamp.default, own, 0, self.nodes.own)
        scores = call(ops.sink_scores.default, (*attention, own, scale))
        scores = self.nodes.of_all_keys(scores)
        return call(ops.keep_sinks.default, (scores, limit, self.plan.sink_tokens))
