"""What the backend makes of a model, graph by graph, without running it as a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from focus_compile.backend import BackendCall, trace_past_logging
from focus_compile.capture import Capture, capture
from focus_compile.config import FocusConfig
from focus_compile.plan import Plan
from focus_compile.program_graphs import build_programs
from focus_compile.runtime.buckets import bucket_for, pack_rows
from focus_compile.runtime.programs import Programs

__all__ = ["TracedGraph", "aten_graph", "op_names", "rows_alone", "trace"]


@dataclass
class TracedGraph:
    """One graph that Dynamo made, what became of it, and what it was called with."""

    call: BackendCall
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        assert self.call.plan is not None, self.call.refusals
        return self.call.plan

    @property
    def reason(self) -> str:
        """Every refusal in one string; empty if the plan was accepted."""
        return "; ".join(map(str, self.call.refusals))

    def programs(self) -> Programs:
        """The programs of an accepted plan, to be run op by op."""
        assert not self.call.refusals, self.reason
        assert self.call.pipeline is not None
        assert self.call.captured is not None
        graphs = build_programs(self.call.pipeline, self.plan)
        return Programs.build(self.call.captured, graphs, self.plan, self.call.config)


def trace(
    model: Callable[..., Any],
    *calls: Tensor,
    dynamic_length: bool = False,
    options: dict[str, Any] | None = None,
    **inputs: Any,
) -> list[TracedGraph]:
    """Call `model` with each ids [B, T] in turn; every graph that Dynamo makes is analysed.

    dynamic_length: T is a symbol, so that calls of other lengths share the graph.
    """
    torch._dynamo.reset()
    trace_past_logging()
    chosen = {"mask_token_id": 39, "lowering": "eager", "key_block": 2} | (options or {})
    config = FocusConfig.from_options(chosen)
    graphs: list[TracedGraph] = []

    def collect(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        original = fx.GraphModule(gm, gm.graph)
        graph = TracedGraph(BackendCall(gm, examples, config))
        graphs.append(graph)

        def run(*args: Any) -> Any:
            graph.calls.append(args)
            return original(*args)

        return run

    focus = torch.compile(model, backend=collect)
    with torch.no_grad():
        for ids in calls:
            if dynamic_length:
                for tensor in (ids, *inputs.values()):
                    torch._dynamo.mark_dynamic(tensor, 1)
            focus(ids, **inputs)
    return graphs


def rows_alone(programs: Programs, args: Sequence[Any], active: Tensor) -> list[tuple[Any, Any]]:
    """Rows computed alone, over K/V that a refresh just wrote and with every key kept.

    active: bool [B, T]. Returns (rows, what dense has there), both [B, rows, ...], per output.
    """
    state = programs.allocate(args)
    with torch.no_grad():
        dense = programs.exact(*args)
        batch, length = active.shape
        programs.refresh(*args, torch.arange(length).repeat(batch, 1), *state)
        largest = int(active.sum(1).max())
        packed = pack_rows(active, active, bucket_for(largest, None, length, "cpu"))
        blocks = torch.full((batch,), length // programs.plan.key_block)
        alone = programs.run_step(args, packed, blocks, blocks, [*state, *programs.merge(args, [])])
    sequences = torch.arange(batch)[:, None]
    return [(a, d[sequences, packed.rows]) for a, d in zip(alone, dense, strict=False)]


def aten_graph(
    function: Callable[..., Any], *examples: Any, dynamic: bool = False
) -> tuple[Capture, tuple[Any, ...]]:
    """`function` in the canonical form, passes not yet run, and the inputs of its graph."""
    torch._dynamo.reset()
    found: list[tuple[Capture, tuple[Any, ...]]] = []

    def collect(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(gm, inputs)

        def run(*args: Any) -> Any:
            found.append((captured, args))
            return captured.original(*args)

        return run

    with torch.no_grad():
        torch.compile(function, backend=collect, fullgraph=True, dynamic=dynamic)(*examples)
    (only,) = found
    return only


def op_names(gm: fx.GraphModule) -> list[str]:
    """The ops of a graph in order, `aten.` left out."""
    return [
        str(node.target).removeprefix("aten.")
        for node in gm.graph.nodes
        if node.op == "call_function"
    ]
