"""The compiled programs of a block-diffusion model, and the lists of rows that they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from focus_compile.capture import Capture
from focus_compile.kernels.block_summaries.op import block_summaries, summary_width
from focus_compile.lowering.program import InputSpec, Program
from focus_compile.passes.block_step import (
    CHOSEN_INPUTS,
    LISTED,
    BuildLeave,
    BuildPrefix,
    BuildSuffix,
    BuildWhole,
    frontier_of,
    listed_inputs,
)
from focus_compile.passes.merge_projections import MergeProjections
from focus_compile.pipeline import Pipeline
from focus_compile.plan import Plan, Site
from focus_compile.program_graphs import weight_rows
from focus_compile.runtime.programs import model_inputs, stacked_shape

__all__ = ["BlockPrograms", "KeyChoice", "RowList"]

CHOSEN = sympy.Symbol("chosen_rows", integer=True, positive=True)
SEQUENCES = sympy.Symbol("sequences", integer=True, positive=True)
SLOTS = sympy.Symbol("slots", integer=True, positive=True)
ROOM = sympy.Symbol("room", integer=True, positive=True)
KEY_BLOCKS = sympy.Symbol("key_blocks", integer=True, positive=True)
SCRATCH = 8
"""Positions behind every cache slot, the first of which takes what padding rows write."""


@dataclass(frozen=True)
class KeyChoice:
    """What sparse layers choose keys by; see `KEY_INPUTS`."""

    weights: Tensor
    candidates: Tensor
    keep: Tensor


@dataclass(frozen=True)
class RowList:
    """Rows of several sequences one after another; see `LISTED_INPUTS`. keys: None where all
    layers read all of them."""

    row_ids: Tensor
    rows: Tensor
    slots: Tensor
    places: Tensor
    owners: Tensor
    starts: Tensor
    lengths: Tensor
    keys: KeyChoice | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        keys = self.keys
        chosen_by = () if keys is None else (keys.weights, keys.candidates, keys.keep)
        return (self.row_ids, self.rows, self.slots, self.places, self.owners, self.starts,
                self.lengths, *chosen_by)  # fmt: skip

    @classmethod
    def of(cls, inputs: Sequence[Tensor]) -> RowList:
        """The list that has these `inputs`."""
        row_ids, rows, slots, places, owners, starts, lengths, *chosen_by = inputs
        keys = KeyChoice(*chosen_by) if chosen_by else None
        return cls(row_ids, rows, slots, places, owners, starts, lengths, keys)


@dataclass
class BlockPrograms:
    """`whole` computes a list of rows; `prefix` and `suffix` do the same with a choice between.

    All read and write caches made by `allocate`: K and V of every layer [slots, Hkv, N + SCRATCH,
    d], where N is the capacity, the place where padding rows write; then, of every sparse layer,
    summaries of its key blocks [slots, Hkv, N // key_block, d or 2 d], which `summarise` makes.
    """

    plan: Plan
    whole: Program
    prefix: Program
    suffix: Program
    leave: Program
    merged_of: dict[str, list[tuple[int, ...]]]
    """For each program, the positions of the inputs that its merged weights hold."""
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
        own = model_inputs(captured)
        state = _cache_specs(plan)
        listed, chosen = _specs(listed_inputs(plan), plan), _specs(CHOSEN_INPUTS, plan)
        handed = [InputSpec(item.input, item.shape) for item in frontier_of(gm, plan, cut)]
        rows, batch = block_length, plan.batch
        graphs = {
            "whole": BuildWhole(plan, rows, len(plan.sites) - 1).apply(gm),
            "prefix": BuildPrefix(plan, rows, cut).apply(gm),
            "suffix": BuildSuffix(plan, rows, cut).apply(gm),
        }
        masked = InputSpec("masked", (batch * LISTED,))
        inputs = {
            "whole": [*own, *listed, *chosen, *state],
            "prefix": [*own, *listed, masked, *state],
            "suffix": [*own, *listed, *chosen, *handed, *state],
        }
        merged_of: dict[str, list[tuple[int, ...]]] = {}
        for name, graph in graphs.items():
            merged_of[name] = _merge(pipeline, plan, graph, inputs[name])
            pipeline.dump(name, graph)
        labels = {"whole": plan.labels, "prefix": plan.labels[:cut], "suffix": plan.labels[cut:]}
        made = {
            name: Program(name, graph, inputs[name], lowering, labels=labels[name])
            for name, graph in graphs.items()
        }
        by_rows = {spec.name: spec for spec in (*listed, *chosen)}
        leave = BuildLeave(plan, rows, cut).apply(gm)
        pipeline.dump("leave", leave)
        # A few gathers, which Inductor has nothing to add to.
        made["leave"] = Program(
            "leave", leave, [by_rows["rows"], by_rows["chosen"], *handed], "eager"
        )
        return cls(plan, made["whole"], made["prefix"], made["suffix"], made["leave"], merged_of)

    def allocate(self, slots: int, capacity: int, device: torch.device) -> list[Tensor]:
        """Caches of `slots` sequences of up to `capacity` tokens."""
        kind = self.plan.block_summary
        tokens, blocks = capacity + SCRATCH, capacity // self.plan.key_block
        sizes = [(site, tokens, site.head_dim) for site in self.plan.sites for _ in range(2)]
        sizes += [(site, blocks, summary_width(site.head_dim, kind)) for site in self.sparse]
        with torch.inference_mode(False), torch.no_grad():
            return [
                torch.zeros(
                    (slots, site.kv_heads, length, width),
                    dtype=getattr(torch, site.dtype),
                    device=device,
                )
                for site, length, width in sizes
            ]

    @property
    def sparse(self) -> tuple[Site, ...]:
        """The layers that choose keys."""
        return self.plan.sites_of("sparse-suffix")

    @property
    def key_block(self) -> int | None:
        """Tokens of a key block, None where no layer chooses keys."""
        return self.plan.key_block if self.sparse else None

    def copy(self, source: Sequence[Tensor], target: Sequence[Tensor], length: int) -> None:
        """What caches hold of the first `length` tokens, and of the key blocks full by then."""
        blocks = length // self.plan.key_block
        lengths = [length] * (2 * len(self.plan.sites)) + [blocks] * len(self.sparse)
        for mine, theirs, count in zip(target, source, lengths, strict=True):
            mine[:, :, :count] = theirs[:, :, :count]

    def summarise(self, caches: Sequence[Tensor], done: Iterable[tuple[int, int, int]]) -> None:
        """Summaries of the key blocks that became full: (slot, from, to) in tokens, all final."""
        size = self.key_block
        if size is None:
            return
        pairs = [(slot, j) for slot, a, b in done for j in range(a // size, b // size)]
        if not pairs:
            return
        device = caches[0].device
        slots, blocks = torch.tensor(pairs, device=device).unbind(1)
        tokens = blocks[:, None] * size + torch.arange(size, device=device)
        for site, summaries in zip(self.sparse, caches[2 * len(self.plan.sites) :], strict=True):
            keys = caches[2 * site.index][slots[:, None], :, tokens].transpose(1, 2)
            made = block_summaries(keys, size, self.plan.block_summary)
            summaries[slots, :, blocks] = made[:, :, 0]

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

    def run_leave(
        self, listed: RowList, chosen: Tensor, frontier: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The frontier of the list's rows `chosen` [b, K]."""
        return self.leave(listed.rows, chosen, *frontier)

    def run_suffix(
        self,
        args: Sequence[Any],
        caches: Sequence[Tensor],
        listed: RowList,
        chosen: Tensor,
        chosen_starts: Tensor,
        frontier: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """The model's outputs [b, K, ...] at the chosen rows of a list that left the cut with this
        frontier."""
        return self.suffix(
            *args, *listed.inputs(), chosen, chosen_starts, *frontier, *caches,
            *self._weights("suffix"),
        )  # fmt: skip

    def _weights(self, program: str) -> list[Tensor]:
        return [self._merged[parts] for parts in self.merged_of[program]]

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.whole, self.prefix, self.suffix, self.leave

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
        "weights": (batch, LISTED),
        "candidates": (SEQUENCES,),
        "keep": (SEQUENCES,),
        "chosen": (batch, CHOSEN),
        "chosen_starts": (SEQUENCES + 1,),
    }
    return [InputSpec(name, shapes[name]) for name in names]


def _cache_specs(plan: Plan) -> list[InputSpec]:
    caches = [
        InputSpec(
            f"{what}_cache_{site.index}",
            (SLOTS, sympy.Integer(site.kv_heads), ROOM, sympy.Integer(site.head_dim)),
            static=True,
        )
        for site in plan.sites
        for what in ("key", "value")
    ]
    for site in plan.sites_of("sparse-suffix"):
        width = sympy.Integer(summary_width(site.head_dim, plan.block_summary))
        shape = (SLOTS, sympy.Integer(site.kv_heads), KEY_BLOCKS, width)
        caches.append(InputSpec(f"summaries_{site.index}", shape, static=True))
    return caches


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
