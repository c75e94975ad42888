"""`focus_compile.explain` shows the plan, or every refusal with reason and remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.errors import OptionError
from focus_compile.lowering.program import Program
from focus_compile.runtime.latest_rows import MOST_COPIES
from focus_compile.runtime.store import STORE
from tests.compiled import run_call
from tests.models import ModelSpec, build

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"mask_token_id": 39, "dense_layers": 0}
QUICK: dict[str, Any] = {"norm": "functional_rmsnorm", "mlp": "gelu", "hidden": 16}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("explain must not compile")

    torch._dynamo.reset()
    monkeypatch.setattr(Program, "_compile", fail)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)


def ids() -> torch.Tensor:
    return torch.randint(1, 39, (2, 9), generator=torch.Generator().manual_seed(0))


def masked_ids() -> torch.Tensor:
    """The response starts at 5 in one sequence and at 6 in the other."""
    tokens = ids()
    tokens[0, 5:], tokens[1, 6:] = 39, 39
    return tokens


def test_an_accepted_plan_is_returned_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = build(ModelSpec(**QUICK))
    explanation = focus_compile.explain(model, ids(), **OPTIONS)
    assert explanation.accepted
    printed = capsys.readouterr().out
    assert printed == f"{explanation}\n"
    assert printed.startswith("focus_compile: 1 graph(s), policy focus-dllm\n")
    assert "layer  0 sink-capture" in printed
    known = explanation.to_dict()
    assert json.loads(json.dumps(known)) == known
    (graph,) = known["graphs"]
    assert known["accepted"]
    assert graph["accepted"]
    assert [site["spelling"] for site in graph["sites"]] == ["sdpa", "sdpa"]
    assert graph["regions"]["sparse-suffix"] == [1]
    assert graph["gathered"]
    assert known["options"]["mask_token_id"] == 39


@pytest.mark.parametrize(
    ("spec", "reason", "remedy"),
    [
        (ModelSpec(mixer="roll", **QUICK), "roll.default is not token-wise", ""),
        (ModelSpec(causal="is_causal", **QUICK), "causal attention", "bidirectional"),
        (ModelSpec(attention="softcap", **QUICK), "no attention was recognised", "tanh"),
    ],
    ids=["mixer", "causal", "softcap"],
)
def test_a_refusal_has_its_reason_and_remedy(
    spec: ModelSpec, reason: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    explanation = focus_compile.explain(build(spec), ids(), **OPTIONS)
    assert not explanation.accepted
    (graph,) = explanation.to_dict()["graphs"]
    (refusal,) = graph["refusals"]
    assert refusal["reason"].startswith(reason)
    assert remedy in refusal["remedy"]
    assert "plan: exact program (refused)" in capsys.readouterr().out


@pytest.mark.parametrize("logits", ["all", "response"])
def test_the_memory_of_a_trajectory_is_what_it_takes(
    logits: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model, tokens = build(ModelSpec(**QUICK)), masked_ids()
    options = OPTIONS | {"logits": logits, "window": 2, "key_block": 2, "lowering": "eager"}
    explanation = focus_compile.explain(model, tokens, **options)
    (graph,) = explanation.to_dict()["graphs"]
    memory = graph["memory"]
    first_row = 0 if logits == "all" else 3
    row = 2 * graph["vocabulary"] * 4
    assert memory["logits"] == row * (9 - first_row + MOST_COPIES * 9)
    assert memory["saved_by_response"] == row * 3
    assert memory["total"] == sum(memory[part] for part in ("kv", "summaries", "logits", "weights"))
    verb = "would save" if logits == "all" else "saves"
    assert f'; logits="response" {verb} {row * 3 / 1024:.1f} KiB' in capsys.readouterr().out
    run_call(focus_compile.compile(model, **options), tokens)
    trajectory = STORE.slot(next(model.parameters())).trajectory
    assert trajectory is not None
    assert sum(cache.nbytes for cache in trajectory.caches) == memory["kv"] + memory["summaries"]
    assert trajectory.outputs[0].master.nbytes == row * (9 - first_row)


def test_without_masks_no_response_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    model = build(ModelSpec(**QUICK))
    explanation = focus_compile.explain(model, ids(), logits="response", **OPTIONS)
    (graph,) = explanation.to_dict()["graphs"]
    assert graph["memory"]["saved_by_response"] is None
    assert "no mask in the ids: logits of all rows" in capsys.readouterr().out


def test_the_exact_policy_keeps_nothing() -> None:
    model = build(ModelSpec(**QUICK))
    explanation = focus_compile.explain(model, ids(), quiet=True, policy="exact", **OPTIONS)
    assert "memory" not in explanation.to_dict()["graphs"][0]


def test_without_a_mask_id_the_refusal_says_how_to_give_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    explanation = focus_compile.explain(build(ModelSpec(**QUICK)), ids())
    assert not explanation.accepted
    assert "no mask_token_id is known" in capsys.readouterr().out
    assert json.dumps(explanation.to_dict())


def test_every_graph_of_a_broken_forward_is_explained() -> None:
    model = build(ModelSpec(mixer="gru", **QUICK))
    explanation = focus_compile.explain(model, ids(), quiet=True, **OPTIONS)
    assert len(explanation.graphs) > 1
    assert not explanation.accepted
    assert json.dumps(explanation.to_dict())


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert focus_compile.explain(build(ModelSpec(**QUICK)), ids(), quiet=True, **OPTIONS).accepted
    assert capsys.readouterr().out == ""


def test_a_compiled_model_is_explained_too() -> None:
    model = build(ModelSpec(**QUICK))
    focus = focus_compile.compile(model, **OPTIONS)
    assert focus_compile.explain(focus, ids(), quiet=True, **OPTIONS).accepted
    plain = torch.compile(model)
    assert focus_compile.explain(plain, ids(), quiet=True, **OPTIONS).accepted


def test_the_model_is_left_as_it_was() -> None:
    model = build(ModelSpec(**QUICK))
    with torch.no_grad():
        before = model(ids()).logits
    focus_compile.explain(model, ids(), quiet=True, **OPTIONS)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_misspelt_options_are_errors() -> None:
    with pytest.raises(OptionError, match="did you mean 'keep_ratio'"):
        focus_compile.explain(build(ModelSpec(**QUICK)), ids(), keep_ration=0.5)
