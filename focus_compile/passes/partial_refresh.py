"""The partial refresh: some rows with all keys, and how stale the others are.

Reads only the plan. Like a step, but no key is left out and nothing is predicted: its keys and
values replace older ones, its outputs are the rows', and on the way it measures, at every site, how
far the rows that it did not renew have moved, from the ones that it did (`staleness`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from focus_compile.kernels.attention import op as _attention  # noqa: F401
from focus_compile.kernels.block_summaries import op as _summaries  # noqa: F401
from focus_compile.kernels.staleness import op as _staleness  # noqa: F401
from focus_compile.passes.collectives import insert_sum_over_ranks
from focus_compile.passes.step_program import ActiveRowsBuilder
from focus_compile.plan import Plan, Ranks, RowOp, Site

__all__ = ["PARTIAL_INPUTS", "BuildPartialRefresh"]

aten = torch.ops.aten
PARTIAL_INPUTS = ("rows", "readers", "reader_weight", "left", "probes", "probe_weight")
"""Inputs of a partial refresh after the model's own: rows int64 [batch, active]; readers, probes
int64 [batch, count]: which of these rows judge, and which are judged; their weights fp32. left bool
[batch, length]: the rows that stay as they are."""


@dataclass(frozen=True)
class BuildPartialRefresh:
    """Needs: the canonical graph that the plan was made from. Does not change it."""

    name: ClassVar[str] = "build-partial-refresh"
    plan: Plan = field(repr=False)

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, PARTIAL_INPUTS, state) -> (*row outputs, error fp32
        [sites, batch, 2], attention received fp32 [batch, length])."""
        return _PartialBuilder(gm, self.plan).build()


class _PartialBuilder(ActiveRowsBuilder):
    """Every site attends to all keys."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        super().__init__(gm, plan, PARTIAL_INPUTS)
        self.errors: list[fx.Node] = []
        self.received: list[fx.Node] = []
        self._positions: fx.Node | None = None

    def extra(self) -> Sequence[fx.Node]:
        call = self.graph.call_function
        received = self.received[0]
        for other in self.received[1:]:
            received = call(aten.add.Tensor, (received, other))
        mean = call(aten.div.Tensor, (received, len(self.received)))
        errors = call(aten.stack.default, (self.errors,))
        if self.plan.ranks is None:
            return errors, mean
        return self._over_ranks(errors, mean, self.plan.ranks)

    def _over_ranks(self, errors: fx.Node, mean: fx.Node, ranks: Ranks) -> Sequence[fx.Node]:
        """Sums and means over the heads of this rank, as those over all heads; one collective."""
        call = self.graph.call_function
        errors = call(aten.transpose.int, (errors, 0, 1))  # [batch, sites, 2]
        sums = [call(aten.flatten.using_ints, (errors, 1)), mean]
        whole = call(aten.cat.default, (sums, 1))
        whole = insert_sum_over_ranks(self.graph, whole, ranks.group)
        width = 2 * len(self.errors)
        errors = call(aten.slice.Tensor, (whole, 1, 0, width))
        errors = call(aten.unflatten.int, (errors, 1, [len(self.errors), 2]))
        received = call(aten.slice.Tensor, (whole, 1, width))
        received = call(aten.div.Tensor, (received, ranks.size))
        return call(aten.transpose.int, (errors, 0, 1)), received

    def site(self, node: fx.Node, row: RowOp, site: Site) -> fx.Node:
        ops, call, inputs = torch.ops.focus_compile, self.graph.call_function, self.inputs
        query, new_key, new_value = (self.argument(a, row) for a in node.args[:3])
        mask, scale = self.argument(node.args[3], row), node.args[4]
        caches = [inputs[f"{what}_cache_{site.index}"] for what in ("key", "value")]
        old = [self._at(cache, self._probed()) for cache in caches]
        new = [self._at(value, inputs["probes"]) for value in (new_key, new_value)]
        key = self.write(f"key_cache_{site.index}", new_key)
        value = self.write(f"value_cache_{site.index}", new_value)
        attended = call(ops.attention_with_lse.default, (query, key, value, mask, scale))
        out, lse = (call(operator.getitem, (attended, at)) for at in (0, 1))
        readers = (inputs["readers"], inputs["reader_weight"])
        judged = call(
            ops.staleness.default,
            (query, key, out, lse, *readers, inputs["left"], old[0], new[0], old[1], new[1],
             self._probed(), inputs["probe_weight"], mask, scale),
        )  # fmt: skip
        self.errors.append(call(operator.getitem, (judged, 0)))
        self.received.append(call(operator.getitem, (judged, 1)))
        if site.region == "sparse-suffix":
            arguments = (key, self.plan.key_block, self.plan.block_summary)
            summaries = call(ops.block_summaries.default, arguments)
            call(aten.copy_.default, (inputs[f"summaries_{site.index}"], summaries))
        return out

    def _probed(self) -> fx.Node:
        """Positions of the probes, int64 [batch, count]."""
        if self._positions is None:
            rows, probes = self.inputs["rows"], self.inputs["probes"]
            self._positions = self.values.call(aten.gather.default, rows, 1, probes)
        return self._positions

    def _at(self, values: fx.Node, rows: fx.Node) -> fx.Node:
        """values [batch, heads, rows, width] at rows int64 [batch, count], a copy."""
        swapped = self.values.call(aten.transpose.int, values, 1, 2)
        picked = self.values.call(aten.index.Tensor, swapped, [self.values.sequences(), rows])
        return self.values.call(aten.transpose.int, picked, 1, 2)
