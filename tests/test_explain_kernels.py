"""`explain(..., kernels=True)` compiles, runs nothing and lists what a step launches."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.runtime.dispatch import Dispatcher
from focus_compile.runtime.store import STORE
from tests.models import ModelSpec, build

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"mask_token_id": 39, "dense_layers": 0, "key_block": 4}
QUICK: dict[str, Any] = {"norm": "functional_rmsnorm", "mlp": "gelu", "hidden": 16, "layers": 3}


def ids(length: int = 16) -> torch.Tensor:
    tokens = torch.randint(1, 39, (1, length), generator=torch.Generator().manual_seed(0))
    tokens[:, length - 4 :] = 39
    return tokens


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("explain must not run a program")


@pytest.mark.slow
def test_the_launches_of_both_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = build(ModelSpec(**QUICK))
    monkeypatch.setattr(Dispatcher, "__call__", fail)
    before = STORE.nbytes
    explanation = focus_compile.explain(model, ids(), quiet=True, kernels=True, **OPTIONS)
    assert STORE.nbytes == before
    (graph,) = explanation.to_dict()["graphs"]
    assert json.loads(json.dumps(graph)) == graph
    step, refresh = graph["kernels"]["step"], graph["kernels"]["refresh"]
    names = [launch["name"] for launch in step["launches"] if launch["kind"] == "op"]
    assert sorted(names) == [
        "attention_with_lse", "capture_sinks", "select_blocks", "select_blocks",
        "sparse_attention", "sparse_attention",
    ]  # fmt: skip
    assert [x["name"] for x in refresh["launches"]].count("block_summaries") == 2
    assert step["layers"].keys() == {"sparse-suffix"}
    linear = sum(launch["kind"] == "linear" for launch in step["launches"])
    assert linear == dict(explanation.graphs[0].plan.operations)["linear"]
    text = str(explanation)
    assert f"  step: {len(step['launches'])} launches: " in text
    assert "a sparse-suffix layer: " in text
    assert "select_blocks, sparse_attention" in text


def test_what_was_compiled_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Dynamo nor a live trajectory is reset."""
    torch._dynamo.reset()
    model = build(ModelSpec(**QUICK))
    eager = OPTIONS | {"lowering": "eager"}
    focus = focus_compile.compile(model, **eager)
    tokens = ids()
    with torch.no_grad(), focus_compile.record() as history:
        focus(tokens)
        report = focus_compile.explain(model, tokens, quiet=True, kernels=True, **eager)
        tokens[0, -4] = 7
        focus(tokens)
    assert [record.program for record in history] == ["refresh", "step"]
    assert report.graphs[0].launches is None


@pytest.mark.long
@pytest.mark.slow
def test_symbolic_lengths_are_listed_too() -> None:
    torch._dynamo.reset()
    model = build(ModelSpec(**QUICK))
    focus_compile.explain(model, ids(16), quiet=True, **OPTIONS)
    report = focus_compile.explain(model, ids(20), quiet=True, kernels=True, **OPTIONS)
    (graph,) = report.to_dict()["graphs"]
    assert not graph["length"].isdigit()
    assert graph["memory"]["kv"] == 3 * 2 * 20 * 4 * report_width(report)
    assert graph["kernels"]["step"]["launches"]


def report_width(report: focus_compile.Explanation) -> int:
    """Elements of one key of one layer, over its heads."""
    site = report.graphs[0].plan.sites[0]
    return site.kv_heads * site.head_dim
