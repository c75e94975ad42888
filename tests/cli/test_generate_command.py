"""`generate`: text alone on standard output, whatever the policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

from focus_compile.cli import app
from focus_compile.decode import generate
from focus_compile.decode.respond import ShiftedLogits, encode_prompt
from tests.cli.conftest import TOKENIZER_FILES

runner = CliRunner()
QUICK = ["--gen-length", "16", "--block-length", "8", "-o", "lowering=eager"]
QUESTION = "The secret word of code is book."


def ask(folder: Path | str, *options: str, stdin: str | None = None) -> dict[str, Any]:
    result = runner.invoke(
        app, ["generate", str(folder), *QUICK, *options, "--json", "-"], input=stdin
    )
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def expected(folder: Path, prompt: list[int], **options: Any) -> str:
    """What the plain model decodes."""
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = generate(
        model,
        torch.tensor([prompt]),
        gen_length=16,
        block_length=8,
        eos_token_id=2,
        **options,
    ).ids[0, len(prompt) :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_the_text_alone_is_on_standard_output(masked_folder: Path) -> None:
    result = runner.invoke(
        app, ["generate", str(masked_folder), *QUICK, "--policy", "exact", "--prompt", QUESTION]
    )
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(masked_folder)
    prompt = tokenizer(f"<|bos|><|prompt|>{QUESTION}<|response|>")["input_ids"]
    assert result.stdout == expected(masked_folder, prompt) + "\n"
    assert "16 calls (16 exact)" in result.stderr
    assert "exact: 16/16 tokens" in result.stderr


def test_without_the_template_and_from_a_pipe(masked_folder: Path) -> None:
    options = ["--file", "-", "--no-chat-template", "--steps", "8", "-o", "refresh=every-step"]
    found = ask(masked_folder, *options, stdin=QUESTION + "\n")
    prompt = AutoTokenizer.from_pretrained(masked_folder)(QUESTION)["input_ids"]
    assert found["prompt_tokens"] == len(prompt)
    assert found["text"] == expected(masked_folder, prompt, steps=8)
    assert found["model_calls"] == 8
    assert found["programs"] == {"refresh": 8}
    assert found["options"]["mask_token_id"] == 3


def test_calls_are_incremental_and_compilation_is_apart(masked_folder: Path) -> None:
    found = ask(masked_folder, "--prompt", QUESTION)
    assert found["programs"] == {"refresh": 2, "step": 14}
    assert found["exact_because"] == []
    assert found["compile_seconds"] > found["seconds"] > 0


def test_block_policies(block_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "question.txt"
    file.write_text(QUESTION)
    found = ask(block_folder, "--file", str(file), "--steps", "4")
    assert found["options"]["policy"] == "focus-evict"
    # A block that is decoded is computed once more; the first holds the prompt's last tokens.
    assert 4 <= found["model_calls"] <= 8
    assert 0 < len(found["tokens"]) <= 16


def test_a_model_that_is_refused_says_so(block_folder: Path) -> None:
    options = ["--prompt", QUESTION, "--policy", "focus-dllm", "--json", "-"]
    result = runner.invoke(app, ["generate", str(block_folder), *QUICK, *options])
    found = json.loads(result.stdout)
    assert found["programs"] == {"exact": 16}
    (why,) = found["exact_because"]
    assert result.stderr.count("warning: focus_compile runs the exact program: ") == 1
    assert why in result.stderr


def test_logits_of_the_row_before(masked_folder: Path) -> None:
    class Output:
        logits = torch.arange(6.0).view(1, 3, 2)

    shifted = ShiftedLogits(lambda ids: Output())(torch.zeros(1, 3, dtype=torch.int64)).logits
    assert shifted.tolist() == [[[0, 1], [0, 1], [2, 3]]]
    found = ask(masked_folder, "--prompt", QUESTION, "--shift-logits", "--policy", "exact")
    other = ask(masked_folder, "--prompt", QUESTION, "--policy", "exact")
    assert found["tokens"] != other["tokens"]


def test_a_tokenizer_without_a_template(masked_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(masked_folder)
    asked = encode_prompt(tokenizer, QUESTION)
    tokenizer.chat_template = None
    plain = encode_prompt(tokenizer, QUESTION)
    assert asked == [1, 4, *plain, 5]


def test_no_mask_id_is_an_error_with_candidates(block_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no-mask"
    shutil.copytree(block_folder, folder)
    settings = json.loads((folder / TOKENIZER_FILES[1]).read_text())
    del settings["mask_token"]
    (folder / TOKENIZER_FILES[1]).write_text(json.dumps(settings))
    result = runner.invoke(app, ["generate", str(folder), "--prompt", QUESTION])
    assert result.exit_code == 2
    assert "no mask token id is known" in result.stderr
    assert "<|mask|> = 3" in result.stderr
    assert "--mask-token-id" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt TEXT and --file FILE"),
        (["--prompt", "a", "--file", "b"], "--prompt TEXT and --file FILE"),
        (["--prompt", " "], "the prompt is empty"),
        (["--file", "no/such/file.txt"], "No such file or directory"),
        (["--prompt", "a", "--gen-length", "48"], "gen_length=48 is not a multiple"),
        (["--prompt", "a", "--threshold", "2"], "threshold=2.0"),
        (["--prompt", "a", "--steps", "3"], "steps=3"),
        (["--prompt", "a", "--steps", "4", "--threshold", "0.9"], "exclude each other"),
        (["--prompt", "a", "--policy", "dual-cash"], "did you mean 'dual-cache'"),
        (["--prompt", "a<|mask|>"], "holds the mask token 3"),
        (["--prompt", "a", "--gen-length", "32768"], "at most 32768 tokens"),
        (
            ["--prompt", "a", "--policy", "focus-evict", "-o", "window=4"],
            "option window is not read with policy focus-evict",
        ),
        (["--prompt", "a", "--policy", "focus-evict", "--temperature", "1"], "temperature"),
        (["--prompt", "a", "--policy", "focus-evict", "--steps", "3"], "steps=3 must divide"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["generate", "tiny", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_folder_without_tokenizer(masked_folder: Path, tmp_path: Path) -> None:
    shutil.copy(masked_folder / "config.json", tmp_path)
    result = runner.invoke(app, ["generate", str(tmp_path), "--prompt", "a"])
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr
