"""Prompts over processes: each is answered once, and a stopped run goes on where it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from focus_compile import demo
from focus_compile.demo import retrieval

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = 4


def run(prompts: Path, out: Path, processes: int) -> str:
    """What the example prints."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["examples/data_parallel.py", str(prompts), "--out", str(out)]
    command += ["--gen-length", "32", "--lowering", "eager"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(out: Path) -> dict[int, str]:
    """By number; every line must be whole, and none answered twice."""
    lines = [line for file in out.glob("*.jsonl") for line in file.read_text().splitlines() if line]
    found = [json.loads(line) for line in lines if line.endswith("}")]
    assert len({answer["number"] for answer in found}) == len(found)
    return {answer["number"]: answer["answer"] for answer in found}


@pytest.mark.long
def test_prompts_are_answered_once_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    _, tokenizer = demo.load()
    questions = [retrieval.make(tokenizer, 256, response=32, seed=n) for n in range(PROMPTS)]
    prompts = tmp_path / "prompts.txt"
    texts = [tokenizer.decode(q.prompt_ids).replace("\n", " ") for q in questions]
    prompts.write_text("\n".join(texts))
    out = tmp_path / "answers"
    assert f"{PROMPTS} of {PROMPTS} answered" in run(prompts, out, 2)
    assert len(list(out.glob("*.jsonl"))) == 2
    first = answers(out)
    assert sorted(first) == list(range(PROMPTS))

    file = out / "answers_1.jsonl"  # as if it was stopped while it wrote
    file.write_text(file.read_text()[:-20])
    said = run(prompts, out, 1)
    assert f"{PROMPTS} prompts, {PROMPTS - 1} answered, 1 processes" in said
    assert answers(out) == first

    prompts.write_text("\n".join([*texts[:-1], texts[0]]))  # another prompt of that number
    assert f"{PROMPTS - 1} answered" in run(prompts, out, 1)
