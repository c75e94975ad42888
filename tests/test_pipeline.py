"""The pipeline on whole models: stages keep the outputs, are idempotent and are written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import fx

from focus_compile.passes.constant_masks import FoldConstantMasks
from focus_compile.passes.match_attention import MatchAttention
from focus_compile.passes.remove_no_ops import RemoveNoOps
from focus_compile.pipeline import DUMP, VERIFY, Pipeline
from focus_compile.plan import Refusal
from focus_compile.program_graphs import build_programs
from tests.graphs import TracedGraph, trace
from tests.models import ModelSpec, build
from tests.strategies import model_specs, seeds

torch.set_num_threads(1)
QUICK: dict[str, Any] = {"norm": "functional_rmsnorm", "mlp": "gelu", "hidden": 16}
property_test = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def traced(spec: ModelSpec, seed: int = 0, **options: Any) -> TracedGraph:
    ids = torch.randint(1, 39, (2, 9), generator=torch.Generator().manual_seed(seed))
    inputs = {"attention_mask": torch.ones(2, 9, dtype=torch.long)} if spec.padding else {}
    (graph,) = trace(build(spec, seed), ids, options=options, **inputs)
    return graph


def without_names(graph: fx.Graph) -> str:
    return "\n".join(str(n.target) for n in graph.nodes)


@property_test
@given(model_specs(), seeds())
def test_every_pass_keeps_the_outputs_and_finishes_at_once(spec: ModelSpec, seed: int) -> None:
    """Level 2 executes before and after each pass; a second run rewrites nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VERIFY, "2")
        graph = traced(spec, seed)
        assert not graph.reason
        assert len(graph.plan.sites) == spec.layers
        assert graph.call.pipeline is not None
        gm = graph.call.pipeline.gm
        before = without_names(gm.graph)
        again = Pipeline(gm)
        for graph_pass in (RemoveNoOps(), MatchAttention(), FoldConstantMasks()):
            assert again.run(graph_pass) == 0, graph_pass.name
        assert without_names(gm.graph) == before


def test_exact_counts_and_one_file_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DUMP, str(tmp_path))
    graph = traced(ModelSpec(**QUICK, attention="matmul", padding=True))
    assert graph.call.pipeline is not None
    (folder,) = tmp_path.iterdir()
    stages = ["captured", "remove-no-ops", "match-attention", "fold-constant-masks"]
    programs = ["refresh", "step"]
    if getattr(graph.call, "graphs", None) is None:
        build_programs(graph.call.pipeline, graph.plan)
    expected = [f"{i:02}_{stage}.txt" for i, stage in enumerate([*stages, *programs])]
    assert sorted(p.name for p in folder.iterdir()) == [*expected, "plan.json"]
    heads = [(folder / name).read_text().splitlines()[0] for name in expected]
    rewrites = [head.split(" in ")[0] for head in heads[1:4]]
    assert rewrites == [
        "# remove-no-ops 15 rewrites",
        "# match-attention 2 rewrites",
        "# fold-constant-masks 0 rewrites",
    ]
    assert "focus_compile.attention" not in (folder / expected[1]).read_text()
    assert (folder / expected[2]).read_text().count("focus_compile.attention.default") == 2
    assert json.loads((folder / "plan.json").read_text()) == graph.plan.to_dict()


def test_graphs_do_not_overwrite_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DUMP, str(tmp_path))
    for _ in range(2):
        traced(ModelSpec(**QUICK, mixer="roll"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph_0", "graph_1"]
    plans = [json.loads((p / "plan.json").read_text()) for p in tmp_path.iterdir()]
    assert not any(plan["accepted"] for plan in plans)


GOLDEN = """\
plan: 4 attention sites, [2, 9] ids
  layer  0 dense-prefix  sdpa, 4/2 heads of 8
  layer  1 sink-capture  sdpa, 4/2 heads of 8
  layer  2 sparse-suffix sdpa, 4/2 heads of 8
  layer  3 dense-tail    sdpa, 4/2 heads of 8
  row-wise: 84 ops (add 9, attention 4, embedding 1, gelu 4, linear 25, reshape 16, \
rms_norm 9, transpose 16)
  computed in full, rows selected: arg1_1, embedding_1
  trajectory guard: ids, weights"""


def test_a_plan_prints_as_it_reads() -> None:
    spec = ModelSpec(**QUICK, layers=4, position="learned")
    graph = traced(spec, dense_layers=1, dense_tail_layers=1)
    assert str(graph.plan) == GOLDEN


def test_a_plan_is_json_and_complete() -> None:
    plan = traced(ModelSpec(**QUICK, layers=4, padding=True), dense_layers=1).plan
    known = plan.to_dict()
    assert json.loads(json.dumps(known)) == known
    assert known["accepted"] is True
    assert known["refusals"] == []
    assert (known["batch"], known["length"], known["vocabulary"]) == ("2", "9", 40)
    assert known["regions"] == {
        "dense-prefix": [0],
        "sink-capture": [1],
        "sparse-suffix": [2, 3],
        "dense-tail": [],
    }
    assert [i["role"] for i in known["inputs"]] == ["ids", "guarded"]
    assert known["weights"] > 10
    site = known["sites"][0]
    assert (site["heads"], site["kv_heads"], site["head_dim"]) == (4, 2, 8)
    assert site["masked"] is True
    assert "attention.py:" in site["where"]
    assert known["row_operations"]["attention"] == 4
    assert known["operands"]["rows"] > known["operands"]["gather"] > 0
    assert known["outputs"][0]["axes"] == "tokens@1 batch@0"


def test_a_refused_plan_prints_reason_place_and_remedy() -> None:
    plan = traced(ModelSpec(**QUICK, causal="is_causal")).plan
    first, second = str(plan).splitlines()[:2]
    assert first == "plan: exact program (refused)"
    assert second.startswith("  refused: causal attention [")
    assert "attention.py:" in second
    assert second.endswith('(policy="focus-evict").')
    assert plan.to_dict()["accepted"] is False


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (Refusal("why"), "why."),
        (Refusal("why", "here"), "why [here]."),
        (Refusal("why", "here", "Do this."), "why [here]. Do this."),
    ],
)
def test_refusals_read_as_sentences(refusal: Refusal, text: str) -> None:
    assert str(refusal) == text
    assert set(refusal.to_dict()) == {"reason", "where", "remedy"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mask_token_id": 40}, "mask_token_id=40 is outside the 40 embeddings"),
        ({"mask_token_id": None}, "no mask_token_id is known"),
    ],
)
def test_impossible_options_are_refused_with_a_remedy(options: dict[str, Any], why: str) -> None:
    graph = traced(ModelSpec(**QUICK), **options)
    (refusal,) = graph.call.refusals
    assert refusal.reason == why
    assert refusal.remedy


def test_one_token_is_refused() -> None:
    (graph,) = trace(build(ModelSpec(**QUICK)), torch.tensor([[5], [6]]))
    assert graph.reason.startswith("the input has fewer than 2 tokens")
