"""The graphs of a plan's programs, before they are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from focus_compile.passes.graph_tools import shape_of
from focus_compile.passes.merge_projections import MergedWeights, MergeProjections
from focus_compile.passes.partial_refresh import BuildPartialRefresh
from focus_compile.passes.refresh_program import BuildRefresh
from focus_compile.passes.row_builder import kept_lists
from focus_compile.passes.sharded_refresh import BuildShardedRefresh
from focus_compile.passes.sharded_step import BuildShardedStep
from focus_compile.passes.step_program import BuildStep
from focus_compile.plan import Plan

if TYPE_CHECKING:
    from focus_compile.pipeline import Pipeline

__all__ = ["ProgramGraphs", "build_programs", "require_buildable", "weight_rows"]


@dataclass
class ProgramGraphs:
    """The graphs made from one capture."""

    refresh: fx.GraphModule
    step: fx.GraphModule
    partial: fx.GraphModule | None = None
    """Where the plan has a partial refresh."""
    again: fx.GraphModule | None = None
    """A step that reads the keys chosen by an earlier one, where the plan has such."""
    merged: tuple[MergedWeights, ...] = ()
    """What the step's inputs after its state hold."""


def build_programs(pipeline: Pipeline, plan: Plan) -> ProgramGraphs:
    """The refresh and step graphs of an accepted plan."""
    refresh = _refresh_of(plan, pipeline.gm)
    step = _step_of(plan, pipeline.gm)
    pipeline.dump("refresh", refresh)
    pipeline.dump("step", step)
    again = _step_of(plan, pipeline.gm, choose=False) if kept_lists(plan) else None
    if again is not None:
        pipeline.dump("step-again", again)
    merged: tuple[MergedWeights, ...] = ()
    if plan.merge_projections:
        merging = MergeProjections(weight_rows(pipeline.gm, plan))
        merged = merging.apply(step)
        pipeline.dump(MergeProjections.name, step)
        if again is not None:
            merged_again = merging.apply(again)
            assert merged_again == merged
    partial = None
    if plan.partial_refresh:
        partial = BuildPartialRefresh(plan).apply(pipeline.gm)
        pipeline.dump("partial-refresh", partial)
    return ProgramGraphs(refresh, step, partial, again, merged)


def _refresh_of(plan: Plan, gm: fx.GraphModule) -> fx.GraphModule:
    return (BuildRefresh if plan.shards is None else BuildShardedRefresh)(plan).apply(gm)


def _step_of(plan: Plan, gm: fx.GraphModule, choose: bool = True) -> fx.GraphModule:
    return (BuildStep if plan.shards is None else BuildShardedStep)(plan, choose).apply(gm)


def weight_rows(gm: fx.GraphModule, plan: Plan) -> dict[str, int]:
    """Length of the first axis of the weights, by the name of their placeholder."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = [placeholders[at] for at in plan.positions("weight")]
    shapes = [(node.name, shape_of(node)) for node in weights]
    return {name: int(shape[0]) for name, shape in shapes if shape and shape[0].is_Integer}


def require_buildable(plan: Plan, gm: fx.GraphModule) -> None:
    """Raise PassError where a program of the plan cannot be built."""
    _refresh_of(plan, gm)
    _step_of(plan, gm)
    if plan.partial_refresh:
        BuildPartialRefresh(plan).apply(gm)
