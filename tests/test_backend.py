"""The entry point: what `torch.compile(model, backend="focus")` takes, and what it costs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import focus_compile
from focus_compile.backend import focus
from tests import versions
from tests.compiled import run_call
from tests.runtime.tiny import MASK, assert_own, decided, prompt, tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


def in_a_fresh_process(code: str, **environment: str) -> Any:
    """What the code prints last, from JSON."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_torch_lists_the_backend_without_loading_it() -> None:
    """Triton may be loaded, but then by torch for its own backends."""
    found = in_a_fresh_process("""
import json, sys, torch
names = torch.compiler.list_backends()
print(json.dumps([
    "focus" in names, [m for m in ("transformers", "focus_compile") if m in sys.modules]
]))
""")
    assert found == [True, []]


@pytest.mark.slow
def test_the_backend_works_by_name_without_our_import() -> None:
    found = in_a_fresh_process("""
import json, sys, torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(24, 16), torch.nn.Linear(16, 24)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids):
        hidden = self.embed(ids)
        q, k, v = (one(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for one in self.qkv)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(hidden + attended.transpose(1, 2).flatten(2))

model = torch.compile(
    Model().eval(), backend="focus", options={"mask_token_id": 23, "lowering": "eager"}
)
with torch.no_grad():
    model(torch.tensor([[1, 2, 3, 4, 23, 23, 23, 23]]))
from focus_compile.runtime.store import STORE
print(json.dumps([STORE.nbytes > 0, "transformers" in sys.modules]))
""")
    assert found == [True, False]


def test_importing_is_light() -> None:
    """Beside torch, and without what only the demo or a GPU needs; so is the backend itself."""
    seconds, heavy, demo = in_a_fresh_process("""
import json, sys, time, torch
started = time.process_time()
import focus_compile
spent = time.process_time() - started
heavy = [m for m in ("triton", "transformers", "rich") if m in sys.modules]
import focus_compile.backend
demo = [m for m in ("transformers", "rich", "focus_compile.demo") if m in sys.modules]
print(json.dumps([spent, heavy, demo]))
""")
    assert heavy == demo == []
    assert seconds < 0.3


def by_name(**arguments: Any) -> Any:
    return torch.compile(tiny_model(), backend="focus", **arguments)


def test_options_and_modes_reach_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUS_COMPILE_LOWERING", "eager")
    monkeypatch.setenv("FOCUS_COMPILE_MASK_TOKEN_ID", str(MASK))
    model, ids = by_name(options={"policy": "dual-cache", "block_length": 3}), prompt()
    run_call(model, ids)
    assert run_call(model, decided(ids))[1].rows == 3
    torch.compiler.reset()
    model = by_name(mode="prefix-cache")
    run_call(model, ids)
    assert run_call(model, decided(ids))[1].rows == 4
    torch.compiler.reset()
    model = by_name(mode="exact")
    assert run_call(model, ids)[1].why == 'policy="exact"'


def test_mode_and_options_together_are_torchs_own_error() -> None:
    with pytest.raises(RuntimeError, match=r"[Ee]ither mode or options"):
        by_name(mode="exact", options={"window": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"windw": 3}}, "unknown option 'windw'; did you mean 'window'"),
        ({"options": {"window": 0}}, "option window=0 is not valid; expected a whole number >= 1"),
        ({"mode": "dual_cache"}, "unknown mode 'dual_cache'; did you mean 'dual-cache'"),
    ],
)
def test_bad_options_are_named_at_the_first_call(arguments: Any, message: str) -> None:
    """torch calls a backend no earlier; focus_compile.compile says so at once."""
    with pytest.raises(BackendCompilerFailed, match=message), torch.no_grad():
        by_name(**arguments)(prompt())


def test_two_compiled_forms_of_one_model() -> None:
    """Each has its own options; they take turns in the model's one trajectory."""
    model, ids = tiny_model(), prompt()
    options = {"mask_token_id": MASK, "lowering": "eager"}
    first = focus_compile.compile(model, **options)
    second = focus_compile.compile(model, **options, policy="dual-cache")
    for focus_model in (first, second, first):
        logits, record = run_call(focus_model, ids)
        assert record.program == "refresh"
        assert_own(logits, model, ids)
        ids = decided(ids)
    assert record.why == "new trajectory: another compiled graph ran this model"
    assert run_call(first, ids)[1].program == "step"


def test_reset_reports_and_computes_anew() -> None:
    assert callable(focus.reset)  # type: ignore[attr-defined]
    model = focus_compile.compile(tiny_model(), lowering="eager")
    for _ in range(2):
        with torch.no_grad(), pytest.warns(focus_compile.FocusWarning, match="no mask_token_id"):
            model(prompt())
        torch.compiler.reset()


def test_explain_compiled_and_plain(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    options = {"mask_token_id": MASK, "dense_layers": 0}
    plain = focus_compile.explain(model, prompt(), **options)
    assert "plan: 2 attention sites" in capsys.readouterr().out
    compiled = focus_compile.compile(model, **options, lowering="eager")
    again = focus_compile.explain(compiled, prompt(), **options, quiet=True)
    assert capsys.readouterr().out == ""
    assert again.to_dict() == plain.to_dict()
    assert json.loads(json.dumps(plain.to_dict()))["accepted"]


def test_a_failing_analysis_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from focus_compile import backend

    def fail(*args: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(backend, "plan_graph", fail)
    model, ids = tiny_model(), prompt()
    focus_model = focus_compile.compile(model, mask_token_id=MASK, lowering="eager")
    logits, record = run_call(focus_model, ids)
    assert_own(logits, model, ids)
    assert record.why == (
        "the analysis of the graph failed (KeyError: 'a bug'). Please report it; "
        "FOCUS_COMPILE_DUMP=folder writes down what was seen."
    )


@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", None])
def test_torchs_modes_reach_inductor_in_graphs_that_run_exactly(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import compile_fx

    seen: list[Any] = []

    def spy(gm: Any, inputs: Any, config_patches: Any) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    model = torch.compile(torch.nn.Linear(4, 4), backend="focus", mode=mode)
    with torch.no_grad():
        model(torch.ones(2, 4))
    assert seen == [torch._inductor.list_mode_options(mode or "default")]
    assert bool(seen[0]) == (mode is not None)


@versions.ignored_logging
def test_logging_that_is_added_after_the_import_cuts_no_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `warning_once` of transformers is, which its config's properties call."""

    def once(self: logging.Logger, text: str) -> None:
        pytest.fail(f"said {text} in a compiled forward")

    monkeypatch.setattr(logging.Logger, "warning_once", once, raising=False)
    ignored = set(torch._dynamo.config.ignore_logging_functions)
    log, model = logging.getLogger("any"), tiny_model()

    def call(ids: torch.Tensor) -> Any:
        log.warning_once("deprecated")  # type: ignore[attr-defined]
        return model(ids)

    options = {"mask_token_id": MASK, "lowering": "eager", "strict": True, "fullgraph": True}
    with torch._dynamo.config.patch(ignore_logging_functions=ignored):
        found = run_call(focus_compile.compile(call, **options), prompt())[1]
    assert found.program == "refresh"
