"""From an empty process to steady steps: what starting costs, in a first process and in a second.

    python -m benchmarks.cold_start --layers 32 --json benchmarks/results/cold_start_cpu.json
    python -m benchmarks.cold_start --model llada --context 8192 --device cuda

A first process compiles everything; a second one finds Inductor's cache on the disk. Both trace the
model and run the passes. Where layers are compiled once for each kind, a third process, without a
cache, compiles all of them in one graph, for comparison. Random weights, one decode block, one
token a step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import typer
from rich.console import Console
from rich.table import Table

PHASES = {
    "import_torch_s": "import torch",
    "import_s": "import focus_compile",
    "build_s": "the model",
    "trace_s": "Dynamo traces the forward",
    "passes_s": "analysis and passes",
    "inductor_s": "Inductor: refresh and step programs",
    "refresh_s": "first refresh, with the plan's self-check",
    "first_step_s": "first step, run",
    "second_step_s": "second step, with CUDA graph capture on a GPU",
    "step_s": "every step from then on",
}
PROCESSES = ("first process", "second process")
ONE_GRAPH = "first process, one graph"
TO_FIRST_STEP = ("trace_s", "passes_s", "inductor_s", "refresh_s", "first_step_s")
STEPS = 12
RESPONSE = 64

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=120)


def start(
    model_name: str,
    context: int,
    device_name: str,
    lowering: str,
    layers: int | None = None,
    one_graph: bool = False,
) -> dict[str, float]:
    """Seconds of every phase of `PHASES` in this process, which has imported no torch yet."""
    found: dict[str, float] = {}
    begun = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal begun
        found[name] = time.perf_counter() - begun
        begun = time.perf_counter()

    import torch

    phase("import_torch_s")
    import focus_compile

    phase("import_s")
    from benchmarks.suite.shapes import SHAPES, build
    from focus_compile import backend
    from focus_compile.lowering import layer_chain

    device, shape = torch.device(device_name), SHAPES[model_name]
    if layers is not None:
        shape = dataclasses.replace(shape, layers=layers)
    if one_graph:
        layer_chain.FEWEST_LAYERS = shape.layers + 1
    ids = torch.randint(3, shape.mask_token_id, (1, context + RESPONSE), device=device)
    ids[:, context:] = shape.mask_token_id
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begun = time.perf_counter()
    model = build(shape, device, dtype)
    phase("build_s")
    passes = 0.0
    compile_graph = backend.compile_graph

    def timed(*args: Any) -> Any:
        nonlocal passes
        began = time.perf_counter()
        try:
            return compile_graph(*args)
        finally:
            passes += time.perf_counter() - began

    options = shape.options | {"lowering": lowering, "logits": "response", "strict": True}
    compiled = focus_compile.compile(model, block_length=RESPONSE, **options)
    seconds = []
    patched = mock.patch.object(backend, "compile_graph", timed)
    with torch.no_grad(), patched, focus_compile.record() as history:
        for at in range(context, context + STEPS):
            begun = time.perf_counter()
            token = compiled(ids).logits[0, at, : shape.mask_token_id].argmax()
            ids[0, at] = token
            token.item()
            seconds.append(time.perf_counter() - begun)
    programs = [entry.program for entry in history]
    if programs != ["refresh"] + ["step"] * (STEPS - 1):
        raise RuntimeError(f"expected a refresh and steps, got {programs}")
    refresh, first = history[0], history[1]
    in_backend = refresh.milliseconds / 1e3
    found |= {
        "trace_s": seconds[0] - passes - in_backend,
        "passes_s": passes,
        "inductor_s": refresh.compile_seconds + first.compile_seconds,
        "refresh_s": in_backend - refresh.compile_seconds,
        "first_step_s": seconds[1] - first.compile_seconds,
        "second_step_s": seconds[2],
        "step_s": statistics.median(seconds[3:]),
    }
    return found


def child(arguments: list[str], cache: str) -> dict[str, float]:
    """`start` in a process of its own with this Inductor cache."""
    command = [sys.executable, "-m", "benchmarks.cold_start", "--child", *arguments]
    done = subprocess.run(
        command, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def is_deep(model: str, layers: int | None) -> bool:
    from benchmarks.suite.shapes import SHAPES
    from focus_compile.lowering.layer_chain import FEWEST_LAYERS

    return (layers or SHAPES[model].layers) >= FEWEST_LAYERS


@app.command()
def main(
    model: Annotated[str, typer.Option(help="llada, dream or tiny.")] = "tiny",
    context: Annotated[int, typer.Option(help="Prompt tokens.")] = 1024,
    device: str = "cpu",
    lowering: str = "inductor",
    layers: Annotated[int | None, typer.Option(help="Instead of the shape's own.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    one_graph: Annotated[bool, typer.Option("--one-graph", hidden=True)] = False,
    as_child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Start twice, and show where the time goes."""
    if as_child:
        print(json.dumps(start(model, context, device, lowering, layers, one_graph)))
        return
    arguments = ["--model", model, "--context", str(context), "--device", device]
    arguments += ["--lowering", lowering]
    arguments += [] if layers is None else ["--layers", str(layers)]
    with tempfile.TemporaryDirectory() as cache:
        found = {name: child(arguments, cache) for name in PROCESSES}
    if is_deep(model, layers) and lowering == "inductor":
        with tempfile.TemporaryDirectory() as cache:
            found[ONE_GRAPH] = child([*arguments, "--one-graph"], cache)
    title = f"{model}, {context} prompt tokens, {device}"
    table = Table("seconds", *found, title=title + (f", {layers} layers" if layers else ""))
    for key, what in PHASES.items():
        table.add_row(what, *(f"{times[key]:.3f}" for times in found.values()))
    until = [sum(times[key] for key in TO_FIRST_STEP) for times in found.values()]
    table.add_row("from the first call to the end of the first step", *(f"{s:.1f}" for s in until))
    console.print(table)
    if json_file is not None:
        from focus_compile.demo import environment

        where = environment.describe()
        result = {"environment": where, "model": model, "context": context, "device": device}
        result |= {} if layers is None else {"layers": layers}
        json_file.write_text(json.dumps(result | {"processes": found}, indent=2) + "\n")


if __name__ == "__main__":
    app()
