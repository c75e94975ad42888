"""The compiled programs of one plan, and how the runtime calls them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from focus_compile.capture import Capture, InputInfo
from focus_compile.config import FocusConfig
from focus_compile.kernels.block_summaries.op import summary_width
from focus_compile.lowering.program import InputSpec, Program
from focus_compile.passes.graph_tools import shape_of, size_expression
from focus_compile.passes.partial_refresh import PARTIAL_INPUTS
from focus_compile.passes.refresh_program import REFRESH_INPUTS
from focus_compile.passes.row_builder import cache_names, kept_lists
from focus_compile.passes.row_values import ACTIVE
from focus_compile.passes.step_program import STEP_INPUTS
from focus_compile.plan import Plan, Site
from focus_compile.program_graphs import ProgramGraphs
from focus_compile.runtime.buckets import ActiveRows
from focus_compile.runtime.latest_rows import MOST_COPIES
from focus_compile.runtime.memory_plan import MemoryPlan

__all__ = [
    "MOST_PROBES",
    "MOST_READERS",
    "Programs",
    "model_inputs",
    "stacked_shape",
    "state_shapes",
]

MOST_READERS = 32
"""Rows of the current block whose attention outputs judge, in a partial refresh."""
MOST_PROBES = 128
"""Random prompt rows that they judge."""


def state_shapes(plan: Plan) -> dict[str, tuple[sympy.Expr, ...]]:
    """Shape of every state tensor: K/V [batch, kv_heads, length, head_dim], summaries by block; of
    the shard that this rank holds, where keys are spread over ranks."""
    shapes: dict[str, tuple[sympy.Expr, ...]] = {}

    def per_head(site: Site, length: sympy.Expr, width: int) -> tuple[sympy.Expr, ...]:
        return (plan.batch, sympy.Integer(site.kv_heads), length, sympy.Integer(width))

    for site in plan.sites:
        shapes[f"key_cache_{site.index}"] = per_head(site, plan.held_length, site.head_dim)
        shapes[f"value_cache_{site.index}"] = per_head(site, plan.held_length, site.head_dim)
    for site in plan.sites_of("sparse-suffix"):
        width = summary_width(site.head_dim, plan.block_summary)
        blocks = plan.held_length // plan.key_block
        shapes[f"summaries_{site.index}"] = per_head(site, blocks, width)
    for name in kept_lists(plan):
        every = blocks if plan.shards is None else blocks * plan.shards.size
        entries = sympy.Integer(plan.sink_tokens) if name == "kept_sinks" else every
        shapes[name] = (plan.batch, entries)
    assert list(shapes) == cache_names(plan)
    return shapes


@dataclass
class Programs:
    """exact(*inputs), refresh(*inputs, rows, *state), step(*inputs, *step inputs, *state), again
    likewise (a step on keys chosen earlier) and partial(*inputs, *partial inputs, *state); tail as
    `plan.tail` says."""

    plan: Plan
    exact: Program
    refresh: Program
    step: Program
    partial: Program | None = None
    again: Program | None = None
    tail: Program | None = None
    merged: tuple[tuple[int, ...], ...] = ()
    """Positions of the weights that each of the step's merged inputs holds."""

    @classmethod
    def build(
        cls, captured: Capture, graphs: ProgramGraphs, plan: Plan, config: FocusConfig
    ) -> Programs:
        inputs = model_inputs(captured)
        state = [InputSpec(name, shape, static=True) for name, shape in state_shapes(plan).items()]
        per_row = (plan.batch, ACTIVE)
        shapes = dict.fromkeys(("rows", "row_weight", "focus_weight"), per_row)
        refresh = [InputSpec(name, shapes[name]) for name in REFRESH_INPUTS]
        step = [InputSpec(name, shapes.get(name, (plan.batch,))) for name in STEP_INPUTS]
        positions = {
            node.name: at for at, node in enumerate(graphs.step.graph.find_nodes(op="placeholder"))
        }
        merged = tuple(tuple(positions[part] for part in item.parts) for item in graphs.merged)
        stacked = [
            InputSpec(item.name, stacked_shape([inputs[at].shape for at in parts]), static=True)
            for item, parts in zip(graphs.merged, merged, strict=True)
        ]
        lowering, own = config.lowering, [*inputs, *refresh, *state]
        stepped = [*inputs, *step, *state, *stacked]
        return cls(
            plan,
            Program("exact", captured.original, inputs, lowering),
            Program("refresh", graphs.refresh, own, lowering, labels=plan.labels),
            Program("step", graphs.step, stepped, lowering, labels=plan.labels),
            _partial(plan, graphs, inputs, state, lowering),
            None
            if graphs.again is None
            else Program("step again", graphs.again, stepped, lowering, labels=plan.labels),
            _tail(plan, captured.graph_module, inputs, lowering),
            merged,
        )

    def allocate(self, args: Sequence[Any]) -> list[Tensor]:
        """State tensors for inputs of these sizes, uninitialised."""
        ids = args[self.plan.ids.position]
        with torch.inference_mode(False), torch.no_grad():
            return [
                torch.empty(shape, dtype=dtype, device=ids.device)
                for shape, dtype in self._state(ids).values()
            ]

    def merge(self, args: Sequence[Any], into: list[Tensor]) -> list[Tensor]:
        """The step's merged weights, written into tensors made by an earlier call if there are."""
        weights = [[args[at].detach() for at in parts] for parts in self.merged]
        with torch.inference_mode(False), torch.no_grad():
            if not into:
                return [torch.cat(parts) for parts in weights]
            for parts, target in zip(weights, into, strict=True):
                torch.cat(parts, out=target)
        return into

    def memory_plan(self, args: Sequence[Any], first_row: int) -> MemoryPlan:
        """What a trajectory of these inputs takes; `first_row`: first row of the logits kept."""
        ids = args[self.plan.ids.position]
        sizes: Counter[str] = Counter()
        for name, (shape, dtype) in self._state(ids).items():
            sizes[name.partition("_")[0]] += math.prod(shape) * dtype.itemsize
        batch, length = ids.shape
        row = batch * sum(output.row_bytes for output in self.plan.outputs)
        copies = MOST_COPIES * length
        return MemoryPlan(
            kv=sizes["key"] + sizes["value"],
            summaries=sizes["summaries"] + sizes["kept"],
            logits=row * (length - first_row + copies),
            weights=sum(args[at].nbytes for parts in self.merged for at in parts),
            all_logits=self.plan.logits_rows == "all",
        )

    def _state(self, ids: Tensor) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and dtype of every state tensor for ids of this size."""
        sizes = {self.plan.batch: ids.shape[0], self.plan.length: ids.shape[1]}
        dtypes = {str(site.index): getattr(torch, site.dtype) for site in self.plan.sites}
        lists = kept_lists(self.plan)
        return {
            name: (
                [int(size.subs(sizes)) for size in shape],
                torch.int64 if name in lists else dtypes[name.rpartition("_")[2]],
            )
            for name, shape in state_shapes(self.plan).items()
        }

    def run_step(
        self,
        args: Sequence[Any],
        active: ActiveRows,
        candidates: Tensor,
        keep: Tensor,
        state: Sequence[Tensor],
        again: bool = False,
    ) -> tuple[Tensor, ...]:
        """Row outputs [batch, bucket, ...], and the sinks if a layer captures them.

        state: the state tensors, then the merged weights. again: on the keys that an earlier step
        chose.
        """
        step = self.again if again and self.again is not None else self.step
        return step(
            *args, active.rows, active.row_weight, active.focus_weight, candidates, keep, *state
        )

    def run_partial(
        self, args: Sequence[Any], inputs: Sequence[Tensor], state: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Row outputs [batch, active, ...], errors and the attention received.

        inputs: in `PARTIAL_INPUTS` order.
        """
        assert self.partial is not None
        return self.partial(*args, *inputs, *state)

    def run_tail(self, args: Sequence[Any], rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of the whole graph, of the model's outputs of all rows."""
        if self.tail is None or self.plan.tail is None:
            return tuple(rows)
        given = [args[at] for at in self.plan.tail.inputs]
        # A refresh may return them strided, a step does not: one compiled tail serves both.
        read = [values.contiguous() for values in rows[: len(self.plan.tail.reads)]]
        return self.tail(*given, *read)

    @property
    def _all(self) -> list[Program]:
        named = (self.exact, self.refresh, self.step, self.partial, self.again, self.tail)
        return [program for program in named if program is not None]

    @property
    def compilations(self) -> int:
        """Artifacts compiled so far."""
        return sum(program.compilations for program in self._all)

    @property
    def compile_seconds(self) -> float:
        return sum(program.compile_seconds for program in self._all)


def _partial(
    plan: Plan,
    graphs: ProgramGraphs,
    inputs: Sequence[InputSpec],
    state: Sequence[InputSpec],
    lowering: str,
) -> Program | None:
    if graphs.partial is None:
        return None
    readers, probes = sympy.Integer(MOST_READERS), sympy.Integer(MOST_PROBES)
    counts = {
        "rows": ACTIVE,
        "readers": readers,
        "reader_weight": readers,
        "left": plan.length,
        "probes": probes,
        "probe_weight": probes,
    }
    own = [InputSpec(name, (plan.batch, counts[name])) for name in PARTIAL_INPUTS]
    return Program(
        "partial refresh",
        graphs.partial,
        [*inputs, *own, *state],
        lowering,
        # It would move reads of the caches behind the writes, which then copy whole caches.
        {"reorder_for_locality": False},
        labels=plan.labels,
    )


def _tail(
    plan: Plan, model: fx.GraphModule, inputs: Sequence[InputSpec], lowering: str
) -> Program | None:
    if plan.tail is None:
        return None
    by_name = {node.name: node for node in model.graph.nodes}
    rows = [InputSpec(name, tuple(shape_of(by_name[name]))) for name in plan.tail.reads]
    own = [inputs[at] for at in plan.tail.inputs]
    return Program("tail", plan.tail.graph, [*own, *rows], lowering)


def model_inputs(captured: Capture) -> list[InputSpec]:
    """The inputs of the captured graph."""
    pairs = zip(captured.inputs, captured.values, strict=True)
    return [_model_input(info, value) for info, value in pairs]


def _model_input(info: InputInfo, value: Any) -> InputSpec:
    if not isinstance(value, torch.Tensor):
        return InputSpec(info.name, None, size_expression(value), source=info.source)
    shape = tuple(size_expression(size) for size in value.shape)
    return InputSpec(
        info.name, shape, static=info.is_weight, source=info.source, tensor_dict=info.tensor_dict
    )


def stacked_shape(shapes: Sequence[tuple[sympy.Expr, ...] | None]) -> tuple[sympy.Expr, ...]:
    """The shape of tensors stacked along their first axis."""
    known = [shape for shape in shapes if shape is not None]
    return (sympy.Add(*(shape[0] for shape in known)), *known[0][1:])
