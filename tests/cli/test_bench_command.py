"""`bench`: both arms are timed, and a loss is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from focus_compile.bench import BenchCell, BenchResult, BenchSettings
from focus_compile.cli import app
from focus_compile.cli.bench import _remarks, _table

runner = CliRunner()
QUICK = "--length 64 --gen-length 16 --rounds 2 -o lowering=eager"


def bench(folder: Path, file: Path, options: str) -> dict[str, Any]:
    result = runner.invoke(app, ["bench", str(folder), *options.split(), "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "random prompts: speed only" in result.stdout
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_call_is_timed(masked_folder: Path, tmp_path: Path) -> None:
    options = f"{QUICK} --length 96 --block-length 8 --tokens-per-call 2"
    found = bench(masked_folder, tmp_path / "bench.json", options)
    assert [cell["length"] for cell in found["cells"]] == [64, 96]
    for cell in found["cells"]:
        counts = {name: len(times) for name, times in cell["calls"].items()}
        assert counts == {"dense": 4, "refresh": 4, "step": 12}
        assert len(cell["ratios"]) == 2
        assert cell["dense_peak_gib"] is None
        assert cell["loses"] == (cell["ratio"] <= 1)
    assert found["settings"]["parameters"] > 0


def test_block_policies_see_growing_prefixes(block_folder: Path, tmp_path: Path) -> None:
    found = bench(block_folder, tmp_path / "bench.json", QUICK + " --tokens-per-call 4")
    (cell,) = found["cells"]
    assert cell["exact_because"] == []
    assert len(cell["calls"]["dense"]) == 4
    assert sum(map(len, cell["calls"].values())) - 4 == 2 * 4
    assert found["settings"]["options"]["policy"] == "focus-evict"


def test_a_losing_cell_is_shown() -> None:
    cell = BenchCell(
        length=64,
        dense_ms=1.0,
        refresh_ms=1.0,
        step_ms=2.0,
        rows_per_step=8.0,
        dense_seconds=1.0,
        focus_seconds=2.0,
        ratios=(0.5, 0.4, 0.6),
        dense_compile_seconds=1.0,
        focus_compile_seconds=2.0,
        dense_peak_gib=1.0,
        focus_peak_gib=1.5,
        exact_because=("a refusal",),
    )
    result = BenchResult((cell,), {})
    console = Console(width=80, record=True)
    console.print(_table(result))
    text = console.export_text()
    assert "0.50x slower" in text
    assert "peak GiB" in text
    assert cell.pays_after is None
    assert _remarks(result) == [
        "64 tokens: calls ran the model itself: a refusal",
        "64 tokens: focus is not faster here; dense (policy=exact) is the choice",
    ]


def test_when_compilation_pays() -> None:
    known: dict[str, Any] = dict.fromkeys(BenchCell.__dataclass_fields__)
    known |= {"dense_seconds": 3.0, "focus_seconds": 1.0, "ratios": (3.0,)}
    known |= {"dense_compile_seconds": 10.0, "focus_compile_seconds": 15.0}
    assert BenchCell(**known).pays_after == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--length 64 --gen-length 64", "more than gen_length=64"),
        ("--gen-length 48", "gen_length=48 is not a multiple of block_length=32"),
        ("--tokens-per-call 5", "a divisor of the block length"),
        ("--length 100000", "at most 32768 tokens"),
        ("--policy focus-evic", "did you mean 'focus-evict'"),
        ("--policy focus-evict --length 100", "a multiple of block_length=32"),
        ("--device cuda:64", "CUDA devices"),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str) -> None:
    result = runner.invoke(app, ["bench", "tiny", *arguments.split()])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_settings_need_a_mask() -> None:
    with pytest.raises(ValueError, match="no mask_token_id"):
        BenchSettings(options={}).check()
