"""The refresh of keys and values that are spread over ranks: each rank computes its own rows.

Reads only the plan. Queries of a rank's rows attend to the keys of all ranks, gathered for one
layer at a time. What follows the last layer's keys and values is computed at the wanted rows alone,
on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from focus_compile.kernels.attention import op as _attention  # noqa: F401
from focus_compile.kernels.block_summaries import op as _summaries  # noqa: F401
from focus_compile.passes.graph_tools import shape_of
from focus_compile.passes.refresh_program import REFRESH_INPUTS
from focus_compile.passes.row_builder import RowBuilder
from focus_compile.passes.row_values import RowValues
from focus_compile.passes.shard_nodes import ShardNodes
from focus_compile.plan import Plan, RowOp, Site

__all__ = ["BuildShardedRefresh"]

aten = torch.ops.aten


@dataclass(frozen=True)
class BuildShardedRefresh:
    """Needs: the canonical graph that the plan was made from. Does not change it."""

    name: ClassVar[str] = "build-sharded-refresh"
    plan: Plan = field(repr=False)

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, REFRESH_INPUTS, state) -> (*outputs), the same on all ranks."""
        return _ShardedRefreshBuilder(gm, self.plan).build()


class _ShardedRefreshBuilder(RowBuilder):
    """In full what no row is computed from; at this rank's rows what keys and values are made of;
    at the wanted rows what follows them."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        super().__init__(gm, plan, REFRESH_INPUTS)
        ids = self.values.ids
        cache = self.inputs[f"key_cache_{plan.sites[0].index}"]
        self.nodes = ShardNodes(self.graph, plan, cache, ids)
        wanted = self.values
        if plan.logits_rows == "all":
            rows = self._range(0, self.nodes.length)
            wanted = RowValues(self.graph, rows, ids, plan.batch, plan.length)
        own = self._range(self.nodes.first, self.nodes.own)
        self.own_rows = RowValues(self.graph, own, ids, plan.batch, plan.length)
        self.wanted_rows = wanted
        self.own: dict[str, fx.Node] = {}
        self.wanted: dict[str, fx.Node] = {}
        self._handed: dict[tuple[str, Any], fx.Node] = {}
        keys = self.ancestors([name for site in plan.sites for name in (site.key, site.value)])
        self.of_keys = keys & set(self.rows_of)

    def _range(self, first: Any, count: Any) -> fx.Node:
        """The positions from `first` on, int64 [batch, count]."""
        device = self.inputs["rows"].meta["device"]
        call = self.values.call
        positions = self.graph.call_function(aten.arange.default, (count,), {"device": device})
        positions = call(aten.add.Tensor, positions, first)
        size = self.values.size(self.plan.batch)
        rows = call(aten.expand.default, positions, [size, count])
        rows.meta["device"] = device
        return rows

    def build(self) -> fx.GraphModule:
        needed = self.ancestors(
            [o.node for row in self.plan.rows for o in row.operands if o.use != "rows"]
        )
        for node in self.gm.graph.nodes:
            if node.name in needed and node.name not in self.full:
                self.full[node.name] = self.copy(node)
            if node.name in self.rows_of:
                self._enter(own=node.name in self.of_keys)
                self.active[node.name] = self.row_op(node, self.rows_of[node.name])
        self._enter(own=False)
        return self.finish()

    def _enter(self, own: bool) -> None:
        """Build at this rank's rows, or at the wanted ones."""
        self.is_own = own
        self.active = self.own if own else self.wanted
        self.values = self.own_rows if own else self.wanted_rows

    def at_rows(self, node: fx.Node, axes: Any) -> fx.Node:
        if self.is_own or node.name in self.wanted or node.name not in self.own:
            return super().at_rows(node, axes)
        key = (node.name, axes)
        if key not in self._handed:
            self._handed[key] = self.nodes.rows_of_all(
                self.own[node.name], node, axes, self.wanted_rows.rows, self.own_rows.rows
            )
        return self._handed[key]

    def site(self, node: fx.Node, row: RowOp, site: Site) -> fx.Node:
        ops, call = torch.ops.focus_compile, self.graph.call_function
        query, mask = self.argument(node.args[0], row), self.argument(node.args[3], row)
        scale: Any = node.args[4]
        key, value = self._write(site)
        if self.is_own:
            keys = (self.nodes.whole_cache(key), self.nodes.whole_cache(value))
            return call(ops.attention.default, (query, *keys, mask, scale))
        source = node.args[3]
        if isinstance(source, fx.Node):
            mask = self.nodes.columns(mask, shape_of(source))
        keys = (self.nodes.of_cache(key), self.nodes.of_cache(value))
        attended = call(ops.attention_with_lse.default, (query, *keys, mask, scale))
        return self.nodes.join(attended, getattr(torch, site.dtype))[0]

    def _write(self, site: Site) -> tuple[fx.Node, fx.Node]:
        """This rank's K and V into its caches, and summaries of the keys where they are read."""
        key, value = (
            self.nodes.fill_cache(self.inputs[f"{what}_cache_{site.index}"], self.own[name])
            for what, name in (("key", site.key), ("value", site.value))
        )
        if site.region == "sparse-suffix":
            summaries = self.graph.call_function(
                torch.ops.focus_compile.block_summaries.default,
                (key, self.plan.key_block, self.plan.block_summary),
            )
            target = self.inputs[f"summaries_{site.index}"]
            self.graph.call_function(aten.copy_.default, (target, summaries))
        return key, value
