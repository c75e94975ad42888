"""torch's own tools see what happens: TORCH_LOGS, TORCH_TRACE with tlparse, the profiler, depyf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._logging._internal import trace_log
from torch.profiler import profile

from focus_compile.torch_tools import span, trace_artifact
from tests.block_diffusion.tiny import decoder, generator
from tests.runtime.tiny import OPTIONS, decided, prompt, shared, tiny_model

PROGRAM = """
import torch, focus_compile
from tests.runtime.tiny import OPTIONS, decided, prompt, shared, tiny_model

with torch.no_grad():
    model, ids = shared(tiny_model()), prompt()
    model(ids)
    model(decided(ids))
    shared(torch.nn.Sequential(torch.nn.Embedding(24, 8), torch.nn.Linear(8, 24)))(ids)
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a process with both variables logged, and the file of its trace."""
    folder = tmp_path_factory.mktemp("trace")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"TORCH_LOGS": "+focus_compile", "TORCH_TRACE": str(folder)},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    (file,) = folder.iterdir()
    return done.stderr, file


def test_torch_logs_show_the_plan_misses_and_every_call(traced: tuple[str, Path]) -> None:
    logged, _ = traced
    assert "plan: 2 attention sites, [1, 12] ids" in logged
    assert "refused: no attention was recognised" in logged
    assert "refresh: compiled for" in logged
    assert "] refresh: new trajectory: first call; 12 rows" in logged
    assert "] step: continues the trajectory; " in logged
    assert "] exact: no attention was recognised" in logged


def test_tlparse_shows_the_plan_the_misses_and_the_graph_after_each_pass(
    traced: tuple[str, Path], tmp_path: Path
) -> None:
    tlparse = Path(sys.executable).with_name("tlparse")
    if not tlparse.exists():
        pytest.skip("tlparse is not installed")
    report = tmp_path / "report"
    command = [tlparse, traced[1], "-o", report, "--no-browser"]
    subprocess.run(command, check=True, capture_output=True)
    index = (report / "index.html").read_text()
    graphs = {}
    for file in sorted(report.glob("*/focus_*")):
        assert file.name in index
        graphs[file.parent.name, file.stem.removeprefix("focus_").rpartition("_")[0]] = file
    first, second = dict.fromkeys(folder for folder, _ in graphs)
    assert [name for folder, name in graphs if folder == first] == [
        "00_captured", "01_remove-no-ops", "02_match-attention", "03_fold-constant-masks",
        "04_refresh", "05_step", "compiled_refresh", "compiled_step", "plan",
    ]  # fmt: skip
    assert json.loads(graphs[first, "plan"].read_text())["accepted"] is True
    assert "focus_compile.sparse_attention" in graphs[first, "05_step"].read_text()
    assert json.loads(graphs[second, "plan"].read_text())["accepted"] is False
    assert graphs[second, "misses"].read_text().startswith("refused: no attention was recognised")


def test_without_a_trace_nothing_is_made_of_what_would_be_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_log, "handlers", [])  # torch's own leaves where nobody asked for one
    trace_artifact("plan", lambda: pytest.fail("the payload was made"))
    assert span("step", 8) is span("program", "step")


@torch.no_grad()
def test_profiler_ranges_are_named_by_program_region_and_layer() -> None:
    focus: Any = shared(tiny_model())
    ids = prompt()
    focus(ids)
    focus(decided(ids))
    with profile() as profiled:
        focus(decided(ids, 2))
    ours = [e for e in profiled.events() if e.name.startswith("focus_compile: ")]
    names = Counter(event.name.removeprefix("focus_compile: ") for event in ours)
    (step,) = (name for name in names if name.startswith("step "))
    assert names == dict.fromkeys(
        ["observe", step, "program step", "layer 0 sink-capture", "layer 1 sparse-suffix"], 1
    )
    program = next(event for event in ours if event.name.endswith("program step"))
    for event in ours:
        if ": layer" in event.name:
            assert program.time_range.start <= event.time_range.start
            assert event.time_range.end <= program.time_range.end


def test_the_profiler_names_the_layers_on_either_side_of_an_eviction() -> None:
    made = generator(decoder("qwen3"), block_length=8, policy="focus-evict")
    made.submit([3, 1, 4, 1, 5], max_new_tokens=8)
    made.step()
    with profile() as profiled:
        made.step()
    ours = [e for e in profiled.events() if e.name.startswith("focus_compile: ")]
    program, found = "", {}
    for event in sorted(ours, key=lambda event: event.time_range.start):
        name = event.name.removeprefix("focus_compile: ")
        if name.startswith("program "):
            program = name
        elif name.startswith("layer "):
            found.setdefault(program, []).append(name)
    assert found == {
        "program prefix": ["layer 0 dense-prefix"],
        "program suffix": ["layer 1 dense-prefix", "layer 2 dense-prefix"],
    }


def test_depyf_reads_what_dynamo_made(tmp_path: Path) -> None:
    depyf = pytest.importorskip("depyf")
    torch._dynamo.reset()
    model = torch.compile(tiny_model(), backend="focus", options=OPTIONS | {"lowering": "eager"})
    with depyf.prepare_debug(str(tmp_path)), torch.no_grad():
        model(prompt())
    code = "".join(file.read_text() for file in tmp_path.glob("full_code_for_*.py"))
    assert "__compiled_fn" in code
    assert any("embedding" in file.read_text() for file in tmp_path.glob("__compiled_fn*.py"))
