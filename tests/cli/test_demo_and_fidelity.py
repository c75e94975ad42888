"""`demo` and `fidelity`: their options, results files, and bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from focus_compile.cli import app
from focus_compile.demo import evict_fidelity, evict_showcase, fidelity, showcase

runner = CliRunner()


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def run(settings: showcase.ShowcaseSettings, console: Console) -> showcase.ShowcaseResult:
        seen.append(settings)
        dense = showcase.ArmResult(3, 3, 10.0, 20.0, 32, 6144)
        focus = showcase.ArmResult(3, 3, 0.8, 30.0, 32, 1024)
        return showcase.ShowcaseResult(dense, focus, same_answers=True, settings={"length": 192})

    monkeypatch.setattr(showcase, "run", run)
    file = tmp_path / "demo.json"
    options = (
        "demo --length 192 --gen-length 32 --block-length 16 --questions 3 --kind table --seed 1 "
        "--policy dual-cache --keep-ratio 0.25"
    )
    result = runner.invoke(app, [*options.split(), "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert seen == [
        showcase.ShowcaseSettings(
            length=192,
            gen_length=32,
            block_length=16,
            questions=3,
            kind="table",
            seed=1,
            policy="dual-cache",
            keep_ratio=0.25,
        )
    ]
    assert "the same answers as dense, 12.5 times as fast" in result.output
    assert json.loads(file.read_text())["focus"]["rows"] == 1024


def test_fidelity_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def run(settings: fidelity.FidelitySettings, advance: Any) -> Iterator[fidelity.FidelityResult]:
        seen.append(settings)
        scores = {
            kind: fidelity.Score(3, 4, 0.75, *[None] * 4, 1.0) for kind in ("needle", "table")
        }
        done: dict[str, Any] = {}
        for arm in fidelity.arms(settings):
            advance(arm.name, 2 * settings.examples)
            done = done | {arm.name: scores}
            yield fidelity.FidelityResult(
                done, dict.fromkeys(done), {"length": 300, "refresh": "block"}
            )
            assert len(json.loads(file.read_text())["arms"]) == len(done)

    monkeypatch.setattr(fidelity, "run", run)
    file = tmp_path / "fidelity.json"
    options = "fidelity --length 300 --examples 2 --batch 4 --seed 7 --questions 3"
    result = runner.invoke(app, [*options.split(), "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert seen == [fidelity.FidelitySettings(length=300, examples=2, batch=4, seed=7, questions=3)]
    assert "focus α=0.1, no sinks: 4 answers" in result.output
    assert json.loads(file.read_text())["arms"][0]["needle"]["right"] == 3


def test_demo_of_eviction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def run(
        settings: evict_showcase.EvictShowcaseSettings, console: Console
    ) -> evict_showcase.EvictShowcaseResult:
        seen.append(settings)
        arms = {
            arm.name: evict_showcase.EvictArmResult(12, 12, 33, 16.0, rows, rows, 1.0, 9.0, 5.0)
            for arm, rows in zip(settings.arms(), (16.0, 12.0, 4.0), strict=True)
        }
        return evict_showcase.EvictShowcaseResult(arms, same_answers=True, settings={})

    monkeypatch.setattr(evict_showcase, "run", run)
    file = tmp_path / "demo.json"
    result = runner.invoke(app, ["demo", "--policy", "focus-evict", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "the same answers, 4.0 times fewer rows" in result.output
    options = "--length 512 --batch 2 --alpha 2 --threshold 0.9 --kind table --questions 3 --seed 1"
    result = runner.invoke(app, ["demo", "--policy", "focus-evict", *options.split()])
    assert result.exit_code == 0, result.output
    assert seen == [
        evict_showcase.EvictShowcaseSettings(threshold=1.0),
        evict_showcase.EvictShowcaseSettings(
            length=512,
            batch=2,
            alpha=2.0,
            tokens_per_step=None,
            threshold=0.9,
            kind="table",
            questions=3,
            seed=1,
        ),
    ]
    assert json.loads(file.read_text())["arms"]["focus-evict"]["kept_rows_per_token"] == 4


def test_demo_of_eviction_with_sparse_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(
        settings: evict_showcase.EvictShowcaseSettings, console: Console
    ) -> evict_showcase.EvictShowcaseResult:
        assert [arm.keep_ratio for arm in settings.arms()] == [0.5, 0.5, 0.5, 0.25]
        arms = {
            arm.name: evict_showcase.EvictArmResult(12, 12, 33, 16.0, 8.0, 8.0, 1.0, 9.0, 5.0)
            for arm in settings.arms()
        }
        return evict_showcase.EvictShowcaseResult(arms, same_answers=True, settings={})

    monkeypatch.setattr(evict_showcase, "run", run)
    options = ["--policy", "focus-dllm+evict", "--keep-ratio", "0.25"]
    result = runner.invoke(app, ["demo", *options])
    assert result.exit_code == 0, result.output
    assert "focus-dllm+evict: the same answers" in result.output


def test_fidelity_of_eviction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    score = evict_fidelity.EvictScore(3, 4, 0.75, 1.0, 1.0, 9, 2.0, 1.0, 1.0, 1.0)

    def run(settings: Any, advance: Any) -> Iterator[evict_fidelity.EvictFidelityResult]:
        seen.append(settings)
        arms = evict_fidelity.arms(settings)
        found: dict[str, Any] = {}
        for arm in arms:
            advance(arm.name, 2 * settings.examples)
            found = found | {arm.name: dict.fromkeys(("needle", "table"), score)}
            yield evict_fidelity.EvictFidelityResult(
                {"1 a step": found},
                {},
                {arm.name: arm.options() for arm in arms},
                {"length": 320},
            )

    monkeypatch.setattr(evict_fidelity, "run", run)
    file = tmp_path / "fidelity.json"
    options = "--length 320 --examples 2 --tokens-per-step 1 --threshold .99 --alpha 2"
    result = runner.invoke(
        app, ["fidelity", "--policy", "focus-evict", *options.split(), "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert seen == [
        evict_fidelity.EvictFidelitySettings(
            length=320, examples=2, tokens_per_step=(1,), threshold=0.99, alpha=2.0
        )
    ]
    assert "random α=2: 4 answers" in result.output
    result = runner.invoke(app, ["fidelity", "--policy", "focus-dllm+evict", "--examples", "1"])
    assert result.exit_code == 0, result.output
    assert seen[1].keep_ratios == (0.5, 0.25, 0.1)
    assert "focus-dllm+evict keys=0.25: 2 answers" in result.output
    assert json.loads(file.read_text())["rules"]["1 a step"][0]["needle"]["right"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --policy focus-evict --block-length 16", "block_length=16"),
        ("demo --policy focus-evict --length 1000", "length=1000"),
        ("fidelity --policy focus-evict --threshold 2", "threshold=2.0"),
        ("fidelity --policy focus-evic", "did you mean 'focus-evict'"),
        ("demo --policy focus-dlm", "did you mean 'focus-dllm'"),
        ("demo --kind tabel", "did you mean 'table'"),
        ("demo --keep-ratio 2", "keep_ratio=2.0"),
        ("demo --length 90", "90 tokens cannot hold 4 facts"),
        ("demo --gen-length 48", "gen_length=48 is not a multiple of block_length=32"),
        ("demo --json no/such/folder/x.json", "not a file in an existing folder"),
        ("fidelity --gen-length 48", "gen_length=48"),
        ("fidelity --lowering eagre", "did you mean 'eager'"),
        ("fidelity --length 90 --examples 1", "90 tokens cannot hold 4 facts"),
    ],
)
def test_errors_are_one_line(arguments: str, message: str) -> None:
    result = runner.invoke(app, arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
