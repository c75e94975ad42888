"""The compiled programs of a block-diffusion model, and the lists of rows that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import Tensor, fx

from focus_compile.block_diffusion.tracing import TracedModel
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
from focus_compile.pipeline import weight_rows
from focus_compile.runtime.programs import model_inputs, stacked_shape

__all__ = ["BlockPrograms", "RowList"]

CHOSEN = sympy.Symbol("chosen_rows", integer=True, positive=True)
SEQUENCES = sympy.Symbol("sequences", integer=True, positive=True)
SLOTS = sympy.Symbol("slots", integer=True, positive=True)
SCRATCH = 8
"""Positions behind every cache slot, the first of which takes what padding rows write."""


@dataclass(frozen=True)
class RowList:
    """Rows of several sequences one after another; see `LISTED_INPUTS` for the shapes (b = 1)."""

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

    caches: K and V of every layer [slots, Hkv, max_length + SCRATCH, d], all of the programs'
    state.
    """

    traced: TracedModel
    whole: Program
    prefix: Program
    suffix: Program
    caches: list[Tensor]
    frontier: list[tuple[int, ...]]
    """Shapes of what the prefix hands to the suffix, -1 for its rows."""
    _merged: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    _merged_of: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)

    @classmethod
    def build(cls, traced: TracedModel, slots: int, cut: int, lowering: str) -> BlockPrograms:
        """Programs over caches for `slots` sequences. cut: the layer where rows may leave."""
        plan, gm, rows = traced.plan, traced.graph, traced.block_length
        crossing = frontier_of(gm, plan, cut)
        own = model_inputs(traced.captured, plan)
        state = _cache_specs(traced)
        listed, chosen = _specs(LISTED_INPUTS), _specs(CHOSEN_INPUTS)
        handed = [InputSpec(item.input, item.shape) for item in crossing]
        # The suffix writes the K/V of the chosen rows.
        at_chosen = [
            InputSpec(spec.name, (CHOSEN,)) if spec.name in ("slots", "places") else spec
            for spec in listed
        ]
        graphs = {
            "whole": BuildWhole(plan, rows, len(plan.sites) - 1).apply(gm),
            "prefix": BuildPrefix(plan, rows, cut).apply(gm),
            "suffix": BuildSuffix(plan, rows, cut).apply(gm),
        }
        inputs = {
            "whole": [*own, *listed, *chosen, *state],
            "prefix": [*own, *listed, InputSpec("masked", (LISTED,)), *state],
            "suffix": [*own, *at_chosen, *chosen, *handed, *state],
        }
        merged_of: dict[str, list[tuple[str, ...]]] = {}
        for name, graph in graphs.items():
            traced.pipeline.dump(name, graph)
            merged_of[name] = _merge(traced, graph, inputs[name])
        made = {name: Program(name, graphs[name], inputs[name], lowering) for name in graphs}
        ranges = [tuple(-1 if s.free_symbols else int(s) for s in f.shape) for f in crossing]
        return cls(
            traced,
            made["whole"],
            made["prefix"],
            made["suffix"],
            _allocate(traced, slots),
            ranges,
            _merged_of=merged_of,
        )

    def run_whole(self, listed: RowList, chosen: Tensor, chosen_starts: Tensor) -> Tensor:
        """Logits [1, K, vocabulary] of the chosen rows of the list."""
        outputs = self.whole(
            *self.traced.arguments, *listed.inputs(), chosen, chosen_starts, *self._state("whole")
        )
        logits: Tensor = outputs[self.traced.plan.logits]
        return logits

    def run_prefix(self, listed: RowList, masked: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Importance [R] at the cut and in the layer before it, and the frontier."""
        at_cut, before, *frontier = self.prefix(
            *self.traced.arguments, *listed.inputs(), masked, *self._state("prefix")
        )
        return at_cut, before, frontier

    def run_suffix(
        self, listed: RowList, chosen: Tensor, chosen_starts: Tensor, frontier: Sequence[Tensor]
    ) -> Tensor:
        """Logits [1, K, vocabulary] of the chosen rows; slots and places are theirs."""
        outputs = self.suffix(
            *self.traced.arguments, *listed.inputs(), chosen, chosen_starts, *frontier,
            *self._state("suffix"),
        )  # fmt: skip
        logits: Tensor = outputs[self.traced.plan.logits]
        return logits

    def _state(self, program: str) -> list[Tensor]:
        """The caches, and the merged weights of the program, which programs share."""
        names = [role.name for role in self.traced.plan.inputs]
        placeholders = self.traced.graph.graph.find_nodes(op="placeholder")
        at = {node.name: index for index, node in enumerate(placeholders)}
        assert len(names) == len(at)
        weights = []
        for parts in self._merged_of[program]:
            if parts not in self._merged:
                tensors = [self.traced.arguments[at[part]].detach() for part in parts]
                self._merged[parts] = torch.cat(tensors)
            weights.append(self._merged[parts])
        return [*self.caches, *weights]

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.whole, self.prefix, self.suffix

    @property
    def compile_seconds(self) -> float:
        return sum(program.compile_seconds for program in self.programs)

    @property
    def compilations(self) -> int:
        return sum(program.compilations for program in self.programs)


def _specs(names: Sequence[str]) -> list[InputSpec]:
    one = sympy.Integer(1)
    shapes: dict[str, tuple[sympy.Expr, ...]] = {
        "row_ids": (one, LISTED),
        "rows": (one, LISTED),
        "slots": (LISTED,),
        "places": (LISTED,),
        "owners": (SEQUENCES,),
        "starts": (SEQUENCES + 1,),
        "lengths": (SEQUENCES,),
        "chosen": (one, CHOSEN),
        "chosen_starts": (SEQUENCES + 1,),
    }
    return [InputSpec(name, shapes[name]) for name in names]


def _cache_specs(traced: TracedModel) -> list[InputSpec]:
    specs = []
    for site in traced.plan.sites:
        sizes = (site.kv_heads, traced.max_length + SCRATCH, site.head_dim)
        shape = (SLOTS, *map(sympy.Integer, sizes))
        specs += [
            InputSpec(f"{what}_cache_{site.index}", shape, static=True) for what in ("key", "value")
        ]
    return specs


def _allocate(traced: TracedModel, slots: int) -> list[Tensor]:
    device = traced.arguments[traced.plan.ids.position].device
    return [
        torch.zeros(
            (slots, site.kv_heads, traced.max_length + SCRATCH, site.head_dim),
            dtype=getattr(torch, site.dtype),
            device=device,
        )
        for site in traced.plan.sites
        for _ in range(2)
    ]


def _merge(
    traced: TracedModel, graph: fx.GraphModule, inputs: list[InputSpec]
) -> list[tuple[str, ...]]:
    """Merge the graph's linear layers of one input if the plan says so; the parts of each."""
    if not traced.plan.merge_projections:
        return []
    merged = MergeProjections(weight_rows(traced.graph, traced.plan)).apply(graph)
    placeholders = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    shapes = {name: spec.shape for name, spec in zip(placeholders, inputs, strict=False)}
    for item in merged:
        stacked = stacked_shape([shapes[part] for part in item.parts])
        inputs.append(InputSpec(item.name, stacked, static=True))
    return [item.parts for item in merged]
