"""The refresh program: K/V and block summaries of all rows into the state, outputs of some rows.

Depth is a knob here too: after the last layer's keys and values are made, only the rows whose
outputs are wanted go on, through its attention, its MLP and the head.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from focus_compile.kernels.block_summaries import op as _summaries  # noqa: F401
from focus_compile.passes.row_builder import RowBuilder
from focus_compile.plan import Plan, RowOp, Site

__all__ = ["REFRESH_INPUTS", "BuildRefresh"]

aten = torch.ops.aten
REFRESH_INPUTS = ("rows",)
"""Input of a refresh after the model's own: the rows to return, int64 [batch, rows]. Not read
where the plan returns all of them."""


@dataclass(frozen=True)
class BuildRefresh:
    """Needs: the canonical graph that the plan was made from. Does not change it."""

    name: ClassVar[str] = "build-refresh"
    plan: Plan = field(repr=False)

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, REFRESH_INPUTS, state) -> (*outputs)."""
        return _RefreshBuilder(gm, self.plan, REFRESH_INPUTS).build()


class _RefreshBuilder(RowBuilder):
    """In full whatever keys and values are made of, at the rows whatever follows them."""

    def build(self) -> fx.GraphModule:
        needed = self.ancestors(self._wanted())
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.name in needed or self._unpacks_full(node):
                self.full[node.name] = self._copy(node)
            elif node.name in self.rows_of:
                self.active[node.name] = self.row_op(node, self.rows_of[node.name])
        if self.plan.logits_rows == "all":
            self.graph.output(tuple(self.full[output.node] for output in self.plan.outputs))
            self.graph.lint()
            return fx.GraphModule(self.gm, self.graph)
        return self.finish()

    def _wanted(self) -> list[str]:
        """What has to be known of all rows."""
        if self.plan.logits_rows == "all":
            return [output.node for output in self.plan.outputs]
        cached = [name for site in self.plan.sites for name in (site.key, site.value)]
        others = [o.node for row in self.plan.rows for o in row.operands if o.use != "rows"]
        return cached + others

    def _unpacks_full(self, node: fx.Node) -> bool:
        source = node.args[0] if node.target is operator.getitem else None
        return isinstance(source, fx.Node) and source.name in self.full

    def _copy(self, node: fx.Node) -> fx.Node:
        new = self.copy(node)
        site = self.sites.get(node.name)
        if site is not None:
            with self.graph.inserting_before(new):
                key, value = self._write(site)
            new.update_arg(1, key)
            new.update_arg(2, value)
        return new

    def site(self, node: fx.Node, row: RowOp, site: Site) -> fx.Node:
        """The last layer's: queries of the rows, keys and values of all."""
        query, mask = self.argument(node.args[0], row), self.argument(node.args[3], row)
        arguments = (query, *self._write(site), mask, node.args[4])
        return self.graph.call_function(torch.ops.focus_compile.attention.default, arguments)

    def _write(self, site: Site) -> tuple[fx.Node, fx.Node]:
        """All rows' K and V into the caches, and summaries of the keys where they are read."""
        call = self.graph.call_function
        key, value = (
            call(aten.copy_.default, (self.inputs[f"{what}_cache_{site.index}"], self.full[name]))
            for what, name in (("key", site.key), ("value", site.value))
        )
        if site.region == "sparse-suffix":
            summaries = call(
                torch.ops.focus_compile.block_summaries.default,
                (key, self.plan.key_block, self.plan.block_summary),
            )
            target = self.inputs[f"summaries_{site.index}"]
            call(aten.copy_.default, (target, summaries))
        return key, value
