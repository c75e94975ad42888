"""The suite end to end on the CPU, what it refuses to report, and what it renders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import report, run
from benchmarks.suite import checks, results, runner
from benchmarks.suite.ceilings import Ceilings
from benchmarks.suite.cellbook import CellBook
from benchmarks.suite.cells import arms_of, groups_of
from benchmarks.suite.checks import Refused, check_floor, check_measurement
from benchmarks.suite.floors import full_pass_floor, keys_read, step_floor
from benchmarks.suite.loop import Call, Ran
from benchmarks.suite.measure import Measurement
from benchmarks.suite.peers.compiled import Compiled
from benchmarks.suite.policy import FocusSettings
from benchmarks.suite.shapes import SHAPES
from benchmarks.suite.tables import document

COMMAND = [
    *("--suite", "cpu", "--device", "cpu", "--models", "tiny", "--lowering", "eager"),
    *("--contexts", "96", "--blocks", "8", "--alphas", ".5", "--gen-length", "16"),
    *("--rounds", "2", "--no-launches"),
]
CEILINGS = Ceilings(copy_tb_s=3.0, read_tb_s=3.0, gemm_tflop_s=700.0)


@pytest.fixture(autouse=True)
def instant_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(run, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr("benchmarks.suite.measure.gemm_tflop_s", lambda device: 1.0)


def measured(file: Path, *more: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(run.app, [*COMMAND, "--json", str(file), *more])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(file.read_text())


@pytest.mark.slow
def test_every_arm_runs_and_the_report_is_written(tmp_path: Path) -> None:
    code, result = measured(tmp_path / "one.json", "--per-step", "1", "--check-peers")
    assert code == 0
    assert "".join(sorted(row["arm"] for row in result["rows"])) == "abcdefghi"
    assert not [row["error"] for row in result["rows"] if row.get("error")]
    assert result["checks"]["tiny"]["same_tokens"] == result["checks"]["tiny"]["calls"]
    agreement = result["checks"]["tiny"]["agreement"]
    assert set(agreement) == {"d against c", "f against e", "g against e"}
    assert max(agreement.values()) < 1e-4
    ours = next(row for row in result["rows"] if row["arm"] == "g")
    assert ours["refreshes"] == 2
    assert ours["step_ms"] > ours["floor_ms"] > 0
    assert ours["padding"] >= 1
    partly = next(row for row in result["rows"] if row["arm"] == "h")
    assert 0 < partly["partial_rows"] < ours["context"]
    assert ours["partial_rows"] is None

    measured(tmp_path / "two.json", "--arms", "a", "--per-step", "3")
    files = [str(tmp_path / name) for name in ("one.json", "two.json")]
    out = tmp_path / "docs" / "performance.md"
    out.parent.mkdir()
    done = CliRunner().invoke(report.app, [*files, "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert "times faster than each peer" in text
    assert "Where (g) loses" in text
    entry = CellBook.of(result["rows"]).entries[0]
    theirs = next(r for r in result["rows"] if r["arm"] == "c" and r["per_step"] == 1)
    assert entry.ratio("c") == pytest.approx(theirs["total_s"] / ours["total_s"])


def test_a_red_check_leaves_no_rows_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refresh_every_call(arm: str, found: Measurement) -> None:
        if arm == "c":
            found.calls = calls(*["refresh"] * len(found.calls))
        check_measurement(arm, found)

    monkeypatch.setattr(runner, "check_everything_active", lambda *_, **__: {})
    monkeypatch.setattr(runner, "check_measurement", refresh_every_call)
    code, result = measured(tmp_path / "red.json", "--arms", "a,c", "--per-step", "1")
    assert code == 1
    assert "refresh" in result["refused"]["tiny"]
    assert result["rows"] == []
    assert "refused to report tiny" in document(result, {})


def test_a_peer_that_fails_is_reported_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("benchmarks.suite.peers.focus_eager.FocusEager._sparse", fail)
    code, result = measured(tmp_path / "peer.json", "--arms", "e,c", "--per-step", "1")
    assert code == 0
    errors = {row["arm"]: row.get("error") for row in result["rows"]}
    assert errors == {"c": None, "e": "RuntimeError: no kernel"}
    assert "no kernel" in document(result, {})


@pytest.mark.parametrize("wrong", ["values", "unwritten"])
def test_everything_active_must_reproduce_vanilla(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Compiled.__call__

    def broken(self: Compiled, *arguments: Any) -> torch.Tensor:
        logits = call(self, *arguments).clone()
        if self.ran.program == "step":
            logits[1] = logits[1].flip(0) if wrong == "values" else float("nan")
        return logits

    monkeypatch.setattr(Compiled, "__call__", broken)
    torch.compiler.reset()
    with pytest.raises(Refused, match="differs from vanilla"):
        checks.check_everything_active(
            SHAPES["tiny"], torch.device("cpu"), torch.float32, 8, lowering="eager"
        )


def calls(*programs: str, finite: bool = True) -> list[Call]:
    return [Call(Ran(program, 8, 8), 1.0, None, 0.1, finite) for program in programs]


def test_refreshes_are_counted_and_outputs_must_be_finite() -> None:
    right = calls("refresh", "step", "refresh", "step")
    check_measurement("g", Measurement([], right, blocks=2))
    for wrong in (
        calls("refresh", "step", "step", "step"),
        calls("refresh", "refresh", "refresh", "step"),
    ):
        with pytest.raises(Refused, match="refreshes in 2 blocks"):
            check_measurement("g", Measurement([], wrong, blocks=2))
    with pytest.raises(Refused, match="not finite"):
        check_measurement("a", Measurement([], calls("vanilla", finite=False), blocks=1))


def test_a_time_below_its_floor_is_refused() -> None:
    floor = step_floor(SHAPES["llada"], 8448, 8192, 32, None, CEILINGS)
    check_floor("a step", floor.ms * 0.97, floor)
    with pytest.raises(Refused, match="below its floor"):
        check_floor("a step", floor.ms * 0.9, floor)


def test_floors_are_those_of_the_formula() -> None:
    llada = SHAPES["llada"]
    assert llada.layers * llada.layer_parameters == pytest.approx(6.98e9, rel=0.01)
    settings = FocusSettings.of(llada, 0.5)
    keys = keys_read(llada, 33024, 32768, settings)
    assert keys == [33024] * 7 + [16384 + 256] * 25
    step = step_floor(llada, 33024, 32768, 32, settings, CEILINGS)
    assert step.gigabytes == pytest.approx(15.0 + sum(keys) * 2 * 32 * 128 * 2 / 1e9, rel=0.01)
    assert step.ms == step.bytes_ms == pytest.approx(step.gigabytes / 3.0)
    full = full_pass_floor(llada, 33024, 64, CEILINGS)
    assert full.teraflops == pytest.approx(1000, rel=0.05)
    dream = SHAPES["dream"]
    regions = FocusSettings.of(dream, 0.5, **dream.options).regions(28)
    assert regions == ["dense"] * 6 + ["capture"] + ["sparse"] * 17 + ["dense"] * 4


def test_the_most_telling_cells_come_first() -> None:
    groups = groups_of("llada", [8192, 16384, 32768], [32, 64], [3, 1], [0.5, 0.25])
    first = groups[0]
    assert (first.contexts, first.block, first.alpha, first.per_step) == ((32768,), 64, 0.5, (1, 3))
    assert [g.contexts for g in groups[::4]] == [(32768,), (8192,), (16384,)]
    (together,) = groups_of("llada", [8192, 32768], [32], [1], [0.5], dynamic=True)
    assert [cell.context for cell in together.cells] == [32768, 8192]


def test_contexts_share_programs_of_dynamic_shapes(tmp_path: Path) -> None:
    more = ["--contexts", "96,128", "--dynamic", "--arms", "b,g,h8", "--per-step", "1"]
    code, result = measured(tmp_path / "dynamic.json", *more)
    assert code == 0
    found = [(row["arm"], row["context"], row["per_step"]) for row in result["rows"]]
    assert sorted(found) == sorted(itertools.product("bgh", (96, 128), (1,)))
    assert not [row["error"] for row in result["rows"] if row.get("error")]


def test_arms_are_named_by_letters(tmp_path: Path) -> None:
    assert arms_of("b, g,h32") == {"b": None, "g": None, "h": 32}
    done = CliRunner().invoke(run.app, ["--device", "cpu", "--arms", "b,z"])
    assert done.exit_code == 2
    assert "no arm 'z'" in done.output


def test_totals_are_composed_from_refreshes_and_steps() -> None:
    timed = [
        Call(Ran("refresh", 1, 1), ms, None, 1.0, True)
        if ms >= 100
        else Call(Ran("step", 1, 1), ms, None, 1.0, True)
        for ms in (300.0, 10.0, 10.0, 200.0, 10.0, 10.0)
    ]
    found = Measurement([], timed, blocks=2)
    # Four blocks of three calls: 300 + 3 x 200 + 8 x 10 + 12 x 1 ms.
    assert found.total_s(4, 3) == pytest.approx(0.992)
    found.calls.append(Call(Ran("step", 1, 1), 60.0, None, 1.0, True))  # a capture
    assert found.one_off_s == pytest.approx(0.05)
    assert found.total_s(4, 3) == pytest.approx(1.042)
    vanilla = Measurement([], calls("vanilla", "vanilla"), blocks=2)
    assert vanilla.total_s(4, 3) == pytest.approx(12 * 1.1e-3)


def test_rows_merge_and_ratios_stay_within_a_run() -> None:
    def row(arm: str, run: str, total: float) -> dict[str, Any]:
        cell = {"device": "x", "model": "m", "context": 1, "block": 2, "per_step": 1, "alpha": 0.5}
        return cell | {"arm": arm, "run": run, "total_s": total, "compile_s": 8.0}

    old = results.empty() | {"rows": [row("g", "1", 2.0), row("b", "1", 8.0)]}
    new = results.empty() | {"rows": [row("g", "2", 1.0), row("b", "1", 9.0)]}
    merged = results.merge([old, new])
    (entry,) = CellBook.of(merged["rows"]).entries
    assert entry.ratio("b") == 4.5
    assert entry.arm("g")["total_s"] == 1.0
    rows = [row("a", "1", 10.0), row("g", "1", 2.0)]
    results.add_break_even(rows, 16)
    assert rows[1]["break_even_tokens"] == pytest.approx(16.0)
