"""Linear layers of one input become one: few rows are bound by reading weights, and one long read
is faster than three short ones (q, k and v; gate and up)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

__all__ = ["MergeProjections", "MergedWeights"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class MergedWeights:
    """Inputs that one new input holds, stacked along their first axis.

    name: of the new input; parts: names of the old ones, in order.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class MergeProjections:
    """Needs: a graph whose weights are placeholders, such as a step. Changes it in place."""

    name: ClassVar[str] = "merge-projections"
    rows: Mapping[str, int] = field(repr=False)
    """Length of the first axis of every weight, by the name of its placeholder."""

    def apply(self, gm: fx.GraphModule) -> tuple[MergedWeights, ...]:
        """Appends an input for every group merged, and returns what each holds."""
        groups: dict[tuple[Any, int], list[fx.Node]] = {}
        for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
            lengths = {self.rows.get(part.name) for part in _weights(node)}
            if len(lengths) == 1 and None not in lengths and not node.kwargs:
                groups.setdefault((node.args[0], len(_weights(node))), []).append(node)
        merged: list[MergedWeights] = []
        for nodes in groups.values():
            if len(nodes) > 1:
                merged += self._merge(gm.graph, nodes, len(merged))
        gm.graph.lint()
        gm.recompile()
        return tuple(merged)

    def _merge(self, graph: fx.Graph, nodes: list[fx.Node], number: int) -> list[MergedWeights]:
        """One linear for all of `nodes`, which share their input; each becomes a slice of it."""
        kinds = zip(*map(_weights, nodes), strict=True)
        merged = [
            MergedWeights(f"merged_{number + kind}", tuple(part.name for part in parts))
            for kind, parts in enumerate(kinds)
        ]
        placeholders: list[fx.Node] = []
        for item in merged:
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                placeholders.append(graph.placeholder(item.name))
        parts = []
        with graph.inserting_before(nodes[0]):
            joined = graph.call_function(aten.linear.default, (nodes[0].args[0], *placeholders))
            start = 0
            for node in nodes:
                end = start + self.rows[_weights(node)[0].name]
                parts.append(graph.call_function(aten.slice.Tensor, (joined, -1, start, end)))
                start = end
        for node, part in zip(nodes, parts, strict=True):
            part.meta["stack_trace"] = node.meta.get("stack_trace")
            node.replace_all_uses_with(part)
            graph.erase_node(node)
        return merged


def _weights(node: fx.Node) -> list[fx.Node]:
    """The weight and, where there is one, the bias of a linear node."""
    return [part for part in node.args[1:] if isinstance(part, fx.Node)]
