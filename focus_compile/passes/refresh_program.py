"""The refresh program: all rows, all keys, and K/V with block summaries left in the state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from focus_compile.kernels.block_summaries import op as _summaries  # noqa: F401
from focus_compile.passes.step_program import cache_names
from focus_compile.plan import Plan

__all__ = ["BuildRefresh"]

aten = torch.ops.aten


@dataclass(frozen=True)
class BuildRefresh:
    """Needs: the canonical graph that the plan was made from. Does not change it."""

    name: ClassVar[str] = "build-refresh"
    plan: Plan = field(repr=False)

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, state) -> (*outputs)."""
        graph = fx.Graph()
        environment: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            environment[node] = graph.placeholder(node.name)
        state = {name: graph.placeholder(name) for name in cache_names(self.plan)}
        sites = {site.node: site for site in self.plan.sites}
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            environment[node] = graph.node_copy(node, environment.__getitem__)
            site = sites.get(node.name)
            if site is None:
                continue
            new = environment[node]
            key, value = new.args[1], new.args[2]
            with graph.inserting_before(new):
                caches = (state[f"{what}_cache_{site.index}"] for what in ("key", "value"))
                cached = [
                    graph.call_function(aten.copy_.default, pair)
                    for pair in zip(caches, (key, value), strict=True)
                ]
                if site.region == "sparse-suffix":
                    summaries = graph.call_function(
                        torch.ops.focus_compile.block_summaries.default,
                        (cached[0], self.plan.key_block, self.plan.block_summary),
                    )
                    target = state[f"summaries_{site.index}"]
                    graph.call_function(aten.copy_.default, (target, summaries))
            new.update_arg(1, cached[0])
            new.update_arg(2, cached[1])
        by_name = {node.name: new for node, new in environment.items()}
        graph.output(tuple(by_name[output.node] for output in self.plan.outputs))
        graph.lint()
        return fx.GraphModule(gm, graph)
