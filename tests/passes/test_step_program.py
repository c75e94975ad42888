"""The step graph: what it takes, what it computes at the active rows, what it leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from focus_compile.errors import PassError
from focus_compile.passes.refresh_program import REFRESH_INPUTS, BuildRefresh
from focus_compile.passes.row_builder import cache_names
from focus_compile.passes.step_program import STEP_INPUTS, BuildStep
from focus_compile.plan import Plan
from tests.graphs import TracedGraph, op_names, trace
from tests.models import ModelSpec, build

torch.set_num_threads(1)
SITE_OPS = (
    *("attention", "attention_with_lse", "sparse_attention", "select_blocks", "capture_sinks"),
    "block_summaries",
)


def traced(layers: int = 4, batch: int = 2, dynamic: bool = False, **options: Any) -> TracedGraph:
    spec = ModelSpec(norm="functional_rmsnorm", mlp="gelu", hidden=16, layers=layers)
    ids = torch.randint(1, 39, (batch, 11))
    (graph,) = trace(build(spec), ids, dynamic_length=dynamic, options=options)
    assert not graph.reason
    return graph


def built(graph: TracedGraph, plan: Plan | None = None) -> tuple[Any, Any]:
    """(refresh, step) graphs of the plan."""
    assert graph.call.pipeline is not None
    gm = graph.call.pipeline.gm
    chosen = plan or graph.plan
    return BuildRefresh(chosen).apply(gm), BuildStep(chosen).apply(gm)


def count(gm: Any) -> dict[str, int]:
    """How often each op of ours occurs."""
    names = op_names(gm)
    return {op: names.count(f"focus_compile.{op}.default") for op in SITE_OPS}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dense_layers": 1}, (1, 1, 2, 2, 1, 2)),
        ({"dense_layers": 0, "dense_tail_layers": 1}, (1, 1, 2, 2, 1, 2)),
        ({"dense_layers": 0}, (0, 1, 3, 3, 1, 3)),
        ({"dense_layers": 3}, (4, 0, 0, 0, 0, 0)),
        ({"policy": "dual-cache"}, (4, 0, 0, 0, 0, 0)),
    ],
    ids=str,
)
def test_each_region_has_its_ops(options: dict[str, Any], expected: tuple[int, ...]) -> None:
    graph = traced(**options)
    refresh, step = built(graph)
    assert count(step) == dict(zip(SITE_OPS, (*expected[:5], 0), strict=True))
    assert count(refresh) == dict(zip(SITE_OPS, (4, 0, 0, 0, 0, expected[5]), strict=True))


def test_inputs_are_the_models_then_the_steps_then_the_state() -> None:
    graph = traced(dense_layers=1)
    refresh, step = built(graph)
    model = [n.name for n in graph.call.pipeline.gm.graph.find_nodes(op="placeholder")]
    names = [n.name for n in step.graph.find_nodes(op="placeholder")]
    state = cache_names(graph.plan)
    assert names == [*model, *STEP_INPUTS, *state]
    names = [n.name for n in refresh.graph.find_nodes(op="placeholder")]
    assert names == [*model, *REFRESH_INPUTS, *state]
    assert state[:2] == ["key_cache_0", "value_cache_0"]
    assert state[-2:] == ["summaries_2", "summaries_3"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_of_hidden_states_is_computed_in_full(batch: int, dynamic: bool) -> None:
    """Every linear layer of the step sees the active rows, never all tokens."""
    graph = traced(layers=2, batch=batch, dynamic=dynamic)
    rows = {row.node for row in graph.plan.rows}
    gathered = set(graph.plan.to_dict()["gathered"])
    linear = [
        n.name
        for n in graph.call.pipeline.gm.graph.nodes
        if str(n.target) in ("aten.linear.default", "aten.embedding.default")
    ]
    assert set(linear) <= rows
    assert not rows & gathered
    _, step = built(graph)
    assert op_names(step).count("linear.default") == op_names(graph.call.pipeline.gm).count(
        "linear.default"
    )


def test_the_step_writes_its_rows_before_it_attends() -> None:
    _, step = built(traced(layers=2, dense_layers=0))
    order = [
        name.split(".")[-2].removeprefix("focus_compile.")
        for name in op_names(step)
        if "index_put_" in name or "attention" in name or "capture_sinks" in name
    ]
    assert order == [
        *("index_put_", "index_put_", "attention_with_lse", "capture_sinks"),
        *("index_put_", "index_put_", "sparse_attention"),
    ]


def test_a_refresh_of_the_response_leaves_the_last_layer_early() -> None:
    """All rows make keys and values; attention, MLP and head of the last layer see some rows."""
    graph = traced(layers=2, dense_layers=0)
    everything, _ = built(graph)
    response, _ = built(graph, replace(graph.plan, logits_rows="response"))
    assert count(everything) == count(response)
    (last,) = [n for n in response.graph.nodes if n.name == "attention_default_1"]
    query, key = last.args[:2]
    assert "copy_" in str(key.target)
    gathers = op_names(response).count("index.Tensor")
    assert gathers > op_names(everything).count("index.Tensor")
    assert query in last.all_input_nodes


def test_a_row_that_cannot_be_selected_is_an_error_with_its_name() -> None:
    graph = traced(layers=2)
    row = next(
        r for r in graph.plan.rows if any(o.use == "gather" and o.rank == 4 for o in r.operands)
    )
    wrong = tuple(
        replace(o, axes=replace(o.axes, token=replace(o.axes.token, axis=o.rank - 1)))
        if o.use == "gather" and o.axes is not None
        else o
        for o in row.operands
    )
    rows = tuple(replace(r, operands=wrong) if r is row else r for r in graph.plan.rows)
    name = next(o.node for o in wrong if o.use == "gather")
    with pytest.raises(PassError, match=f"cannot select rows of {name}"):
        built(graph, replace(graph.plan, rows=rows))
