"""Where a step's time goes on a GPU: kernels by time, launches, and what the host leaves exposed.

    python -m benchmarks.profile_step --model llada --contexts 8192,32768 --json FILE
    python -m benchmarks.profile_step --entries 4 --options '{"refresh": "adaptive"}'

Steps are timed with Dynamo's guards and without (torch.compiler.set_stance). `--entries` goes on to
the next decode blocks and profiles what the last entry runs: a refresh, or a partial one.

Random weights: times mean work, not answers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import focus_compile
from benchmarks.suite.shapes import SHAPES, build
from focus_compile.demo import environment

RESPONSE = 256
app = typer.Typer(add_completion=False)


def ids_for(context: int, vocabulary: int, mask: int, device: torch.device) -> torch.Tensor:
    """A random prompt of `context` tokens and a response of masks, [1, context + RESPONSE]."""
    generator = torch.Generator(device).manual_seed(context)
    ids = torch.randint(3, vocabulary * 3 // 4, (1, context + RESPONSE), generator=generator,
                        device=device)  # fmt: skip
    ids[:, context:] = mask
    return ids


def decode_one(model: Any, ids: torch.Tensor, block: slice, mask: int) -> None:
    """Commit the most probable masked position of the block, as LLaDA's sampler does."""
    logits = model(ids).logits[:, block].float()
    probability, token = logits.softmax(-1).max(-1)
    probability.masked_fill_(ids[:, block] != mask, -1.0)
    best = probability.argmax(1, keepdim=True)
    ids[:, block].scatter_(1, best, token.gather(1, best))


def kernels_of(run: Callable[[], object]) -> dict[str, Any]:
    """Kernels of one call, by total time: name, launches, microseconds; their sums; and how long
    the device was in use from the first to the last."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    spans = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
            spans.append((event.time_range.start, event.time_range.end))
    rows = [
        {"kernel": name, "launches": len(times), "microseconds": sum(times)}
        for name, times in found.items()
    ]
    rows.sort(key=lambda row: -row["microseconds"])
    return {
        "launches": sum(row["launches"] for row in rows),
        "kernel_ms": sum(row["microseconds"] for row in rows) / 1e3,
        "span_ms": (max(end for _, end in spans) - min(begin for begin, _ in spans)) / 1e3,
        "kernels": rows[:40],
    }


@dataclass
class Timed:
    """Milliseconds of a call until the device is done, and until the call returned."""

    whole: float
    host: float


def timed(call: Callable[[], object]) -> Timed:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    return Timed((time.perf_counter() - started) * 1e3, (returned - started) * 1e3)


def profile(
    model: Any, shape: Any, context: int, steps: int, block_length: int, entries: int
) -> dict[str, Any]:
    """Times of refresh, steps and their parts at one context length."""
    mask = shape.mask_token_id
    ids = ids_for(context, shape.vocabulary, mask, model.device)
    block = slice(context, context + block_length)
    times: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad(), focus_compile.record() as history:
        for _ in range(steps):
            took = timed(lambda: model(ids))
            record = history[-1]
            times[record.program].append(took.whole)
            times["host"].append(took.host)
            times["dispatch"].append(record.milliseconds)
            times["compile"].append(record.compile_seconds)
            decode_one(model, ids, block, mask)
        while record.program != "step":
            decode_one(model, ids, block, mask)
            record = history[-1]
        kernels = kernels_of(lambda: model(ids))
        unguarded = []
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            for _ in range(steps // 2):
                decode_one(model, ids, block, mask)
                unguarded.append(timed(lambda: model(ids)))
        entered = [enter(model, ids, block, at, history) for at in range(1, entries + 1)]
    found = {
        "context": context,
        "bucket": record.bucket,
        "keys": record.keys,
        "refresh_ms": times["refresh"],
        "compile_s": sum(times["compile"]),
        "dispatch_ms": statistics.median(times["dispatch"]),
        "step_ms": statistics.median(times["step"][4:]),
        "step_ms_all": times["step"],
        "host_ms": statistics.median(times["host"][6:]),
        "step_ms_without_guards": statistics.median(took.whole for took in unguarded),
        "host_ms_without_guards": statistics.median(took.host for took in unguarded),
    }
    return found | kernels | {"entries": entered, "peak_gib": peak_gib()}


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def enter(
    model: Any, ids: torch.Tensor, first: slice, at: int, history: list[Any]
) -> dict[str, Any]:
    """Decide the block before the `at`-th after the first; time the call that enters this, or of
    every other block profile it."""
    length = first.stop - first.start
    ids[:, first.start + (at - 1) * length : first.start + at * length] = at
    if at % 2:
        took = timed(lambda: model(ids))
        return {"program": history[-1].program, "rows": history[-1].rows, "ms": took.whole,
                "host_ms": took.host}  # fmt: skip
    found = kernels_of(lambda: model(ids))
    return {"program": history[-1].program, "rows": history[-1].rows, **found}


@app.command()
def main(
    model: str = "llada",
    contexts: str = "8192",
    layers: int = 0,
    steps: int = 24,
    block: Annotated[int, typer.Option(help="Tokens of a decode block.")] = 64,
    entries: Annotated[
        int, typer.Option(help="Further blocks to enter, every other profiled.")
    ] = 0,
    options: Annotated[str, typer.Option(help="JSON of FocusConfig options.")] = "{}",
    device: str = "cuda",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Profile our step."""
    shape = SHAPES[model]
    if layers:
        shape = shape.with_layers(layers)
    network = build(shape, torch.device(device))
    chosen = {"block_length": block, "logits": "response"} | shape.options | json.loads(options)
    results = []
    for context in (int(part) for part in contexts.split(",")):
        torch.compiler.reset()
        started = time.perf_counter()
        compiled = focus_compile.compile(network, **chosen)
        found = profile(compiled, shape, context, steps, block, entries)
        found["seconds"] = time.perf_counter() - started
        results.append(found)
        for name, value in found.items():
            if name not in ("kernels", "entries"):
                typer.echo(f"{name}: {value}")
        for part in (found, *found["entries"]):
            facts = {name: part[name] for name in part if name not in ("kernels", "entries")}
            typer.echo("" if part is found else f"block entry: {facts}")
            for row in part.get("kernels", ()):
                typer.echo(f"{row['microseconds']:9.1f} {row['launches']:5} {row['kernel'][:110]}")
        if json_file is not None:
            report = {"environment": environment.describe(), "model": model, "results": results}
            json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
