"""The compiled programs of a block-diffusion model, and the lists of rows that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from focus_compile.capture import Capture
from focus_compile.lowering.program import InputSpec, Program
from focus_compile.passes.block_step import (
    CHOSEN_INPUTS,
    LISTED,
    LISTED_INPUTS,
    BuildPrefix,
    BuildSuffix,
    BuildWhole,
    frontier_of,
)
from focus_compile.passes.merge_projections import MergeProjections
from focus_compile.pipeline import Pipeline, weight_rows
from focus_compile.plan import Factor, Plan
from focus_compile.runtime.programs import model_inputs, stacked_shape

__all__ = ["BlockPrograms", "RowList"]

CHOSEN = sympy.Symbol("chosen_rows", integer=True, positive=True)
SEQUENCES = sympy.Symbol("sequences", integer=True, positive=True)
SLOTS = sympy.Symbol("slots", integer=True, positive=True)
ROOM = sympy.Symbol("room", integer=True, positive=True)
SCRATCH = 8
"""Positions behind every cache slot, the first of which takes what padding rows write."""


@dataclass(frozen=True)
class RowList:
    """Rows of several sequences one after another; see `LISTED_INPUTS`."""

    row_ids: Tensor
    rows: Tensor
    slots: Tensor
    places: Tensor
    owners: Tensor
    starts: Tensor
    lengths: Tensor

    def inputs(self) -> tuple[Tensor, ...]:
        return (self.row_ids, self.rows, self.slots, self.places, self.owners, self.starts,
                self.lengths)  # fmt: skip


@dataclass
class BlockPrograms:
    """`whole` computes a list of rows; `prefix` and `suffix` do the same with a choice between.

    All read and write caches made by `allocate`: K and V of every layer [slots, Hkv, N + SCRATCH,
    d], where N is the capacity, the place where padding rows write.
    """

    plan: Plan
    whole: Program
    prefix: Program
    suffix: Program
    merged_of: dict[str, list[tuple[int, ...]]]
    """For each program, the positions of the inputs that its merged weights hold."""
    handed_axes: tuple[Factor, ...]
    """Where each value of the frontier carries its rows."""
    _merged: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        captured: Capture,
        pipeline: Pipeline,
        plan: Plan,
        block_length: int,
        cut: int,
        lowering: str,
    ) -> BlockPrograms:
        """cut: the layer where rows may leave.

        Raises:
            PassError: the model's graph has no such form.
        """
        gm = pipeline.gm
        own = model_inputs(captured, plan)
        state = _cache_specs(plan)
        listed, chosen = _specs(LISTED_INPUTS, plan), _specs(CHOSEN_INPUTS, plan)
        frontier = frontier_of(gm, plan, cut)
        handed = [InputSpec(item.input, item.shape) for item in frontier]
        rows, batch = block_length, plan.batch
        # The suffix writes the K/V of the chosen rows.
        at_chosen = [
            replace(spec, shape=(batch * CHOSEN,)) if spec.name in ("slots", "places") else spec
            for spec in listed
        ]
        graphs = {
            "whole": BuildWhole(plan, rows, len(plan.sites) - 1).apply(gm),
            "prefix": BuildPrefix(plan, rows, cut).apply(gm),
            "suffix": BuildSuffix(plan, rows, cut).apply(gm),
        }
        masked = InputSpec("masked", (batch * LISTED,))
        inputs = {
            "whole": [*own, *listed, *chosen, *state],
            "prefix": [*own, *listed, masked, *state],
            "suffix": [*own, *at_chosen, *chosen, *handed, *state],
        }
        merged_of: dict[str, list[tuple[int, ...]]] = {}
        for name, graph in graphs.items():
            merged_of[name] = _merge(pipeline, plan, graph, inputs[name])
            pipeline.dump(name, graph)
        made = {name: Program(name, graphs[name], inputs[name], lowering) for name in graphs}
        axes = tuple(item.axes.token for item in frontier)
        return cls(plan, made["whole"], made["prefix"], made["suffix"], merged_of, axes)

    def allocate(self, slots: int, capacity: int, device: torch.device) -> list[Tensor]:
        """Caches of `slots` sequences of up to `capacity` tokens."""
        with torch.inference_mode(False), torch.no_grad():
            return [
                torch.zeros(
                    (slots, site.kv_heads, capacity + SCRATCH, site.head_dim),
                    dtype=getattr(torch, site.dtype),
                    device=device,
                )
                for site in self.plan.sites
                for _ in range(2)
            ]

    def merge(self, args: Sequence[Any]) -> None:
        """Copy the merged weights anew; they stay where they are."""
        with torch.inference_mode(False), torch.no_grad():
            for parts in {parts for each in self.merged_of.values() for parts in each}:
                tensors = [args[at].detach() for at in parts]
                if parts in self._merged:
                    torch.cat(tensors, out=self._merged[parts])
                else:
                    self._merged[parts] = torch.cat(tensors)

    def run_whole(
        self,
        args: Sequence[Any],
        caches: Sequence[Tensor],
        listed: RowList,
        chosen: Tensor,
        chosen_starts: Tensor,
    ) -> tuple[Tensor, ...]:
        """The model's outputs [b, K, ...] at the chosen rows of the list.

        args: the model's own inputs, of which weights and position tables are read.
        """
        return self.whole(
            *args, *listed.inputs(), chosen, chosen_starts, *caches, *self._weights("whole")
        )

    def run_prefix(
        self, args: Sequence[Any], caches: Sequence[Tensor], listed: RowList, masked: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Importance [b * R] at the cut and in the layer before it, and the frontier."""
        at_cut, before, *frontier = self.prefix(
            *args, *listed.inputs(), masked, *caches, *self._weights("prefix")
        )
        return at_cut, before, frontier

    def run_suffix(
        self,
        args: Sequence[Any],
        caches: Sequence[Tensor],
        listed: RowList,
        chosen: Tensor,
        chosen_starts: Tensor,
        frontier: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """The model's outputs [b, K, ...] at the chosen rows; slots and places are theirs."""
        return self.suffix(
            *args, *listed.inputs(), chosen, chosen_starts, *frontier, *caches,
            *self._weights("suffix"),
        )  # fmt: skip

    def frontier_at(self, frontier: Sequence[Tensor], listed: int, chosen: Tensor) -> list[Tensor]:
        """The rows `chosen` [K] of the frontier of `listed` rows, as that of K rows (batch 1)."""
        picked = []
        for value, token in zip(frontier, self.handed_axes, strict=True):
            split = value.unflatten(token.axis, (-1, listed, int(token.inner)))
            rows = split.index_select(token.axis + 1, chosen)
            picked.append(rows.flatten(token.axis, token.axis + 2))
        return picked

    def _weights(self, program: str) -> list[Tensor]:
        return [self._merged[parts] for parts in self.merged_of[program]]

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.whole, self.prefix, self.suffix

    @property
    def compile_seconds(self) -> float:
        return sum(program.compile_seconds for program in self.programs)

    @property
    def compilations(self) -> int:
        return sum(program.compilations for program in self.programs)


def _specs(names: Sequence[str], plan: Plan) -> list[InputSpec]:
    batch = plan.batch
    shapes: dict[str, tuple[sympy.Expr, ...]] = {
        "row_ids": (batch, LISTED),
        "rows": (batch, LISTED),
        "slots": (batch * LISTED,),
        "places": (batch * LISTED,),
        "owners": (SEQUENCES,),
        "starts": (SEQUENCES + 1,),
        "lengths": (SEQUENCES,),
        "chosen": (batch, CHOSEN),
        "chosen_starts": (SEQUENCES + 1,),
    }
    return [InputSpec(name, shapes[name]) for name in names]


def _cache_specs(plan: Plan) -> list[InputSpec]:
    return [
        InputSpec(
            f"{what}_cache_{site.index}",
            (SLOTS, sympy.Integer(site.kv_heads), ROOM, sympy.Integer(site.head_dim)),
            static=True,
        )
        for site in plan.sites
        for what in ("key", "value")
    ]


def _merge(
    pipeline: Pipeline, plan: Plan, graph: fx.GraphModule, inputs: list[InputSpec]
) -> list[tuple[int, ...]]:
    """Merge the graph's linear layers of one input if the plan says so.

    Appends to `inputs`; returns the positions of the inputs that each new one holds.
    """
    if not plan.merge_projections:
        return []
    merged = MergeProjections(weight_rows(pipeline.gm, plan)).apply(graph)
    at = {node.name: i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    parts = [tuple(at[name] for name in item.parts) for item in merged]
    for item, positions in zip(merged, parts, strict=True):
        shape = stacked_shape([inputs[position].shape for position in positions])
        inputs.append(InputSpec(item.name, shape, static=True))
    return parts
