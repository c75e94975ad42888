"""`record`, `replay`, `diff` and `report`, on the bundled model op by op."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from focus_compile.cli import app

runner = CliRunner()
SMALL = "--length 128 --gen-length 4 --block-length 4 -o lowering=eager -o dense_if_faster=0"


def run(*arguments: str, exit_code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a question to the model tiny; dense beside it, and a report."""
    file = tmp_path_factory.mktemp("records") / "run.json"
    report = file.with_suffix(".html")
    shown = run(
        "record", "tiny", *SMALL.split(), "--dense", "--out", str(file), "--report", str(report)
    )
    assert "run.json: 4 calls" in shown
    assert "run.html" in shown
    return file


def test_a_record_says_what_was_run(record: Path) -> None:
    found = json.loads(record.read_text())
    assert found["model"]["name"] == "tiny"
    assert found["model"]["class"] == "EuroBertForMaskedLM"
    assert [call["step"]["program"] for call in found["calls"]] == ["refresh", *["step"] * 3]
    assert found["settings"]["gen_length"] == 4
    assert found["arms"]["dense"]["tokens"] == [found["output"]["ids"][0][-4:]]
    page = record.with_suffix(".html").read_text()
    assert "4 of 4" in page
    assert "EuroBertForMaskedLM" in page


def test_a_replay_finds_no_difference(record: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    result = tmp_path / "diff.json"
    shown = run("replay", str(record), "--out", str(again), "--json", str(result))
    assert "no difference" in shown
    assert json.loads(result.read_text())["same"]
    assert "no difference" in run("diff", str(record), str(again))


def test_diff_names_the_first_difference(record: Path, tmp_path: Path) -> None:
    found = json.loads(record.read_text())
    found["calls"][2]["blocks"]["5"][0][0] += 1
    found["calls"][3]["logits"] = "0" * 64
    found["graphs"][0]["options"]["window"] = 4
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    shown = run("diff", str(record), str(other), exit_code=1)
    assert "first difference: call 2: blocks[5][0][0]:" in shown.replace("\n", " ")
    assert "option window: 8 against 4" in shown
    table = run("diff", str(record), str(other), "--tolerance", "1e-6", exit_code=1)
    assert "logits" not in table


def test_a_report_of_a_record(record: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert "page.html" in run("report", str(record), "--out", str(page))
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("record tiny --out no/such/run.json", "not a file in an existing folder"),
        ("record tiny --report no/such/page.html", "not a file in an existing folder"),
        ("record tiny-block", "give the prompt"),
        ("record tiny-block --prompt a --temperature 1", "temperature is not read with"),
        ("replay none.json", "expected a record of a run"),
        ("diff none.json other.json", "none.json: No such file"),
        ("report pyproject.toml", "not JSON"),
        ("report none.json --out no/such/page.html", "not a file in an existing folder"),
        ("demo --policy focus-evict --report page.html", "--report: not with focus-evict"),
    ],
)
def test_errors_are_one_line(arguments: str, message: str) -> None:
    result = runner.invoke(app, arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_a_record_of_an_unnamed_model_asks_for_its_name(record: Path, tmp_path: Path) -> None:
    found = json.loads(record.read_text())
    del found["model"]["name"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    result = runner.invoke(app, ["replay", str(other)])
    assert result.exit_code == 2
    assert "name one with --model" in result.stderr


def test_block_policies_are_recorded_too(block_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "blocks.json"
    asked = "--prompt word --gen-length 16 -o lowering=eager --dense --threshold 0.5"
    shown = run("record", str(block_folder), *asked.split(), "--out", str(file))
    found = json.loads(file.read_text())
    assert f"blocks.json: {len(found['calls'])} calls" in shown
    assert found["graphs"][0]["generator"]["policy"] == "focus-evict"
    assert len(found["output"]["ids"][0]) == len(found["calls"][0]["submitted"][0]["prompt"]) + 16
    assert set(found["arms"]) == {"dense", "focus"}
    assert "no difference" in run("replay", str(file))
