"""Programs: few artifacts for many sizes, state and weights at fixed addresses, cached on disk."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from focus_compile.lowering import program as lowering
from focus_compile.lowering.program import InputSpec, Program
from focus_compile.runtime.programs import Programs
from tests.compiled import run_call
from tests.runtime.tiny import MASK, assert_own, decided, prompt, shared, tiny_model

ROOT = Path(__file__).parents[2]
ROWS = sympy.Symbol("rows", integer=True, positive=True)
EIGHT = sympy.Integer(8)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


def multiply(lowering: str) -> Program:
    """(x [rows, 8], weight [8, 8], total [rows]) -> x @ weight; adds row sums to total."""

    def forward(x: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor]:
        product = torch.ops.aten.mm.default(x, weight)
        summed = torch.ops.aten.sum.dim_IntList(product, [1])
        torch.ops.aten.copy_.default(total, summed)
        return (product,)

    inputs = [
        InputSpec("x", (ROWS, EIGHT)),
        InputSpec("weight", (EIGHT, EIGHT), static=True),
        InputSpec("total", (ROWS,), static=True),
    ]
    return Program("multiply", fx.symbolic_trace(forward), inputs, lowering)


def check(program: Program, rows: int) -> None:
    x, weight, total = torch.randn(rows, 8), torch.randn(8, 8), torch.empty(rows)
    address = total.data_ptr()
    (product,) = program(x, weight, total)
    torch.testing.assert_close(product, x @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, product.sum(1), rtol=1e-4, atol=1e-4)
    assert total.data_ptr() == address


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_one_artifact_for_many_row_counts(lowering: str) -> None:
    program = multiply(lowering)
    for rows in (2, 3, 8, 17, 256, 2, 100):
        check(program, rows)
    assert program.compilations == 1
    assert program.compile_seconds > 0


def test_a_size_outside_a_guard_compiles_another_artifact() -> None:
    program = multiply("inductor")
    check(program, 4)
    program._artifacts[0].guard = "L['t0'] <= 8"
    for rows in (5, 8):
        check(program, rows)
    assert program.compilations == 1
    for rows in (9, 4, 30, 8):
        check(program, rows)
    assert program.compilations == 2


def test_the_graph_is_not_changed_by_compiling_it() -> None:
    program = multiply("inductor")
    before = str(program.graph.graph)
    check(program, 4)
    assert str(program.graph.graph) == before


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Programs]:
    """Every set of programs that is built in the test."""
    found: list[Programs] = []
    build = Programs.build.__func__

    def collect(cls: Any, *args: Any) -> Programs:
        found.append(build(cls, *args))
        return found[-1]

    monkeypatch.setattr(Programs, "build", classmethod(collect))
    return found


@torch._inductor.config.patch(force_disable_caches=True)
@torch._dynamo.config.patch(specialize_float=True)
@pytest.mark.slow
def test_compilations_depend_on_neither_steps_nor_lengths(
    built: list[Programs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all lengths has one artifact for each of its programs.

    Weights and state are static inputs of every artifact: their addresses never change.
    """
    static: list[tuple[list[int], int]] = []

    def spy(gm: Any, inputs: Any, **options: Any) -> Any:
        static.append((sorted(options.get("static_input_idxs") or []), len(inputs)))
        return compile_fx_inner(gm, inputs, **options)

    monkeypatch.setattr(lowering, "compile_fx", functools.partial(compile_fx, inner_compile=spy))
    model = tiny_model()
    focus = shared(model, lowering="inductor", dynamic=True, expansion=3, window=3, block_length=64)
    buckets = set()
    for number, length in enumerate((40, 52, 61)):
        ids = prompt(masks=30, length=length, seed=number)
        logits, record = run_call(focus, ids)
        assert record.program == "refresh"
        assert_own(logits, model, ids)
        for count in (1, 5, 0, 2, 7, 3, 9, 3):
            ids = decided(ids, count)
            logits, record = run_call(focus, ids)
            buckets.add(record.bucket)
        assert not (ids == MASK).any()
        assert_own(logits, model, ids)
    assert len(buckets - {None}) >= 3
    (programs,) = built
    compiled = [programs.refresh, programs.step, programs.exact]
    assert [program.compilations for program in compiled] == [1, 1, 1]
    assert programs.compilations == 3
    for program, (indices, count) in zip(compiled, static, strict=True):
        assert count == len(program.inputs), program.name
        assert indices == [at for at, spec in enumerate(program.inputs) if spec.static]
        names = {program.inputs[at].name for at in indices}
        assert program.name == "exact" or {"key_cache_0", "value_cache_1"} <= names


DECODE = """
import json, torch
torch.set_num_threads(1)
from torch._dynamo.utils import counters
from tests.compiled import run_call
from tests.runtime.tiny import decided, prompt, shared, tiny_model
focus, ids = shared(tiny_model(), lowering="inductor"), prompt()
programs = [run_call(focus, each)[1].program for each in (ids, decided(ids), decided(ids, 4))]
found = counters["inductor"]
print(json.dumps([programs, found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]]))
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Every artifact comes from Inductor's cache on disk."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    results = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", DECODE],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout.splitlines()[-1]))
    (programs, hits, misses), second = results
    assert programs == ["refresh", "step", "exact"]
    assert (hits, misses) == (0, 3)
    assert second == [programs, 3, 0]
