"""`explain` of models that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from focus_compile.cli import app

runner = CliRunner()


def test_a_plan_in_words(masked_folder: Path) -> None:
    options = ["--length", "64", "--gen-length", "16", "-o", "dense_layers=0"]
    result = runner.invoke(app, ["explain", str(masked_folder), *options])
    assert result.exit_code == 0, result.output
    assert "plan: 2 attention sites" in result.stdout
    assert "layer  0 sink-capture" in result.stdout
    assert 'logits="response" would save' in result.stdout


def test_a_config_is_enough(masked_folder: Path, tmp_path: Path) -> None:
    shutil.copy(masked_folder / "config.json", tmp_path)
    options = ["explain", str(tmp_path), "--length", "64", "--json", "-"]
    result = runner.invoke(app, [*options[:4], "--gen-length", "16"])
    assert result.exit_code == 2
    assert "--random-weights" in result.stderr
    result = runner.invoke(app, [*options, "--gen-length", "16", "--random-weights"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["accepted"]
    assert found["model"]["class"] == "EuroBertForMaskedLM"
    assert found["graphs"][0]["memory"]["kv"] > 0


def test_block_policies_get_a_block_causal_mask(block_folder: Path) -> None:
    options = ["--length", "64", "--gen-length", "16", "--json", "-"]
    result = runner.invoke(app, ["explain", str(block_folder), *options])
    assert result.exit_code == 0, result.output
    known = json.loads(result.stdout)
    assert known["options"]["policy"] == "focus-evict"
    assert known["options"]["block_length"] == 8
    assert known["options"]["mask_token_id"] == 3


def test_a_refusal_is_an_answer_with_exit_code_1(block_folder: Path) -> None:
    options = ["--length", "64", "--gen-length", "16", "--policy", "focus-dllm"]
    result = runner.invoke(app, ["explain", str(block_folder), *options])
    assert result.exit_code == 1, result.output
    assert "refused" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("no/such/folder", "no such folder"),
        ("tinny", "did you mean 'tiny'"),
        ("tiny --policy focus-dlm", "did you mean 'focus-dllm'"),
        ("tiny -o keep_ration=1", "did you mean 'keep_ratio'"),
        ("tiny -o keep_ratio", "write name=value"),
        ("tiny -o keep_ratio=much", "expected a number"),
        ("tiny -o window=4 -o window=8", "given more than once"),
        ("tiny --policy exact -o policy=exact", "given more than once"),
        ("tiny --length 64 --gen-length 64", "less than length=64"),
        ("tiny --length 40000", "at most 32768 tokens"),
        ("tiny --mask-token-id 5000", "an id from 0 to 4095"),
        ("tiny --device gpu", "option device='gpu'"),
        ("tiny --dtype float8", "unknown dtype 'float8'"),
        ("tiny --json no/such/folder/x.json", "not a file in an existing folder"),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str) -> None:
    result = runner.invoke(app, ["explain", *arguments.split()])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    result = runner.invoke(app, ["explain", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds no config.json" in result.stderr
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    result = runner.invoke(app, ["explain", str(tmp_path), "--random-weights"])
    assert result.exit_code == 2
    assert "ViTConfig" in result.stderr
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    result = runner.invoke(app, ["explain", str(tmp_path)])
    assert result.exit_code == 2
    assert "transformers cannot load it" in result.stderr


def test_code_of_a_model_runs_only_when_allowed(masked_folder: Path, tmp_path: Path) -> None:
    config = json.loads((masked_folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from transformers import EuroBertConfig, EuroBertForMaskedLM\n"
        "class OwnConfig(EuroBertConfig):\n    model_type = 'own'\n"
        "class OwnModel(EuroBertForMaskedLM):\n    config_class = OwnConfig\n"
    )
    options = ["--length", "64", "--gen-length", "16", "--random-weights"]
    result = runner.invoke(app, ["explain", str(tmp_path), *options])
    assert result.exit_code == 2
    assert "--trust-remote-code" in result.stderr
    result = runner.invoke(app, ["explain", str(tmp_path), *options, "--trust-remote-code"])
    assert result.exit_code == 0, result.output
    assert "plan: 2 attention sites" in result.stdout


def test_zero_tokens_are_a_usage_error() -> None:
    result = runner.invoke(app, ["explain", "tiny", "--length", "0"])
    assert result.exit_code == 2
    assert "--length" in result.stderr
