"""`tune`: a real search on a small model, its files, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import focus_compile
from focus_compile.cli import app
from focus_compile.decode import generate
from focus_compile.decode.respond import encode_prompt
from focus_compile.model_files import load_model, load_tokenizer

runner = CliRunner()
PROMPTS = "The cat sat on the mat.\n\nThe dog sat on the mat.\n"
"""Of equal lengths, so that every setting is traced once."""
QUICK = "--gen-length 16 --block-length 8 --held-out 0.5"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS)
    return file


@pytest.mark.long
def test_a_search_writes_what_options_load(
    masked_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out, plot = tmp_path / "settings.json", tmp_path / "plot.svg"
    options = (
        f"--prompts {prompts} {QUICK} --trials 2 --target-agreement 0.01 --out {out} --plot {plot}"
    )
    result = runner.invoke(app, ["tune", str(masked_folder), *options.split()])
    assert result.exit_code == 0, result.output
    assert f'options={{"settings": "{out}"}}' in result.stdout
    assert "<svg" in plot.read_text()
    known = json.loads(out.read_text())
    assert known["reached"]
    assert len(known["trials"]) == 2
    assert known["trials"][0]["options"]["keep_ratio"] == 0.5
    assert known["measured"]["prompts_searched"] == 1
    assert known["chosen"]["held_out_agreement"] is not None

    loaded = load_model(str(masked_folder), device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = load_tokenizer(str(masked_folder))
    torch.compiler.reset()
    compiled = torch.compile(
        loaded.model, backend="focus", options={"settings": str(out), "lowering": "eager"}
    )
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS.splitlines()[0])])
    dense = generate(loaded.model, ids, gen_length=16, block_length=8).ids[0, ids.shape[1] :]
    with focus_compile.record() as history:
        focus = generate(compiled, ids, gen_length=16, block_length=8).ids[0, ids.shape[1] :]
    assert {call.program for call in history} <= {"refresh", "partial", "step"}
    same = int((dense == focus).sum())
    assert (known["chosen"]["tokens_same"], known["chosen"]["tokens_compared"]) == (same, 16)


def test_a_missed_target_exits_with_one(masked_folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "settings.json"
    coarse = "-o refresh=1000 -o keep_ratio=0 -o sink_tokens=0 -o expansion=1 -o window=1"
    search = f"--prompts {prompts} {QUICK} --held-out 0 --trials 1 --target-agreement 1"
    options = f"{search} --out {out} {coarse}"
    result = runner.invoke(app, ["tune", str(masked_folder), *options.split()])
    assert result.exit_code == 1, result.output
    assert "No setting reached 1; this one agrees best" in result.stdout
    known = json.loads(out.read_text())
    assert not known["reached"]
    assert known["options"]["refresh"] == 1000
    assert known["chosen"]["agreement"] < 1


def test_time_is_measured_beside_dense(masked_folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "settings.json"
    options = f"--prompts {prompts} {QUICK} --trials 1 --target-agreement 0.01 --out {out}"
    more = "--measure time -o lowering=eager"
    result = runner.invoke(app, ["tune", str(masked_folder), *options.split(), *more.split()])
    assert result.exit_code == 0, result.output
    assert "dense seconds a token by focus's" in result.stdout
    known = json.loads(out.read_text())
    assert known["measure"] == "time"
    assert known["chosen"]["cost"] > 0
    assert "lowering" not in known["options"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tiny-block", "give --prompts FILE, a text file with a prompt a line"),
        ("tiny --prompts nowhere.txt", "nowhere.txt: No such file"),
        ("tiny --prompts {prompts} --length 512", "--prompts excludes --length"),
        ("tiny --target-agreement 1.5", "a share above 0, up to 1"),
        ("tiny --out nowhere/settings.json", "--out nowhere/settings.json: not a file in"),
        ("tiny --plot plot.txt", "--plot plot.txt: not a file in an existing folder with a name"),
        ("tiny --measure speed", "unknown measure 'speed'"),
        ("tiny --gen-length 48", "gen_length=48 is not a multiple of block_length=32"),
        ("tiny --steps 4 --threshold 0.9", "--steps and --threshold exclude each other"),
        ("tiny -o keep_rato=1", "did you mean 'keep_ratio'"),
        ("tiny -o policy=dual-cache", "focus-dllm, whose options are what is searched"),
        ("tiny --length 90000", "too short for 90000 tokens"),
    ],
)
def test_bad_input_is_one_line(prompts: Path, arguments: str, message: str) -> None:
    given = arguments.format(prompts=prompts)
    result = runner.invoke(app, ["tune", *given.split()])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_block_models_are_refused(block_folder: Path, prompts: Path) -> None:
    result = runner.invoke(
        app, ["tune", str(block_folder), "--prompts", str(prompts), "--mask-token-id", "3"]
    )
    assert result.exit_code == 2
    assert "focus-dllm, whose options are what is searched" in result.stderr
