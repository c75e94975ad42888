"""Decoding by length against Inductor-compiled dense, and what the runtime adds to a call.

    python -m benchmarks.decode --json benchmarks/results/decode_cpu.json
    python -m benchmarks.decode --device cuda --json benchmarks/results/decode_cuda.json

Ratios are taken side by side in one run on the bundled model: the calls of both arms alternate
where single calls are compared, and both arms decode the same question where decodings are. On a
GPU a call ends when its work does (the sampler reads the tokens; single calls synchronize).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import focus_compile
from focus_compile import demo
from focus_compile.config import FocusConfig
from focus_compile.decode.sampler import generate
from focus_compile.demo import environment, retrieval
from focus_compile.lowering.program import Program
from focus_compile.policies.presets import policy_for
from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.guard import (
    CallInputs,
    compare_inputs,
    why_not_comparable,
    why_not_continued,
)
from focus_compile.runtime.observe import Flags, Observed, observe
from focus_compile.runtime.observe_program import ObserveProgram
from focus_compile.runtime.trajectory import Blocks, Trajectory

GEN_LENGTH = 64
BLOCK_LENGTH = 32
app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class DecodeRow:
    """One length: 64 tokens decoded, one a call, in blocks of 32."""

    length: int
    dense_s: float
    focus_s: float
    speedup: float
    dense_call_ms: float
    refresh_ms: float
    step_ms: float
    refresh_share: float
    rows_dense: int
    rows_focus: int
    right_dense: int
    right_focus: int
    asked: int


@dataclass(frozen=True)
class OverheadRow:
    """What a call costs beside plain Inductor on the same model; medians of alternating calls."""

    length: int
    inductor_ms: float
    exact_ms: float
    refresh_ms: float
    exact_over_inductor: float
    refresh_over_inductor: float
    exact_dispatch_ms: float
    """The backend's own time in an exact call, outside the program."""
    guard_and_dispatch_ms: float
    """Proving that a call continues its trajectory (weights, ids) and choosing the program."""
    step_outside_programs_ms: float
    """The same in a step, with everything: guard, policy, row packing, confidence, logits."""


