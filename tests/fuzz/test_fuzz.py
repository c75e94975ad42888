"""The fuzzer in short: cases of fixed seeds, the corpus, and proof that it can find a bug."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from focus_compile.passes.constant_masks import FoldConstantMasks
from focus_compile.passes.match_attention import MatchAttention
from focus_compile.passes.remove_no_ops import RemoveNoOps
from focus_compile.pipeline import Pipeline
from focus_compile.policies import focus_dllm
from focus_compile.program_graphs import build_programs
from focus_compile.runtime.latest_rows import LatestRows
from tests.fuzz import search as searching
from tests.fuzz.architecture import Architecture
from tests.fuzz.case import CORPUS, Case, architectures, reproduction
from tests.fuzz.judge import Verdict, judge, kind_of
from tests.fuzz.search import Search
from tests.fuzz.source import imported, made, source_of
from tests.graphs import trace
from tests.strategies import EVERYTHING, TrajectorySpec

torch.set_num_threads(1)
FIRST_SEED, ROUNDS, CASES = 7, 3, 3
DECODING = TrajectorySpec(12, (8, 5), ((1, 2), (1, 1), (2, 0)), seed=1)
SPARSE = {"policy": "focus-dllm", "dense_layers": 0, "key_block": 2, "window": 2, "expansion": 1}
CASE = Case(Architecture(layers=3), (DECODING,), SPARSE)
LEARNED = replace(CASE, architecture=Architecture(position="learned", tied=True))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_cases_of_fixed_seeds_are_equal_or_refused() -> None:
    search = Search()
    for seed in range(FIRST_SEED, FIRST_SEED + ROUNDS):
        search.round(seed, CASES)
    assert not search.wrong, json.dumps(search.to_dict()["wrong"], indent=1)
    assert search.cases == ROUNDS * CASES
    assert search.coverage["plan"] >= search.cases // 2, search.refusals
    assert search.totals["steps"] >= search.cases


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*.json")), ids=lambda file: file.stem)
def test_corpus(file: Path) -> None:
    verdict = judge(Case.from_json(file.read_text(encoding="utf-8")))
    assert verdict.outcome != "wrong", verdict.detail


def test_a_case_is_judged_against_the_oracle() -> None:
    verdict = judge(CASE)
    assert (verdict.outcome, verdict.coverage, verdict.unclear) == ("equal", "plan", 0)
    assert verdict.steps == 3


def test_flattened_heads_are_found_where_batch_and_length_change() -> None:
    second = TrajectorySpec(15, (4, 5, 6), ((1, 1, 1), (2, 1, 0)), seed=2)
    architecture = Architecture(attention="bmm", groups=2)
    verdict = judge(Case(architecture, (DECODING, second), SPARSE, None))
    assert (verdict.outcome, verdict.coverage) == ("equal", "plan")


def test_a_refused_case_has_a_reason() -> None:
    capped = Architecture(attention="softmax", score_cap=True)
    verdict = judge(replace(CASE, architecture=capped, options={**SPARSE, **EVERYTHING}))
    assert (verdict.outcome, verdict.coverage) == ("refused", "refused")
    assert "tanh" in verdict.reasons[0]


def _stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatestRows, "write", lambda *_: None)


def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = focus_dllm.windows_around
    monkeypatch.setattr(focus_dllm, "windows_around", lambda focus, _: whole(focus, 1))


@pytest.mark.parametrize(
    ("break_it", "detail"),
    [(_stale, "step differs from the oracle"), (_narrow, "rows, expected")],
    ids=["stale logits", "windows too narrow"],
)
@pytest.mark.parametrize("options", [SPARSE, {**SPARSE, **EVERYTHING}], ids=["sparse", "all"])
def test_bugs_are_found(
    monkeypatch: pytest.MonkeyPatch, break_it: Any, detail: str, options: dict[str, Any]
) -> None:
    break_it(monkeypatch)
    verdict = judge(replace(LEARNED, options=options))
    assert verdict.outcome == "wrong"
    assert detail in verdict.detail or "differs from the model" in verdict.detail


def test_an_exception_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("rows")

    monkeypatch.setattr(LatestRows, "hand_out", fail)
    verdict = judge(LEARNED)
    assert verdict.outcome == "wrong"
    assert verdict.detail.startswith("raised KeyError")


def test_failures_are_shrunk_and_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pretend(case: Case, device: str, lowering: str) -> Verdict:
        broken = case.architecture.layers > 1 and case.architecture.mlp == "swiglu"
        return Verdict("wrong", detail="off by 0.5") if broken else Verdict(coverage="plan")

    monkeypatch.setattr(searching, "judge", pretend)
    search = Search()
    for seed in range(3):
        search.round(seed, 40)
    (found,) = search.wrong
    plain = asdict(Architecture())
    changed = {k for k, v in asdict(found.case.architecture).items() if v != plain[k]}
    # A block-causal model has other options: Hypothesis cannot always shrink across that choice.
    assert changed in ({"mlp"}, {"mlp", "block_causal"})
    assert found.case.architecture.mlp == "swiglu"
    assert found.seen > 1
    assert search.outcomes["wrong"] == found.seen
    assert Case.from_json(found.write(tmp_path).read_text()) == found.case
    assert search.to_dict()["wrong"][0]["case"] == found.case.to_dict()


def test_a_case_is_printed_as_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "case.py"
    script.write_text(reproduction(LEARNED, "cpu", "eager"))
    runpy.run_path(str(script), run_name="__main__")
    assert "outcome='equal'" in capsys.readouterr().out


def test_reasons_are_counted_without_names_and_numbers() -> None:
    reason = "roll.default is not token-wise: works along the token axis [roll_1, a.py:3]. Fix it."
    assert kind_of(reason) == "roll.default is not token-wise: works along the token axis"
    assert kind_of("step differs by 0.12 (bound 7.5e-05)") == "step differs by N (bound N)"


@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(architecture=architectures())
def test_rewriting_twice_changes_nothing(architecture: Architecture) -> None:
    """Passes that ran find nothing more to do, and programs are built alike from one graph."""
    ids = torch.randint(1, 39, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"attention_mask": torch.ones_like(ids)} if architecture.padding else {}
    with imported(source_of(architecture)) as module:
        graphs = trace(made(module, 0), ids, **inputs)
    for graph in graphs:
        pipeline = graph.call.pipeline
        assert pipeline is not None
        canonical = str(pipeline.gm.graph)
        again = Pipeline(pipeline.gm)
        for graph_pass in (RemoveNoOps(), MatchAttention(), FoldConstantMasks()):
            assert again.run(graph_pass) == 0, graph_pass.name
        assert str(pipeline.gm.graph) == canonical
        if graph.reason:
            continue
        first, second = (build_programs(pipeline, graph.plan) for _ in range(2))
        assert str(first.step.graph) == str(second.step.graph)
        assert str(first.refresh.graph) == str(second.refresh.graph)
        assert str(pipeline.gm.graph) == canonical
