"""Where a step's time goes on a GPU: kernels by time, launches, and what the host leaves exposed.

    python -m benchmarks.profile_step --model llada --contexts 8192,32768 --json FILE

Random weights: times mean work, not answers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
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
    ids = torch.randint(3, vocabulary - 1000, (1, context + RESPONSE), generator=generator,
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


def kernels_of(run: Any) -> list[dict[str, Any]]:
    """Kernels of one call, by total time: name, launches, microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    rows = [
        {"kernel": name, "launches": len(times), "microseconds": sum(times)}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def profile(model: Any, shape: Any, context: int, steps: int) -> dict[str, Any]:
    """Times of refresh, steps and their parts at one context length."""
    device, mask = model.device, shape.mask_token_id
    ids = ids_for(context, shape.vocabulary, mask, device)
    block = slice(context, context + 64)
    times: dict[str, list[float]] = defaultdict(list)
    call: list[float] = []
    with torch.no_grad(), focus_compile.record() as history:
        for _ in range(steps):
            torch.cuda.synchronize()
            started = time.perf_counter()
            output = model(ids)
            returned = time.perf_counter()
            torch.cuda.synchronize()
            ended = time.perf_counter()
            times[history[-1].program].append((ended - started) * 1e3)
            call.append((returned - started) * 1e3)
            times["dispatch"].append(history[-1].milliseconds)
            times["compile"].append(history[-1].compile_seconds)
            del output
            decode_one(model, ids, block, mask)
        record = history[-1]
        while record.program != "step":
            decode_one(model, ids, block, mask)
            record = history[-1]
        kernels = kernels_of(lambda: model(ids))
    return {
        "context": context,
        "bucket": record.bucket,
        "keys": record.keys,
        "refresh_ms": times["refresh"],
        "compile_s": sum(times["compile"]),
        "dispatch_ms": statistics.median(times["dispatch"]),
        "step_ms": statistics.median(times["step"][4:]),
        "step_ms_all": times["step"],
        "host_ms": statistics.median(call[6:]),
        "launches": sum(row["launches"] for row in kernels),
        "kernel_ms": sum(row["microseconds"] for row in kernels) / 1e3,
        "kernels": kernels[:40],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


@app.command()
def main(
    model: str = "llada",
    contexts: str = "8192",
    layers: int = 0,
    steps: int = 24,
    options: Annotated[str, typer.Option(help="JSON of FocusConfig options.")] = "{}",
    device: str = "cuda",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Profile our step."""
    shape = SHAPES[model]
    if layers:
        shape = shape.with_layers(layers)
    network = build(shape, torch.device(device))
    chosen = {"block_length": 64, "logits": "response"} | shape.options | json.loads(options)
    results = []
    for context in (int(part) for part in contexts.split(",")):
        torch.compiler.reset()
        started = time.perf_counter()
        compiled = focus_compile.compile(network, **chosen)
        found = profile(compiled, shape, context, steps)
        found["seconds"] = time.perf_counter() - started
        results.append(found)
        for name, value in found.items():
            if name != "kernels":
                typer.echo(f"{name}: {value}")
        for row in found["kernels"]:
            typer.echo(f"{row['microseconds']:9.1f} {row['launches']:5} {row['kernel'][:110]}")
        if json_file is not None:
            report = {"environment": environment.describe(), "model": model, "results": results}
            json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