@contextmanager
def program_time() -> Any:
    """Seconds spent inside compiled programs, as a one-element list."""
    spent = [0.0]
    run = Program.__call__

    def timed(self: Program, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return run(self, *args)
        finally:
            spent[0] += time.perf_counter() - started

    Program.__call__ = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Program.__call__ = run  # type: ignore[method-assign]


def question(
    model: Any, tokenizer: Any, length: int, seed: int
) -> tuple[torch.Tensor, retrieval.Example]:
    example = retrieval.make(tokenizer, length, response=GEN_LENGTH, seed=seed)
    return torch.tensor([example.prompt_ids], device=model.device), example


def response(like: torch.Tensor, token: int) -> torch.Tensor:
    return torch.cat([like, like.new_full((1, GEN_LENGTH), token)], 1)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def decode(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
    started = time.perf_counter()
    ids = generate(model, prompt, gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH).ids
    return ids, time.perf_counter() - started


def decode_row(model: Any, tokenizer: Any, length: int, seed: int) -> DecodeRow:
    torch.compiler.reset()
    prompt, example = question(model, tokenizer, length, seed)
    ids = response(prompt, model.config.mask_token_id)
    dense = torch.compile(model, dynamic=False)
    focus = focus_compile.compile(model, dynamic=False, block_length=BLOCK_LENGTH)
    with torch.no_grad():
        for _ in range(2):
            dense(ids)
    decode(focus, prompt)
    dense_ids, dense_s = decode(dense, prompt)
    with focus_compile.record() as history:
        focus_ids, focus_s = decode(focus, prompt)
    refresh = [r.milliseconds for r in history if r.program == "refresh"]
    steps = [r.milliseconds for r in history if r.program == "step"]
    marks = [
        sum(example.marks(tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)))
        for found in (dense_ids, focus_ids)
    ]
    return DecodeRow(
        length=length,
        dense_s=dense_s,
        focus_s=focus_s,
        speedup=dense_s / focus_s,
        dense_call_ms=dense_s / GEN_LENGTH * 1e3,
        refresh_ms=statistics.median(refresh),
        step_ms=statistics.median(steps),
        refresh_share=sum(refresh) / (sum(refresh) + sum(steps)),
        rows_dense=GEN_LENGTH * length,
        rows_focus=sum(r.rows for r in history),
        right_dense=marks[0],
        right_focus=marks[1],
        asked=len(example.pairs),
    )


def overhead_row(model: Any, tokenizer: Any, length: int, repeats: int) -> OverheadRow:
    torch.compiler.reset()
    prompt, _ = question(model, tokenizer, length, seed=0)
    masked = response(prompt, model.config.mask_token_id)
    decided = response(prompt, 7)
    dense = torch.compile(model, dynamic=False)
    options: dict[str, Any] = {"block_length": BLOCK_LENGTH, "dynamic": False}
    focus = focus_compile.compile(model, **options)
    every = focus_compile.compile(model, refresh="every-step", **options)
    arms: dict[str, Callable[[], Any]] = {
        "inductor": lambda: dense(masked),
        "exact": lambda: focus(decided),
        "refresh": lambda: every(masked),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    outside: list[float] = []
    with torch.no_grad(), program_time() as spent, focus_compile.record() as history:
        for run in arms.values():
            for _ in range(3):
                run()
        for _ in range(repeats):
            for name, run in arms.items():
                before, started = spent[0], time.perf_counter()
                run()
                finish(masked.device)
                elapsed = time.perf_counter() - started
                times[name].append(elapsed * 1e3)
                if name == "exact":
                    outside.append(history[-1].milliseconds - (spent[0] - before) * 1e3)
    return OverheadRow(
        length=length,
        inductor_ms=(inductor := statistics.median(times["inductor"])),
        exact_ms=(exact := statistics.median(times["exact"])),
        refresh_ms=(refresh := statistics.median(times["refresh"])),
        exact_over_inductor=exact / inductor,
        refresh_over_inductor=refresh / inductor,
        exact_dispatch_ms=statistics.median(outside),
        guard_and_dispatch_ms=guard_milliseconds(model, masked),
        step_outside_programs_ms=step_outside_programs(focus, prompt),
    )


def guard_milliseconds(model: Any, ids: torch.Tensor, repeats: int = 200) -> float:
    """Median time of the guard: this call's inputs against the trajectory's, weights included."""
    mask = model.config.mask_token_id
    config = FocusConfig(mask_token_id=mask, block_length=BLOCK_LENGTH)
    policy = policy_for(config)
    call = CallInputs(ids, (), (), tuple(model.parameters()))
    graphs = DeviceGraphs(ids.is_cuda, print)
    held = Trajectory.allocate(None, call, 0, [], graphs, mask)
    held.begin(call, Blocks.of(ids.eq(mask), BLOCK_LENGTH), 32, 0.5)
    held.ids.copy_(ids)

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        return observe(Observed(*tensors), policy, mask, BLOCK_LENGTH)

    work = ObserveProgram(plain) if ids.is_cuda else plain  # as the runtime has it

    def compare() -> torch.Tensor:
        return work(*Observed.of(held))

    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        assert why_not_comparable(held, None, call, held.stream) is None
        held.incoming.copy_(ids)
        compare_inputs(held, call)
        pending = held.graphs.run("observe", compare)
        same_weights = held.weights.are(call.weights)
        assert why_not_continued(same_weights, Flags(*pending.tolist())) is None
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def step_outside_programs(focus: Any, prompt: torch.Tensor) -> float:
    """Median milliseconds of a step spent outside its program."""
    outside: list[float] = []
    with focus_compile.record() as history, program_time() as spent:
        before = 0.0

        def note(_: Any) -> None:
            nonlocal before
            inside, before = (spent[0] - before) * 1e3, spent[0]
            if history[-1].program == "step" and history[-1].compile_seconds == 0:
                outside.append(history[-1].milliseconds - inside)

        generate(focus, prompt, gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH, progress=note)
    return statistics.median(outside)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


@app.command()
def main(
    lengths: Annotated[str, typer.Option(help="Lengths in tokens.")] = "512,1024,2048,4096",
    overhead_length: int = 1024,
    repeats: Annotated[int, typer.Option(help="Alternating calls for the overhead.")] = 20,
    seed: int = 0,
    device: str = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure both tables on the bundled model."""
    model, tokenizer = demo.load()
    model.to(device)
    overhead = asdict(overhead_row(model, tokenizer, overhead_length, repeats))
    show("a call beside plain Inductor", [overhead])
    rows = []
    for length in map(int, lengths.split(",")):
        rows.append(asdict(decode_row(model, tokenizer, length, seed)))
        show("decoding 64 tokens", rows)
    if json_file is not None:
        where = environment.describe() | {"device": device_name(model.device)}
        result = {"environment": where, "overhead": overhead, "decode": rows}
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app()
