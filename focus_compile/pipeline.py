"""The pipeline, top to bottom: passes over the captured graph, then the analysis that plans."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from torch import fx

from focus_compile.analysis import plan_of
from focus_compile.capture import Capture
from focus_compile.config import VERIFY, FocusConfig, verify_level
from focus_compile.passes.collectives import NormalizeCollectives
from focus_compile.passes.constant_masks import FoldConstantMasks
from focus_compile.passes.match_attention import MatchAttention
from focus_compile.passes.remove_no_ops import RemoveNoOps
from focus_compile.plan import Plan
from focus_compile.torch_tools import trace_artifact
from focus_compile.verify import execute_on_random_inputs, same_results, verify

__all__ = ["DUMP", "VERIFY", "Pipeline", "plan_graph"]

DUMP = "FOCUS_COMPILE_DUMP"
"""Folder that receives the graph after every stage, and the plan."""

GraphPass = RemoveNoOps | NormalizeCollectives | MatchAttention | FoldConstantMasks


class Pipeline:
    """Runs stages, verifies each and dumps it if asked."""

    def __init__(self, gm: fx.GraphModule, name: str = "graph") -> None:
        self.gm = gm
        self.level = verify_level(os.environ)
        self.folder = _new_folder(os.environ.get(DUMP), name)
        self.stage = 0
        self.inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        self.dump("captured", gm)

    def run(self, graph_pass: GraphPass) -> int:
        """Apply one pass in place; returns its number of rewrites."""
        before = execute_on_random_inputs(self.gm) if self.level >= 2 else ()
        started = time.perf_counter()
        rewrites = graph_pass.apply(self.gm)
        elapsed = (time.perf_counter() - started) * 1e3
        if self.level >= 1:
            verify(self.gm, self.inputs, graph_pass.name)
        if self.level >= 2:
            same_results(before, execute_on_random_inputs(self.gm), graph_pass.name)
        self.dump(graph_pass.name, self.gm, f"{rewrites} rewrites in {elapsed:.1f} ms")
        return rewrites

    def dump(self, stage: str, gm: fx.GraphModule, note: str = "") -> None:
        """Into the folder and into torch's trace, where these are asked for."""

        def text() -> str:
            return f"# {stage} {note}\n{gm.graph}\n"

        name = f"{self.stage:02}_{stage}"
        trace_artifact(name, text)
        if self.folder is not None:
            (self.folder / f"{name}.txt").write_text(text())
        self.stage += 1

    def dump_plan(self, plan: Plan) -> None:
        if self.folder is not None:
            (self.folder / "plan.json").write_text(json.dumps(plan.to_dict(), indent=2))


def _new_folder(root: str | None, name: str) -> Path | None:
    """A folder of its own for each graph, so that graphs do not overwrite one another."""
    if not root:
        return None
    number = 0
    while (folder := Path(root) / f"{name}_{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


def plan_graph(captured: Capture, config: FocusConfig) -> tuple[Pipeline, Plan]:
    """Canonicalise the captured graph in place and plan its incremental form.

    A plan with refusals means: run exactly.
    """
    pipeline = Pipeline(captured.graph_module)
    matching, folding = MatchAttention(), FoldConstantMasks(captured.buffers())
    passes: list[GraphPass] = [RemoveNoOps(), matching, folding]
    if captured.local is not None:
        passes.insert(1, NormalizeCollectives())
    for graph_pass in passes:
        pipeline.run(graph_pass)
    plan = plan_of(captured, pipeline.gm, config, matching, folding, pipeline.dump)
    pipeline.dump_plan(plan)
    return pipeline, plan
