"""What a step costs with its sampler: beside the compiled model, and compiled with it.

    python -m benchmarks.sampler_tail --json benchmarks/results/sampler_tail_cpu.json
    python -m benchmarks.sampler_tail --shape llada --layers 4 --contexts 8192,32768 --device cuda

The sampler is LLaDA's: softmax in float64 over all rows, the probability of the most probable
token, the best masked position decoded. Random weights: milliseconds of a step, nothing about
answers. Arms alternate step by step; medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import focus_compile
from benchmarks.suite.shapes import SHAPES, Shape, build
from focus_compile.demo import environment

RESPONSE = 64
"""Masks behind the prompt, one decode block."""
WARM = 4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=120)


@dataclass(frozen=True)
class Row:
    """Of one arm at one length. sampler_ms: what a step takes beyond the compiled model alone;
    None both where memory did not suffice. peak_gib: of GPU memory."""

    shape: str
    layers: int
    context: int
    arm: str
    step_ms: float | None
    sampler_ms: float | None
    peak_gib: float | None


def sample(ids: Tensor, logits: Tensor, mask: int) -> Tensor:
    """The ids with one more token of each sequence."""
    tokens = logits.argmax(-1)
    probability = torch.softmax(logits.to(torch.float64), -1).gather(-1, tokens[..., None])[..., 0]
    sure = torch.where(ids == mask, probability, -torch.inf)
    chosen = torch.zeros_like(ids, dtype=torch.bool).scatter(1, sure.topk(1, -1).indices, True)
    return torch.where(chosen, tokens, ids)


def measure(step: Callable[[Tensor], Tensor], ids: Tensor, steps: int) -> list[float]:
    """Milliseconds of each step after the first, which refreshes, and a few more."""
    sync = torch.cuda.synchronize if ids.is_cuda else lambda: None
    found = []
    for _ in range(WARM + steps):
        sync()
        begun = time.perf_counter()
        ids = step(ids)
        sync()
        found.append((time.perf_counter() - begun) * 1e3)
    return found[WARM:]


def cell(shape: Shape, context: int, device: torch.device, steps: int) -> list[Row]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(shape, device, dtype)
    mask = shape.mask_token_id
    options = {"mask_token_id": mask, "block_length": RESPONSE, **shape.options}
    compiled = torch.compile(model, backend="focus", dynamic=False, options=options)
    whole = torch.compile(
        lambda ids: sample(ids, model(ids).logits, mask),
        backend="focus", dynamic=False, options=options,
    )  # fmt: skip

    def alone(ids: Tensor) -> Tensor:
        assert compiled(ids).logits.isfinite().all()
        masked = (ids == mask).nonzero()[0]
        ids = ids.clone()
        ids[masked[0], masked[1]] = 1
        return ids

    arms = {
        "the compiled model alone": alone,
        "the sampler beside it": lambda ids: sample(ids, compiled(ids).logits, mask),
        "compiled with it": whole,
        'compiled with it, logits="response"': torch.compile(
            lambda ids: sample(ids, model(ids).logits, mask),
            backend="focus", dynamic=False, options=options | {"logits": "response"},
        ),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, mask, (1, context + RESPONSE), generator=generator)
    ids[:, context:] = mask
    rows: list[Row] = []
    for name, step in arms.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = sampler = None
        with torch.no_grad(), focus_compile.record() as history:
            try:
                took = statistics.median(measure(step, ids.to(device), steps))
            except torch.OutOfMemoryError as error:
                console.print(f"{name}, {context}: {str(error).splitlines()[0]}")
        if took is not None:
            assert [call.program for call in history[1:]] == ["step"] * (len(history) - 1), history
            alone_ms = rows[0].step_ms if rows else took
            sampler = None if alone_ms is None else took - alone_ms
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        rows.append(Row(shape.name, shape.layers, context, name, took, sampler, peak))
        torch.compiler.reset()
    return rows


@app.command()
def main(
    shape: Annotated[
        str, typer.Option(help="Of the benchmark suite: tiny, llada, dream.")
    ] = "tiny",
    layers: Annotated[int, typer.Option(help="Fewer; the sampler knows nothing of them.")] = 99,
    contexts: Annotated[str, typer.Option(help="Prompt tokens.")] = "1024,4096",
    device: str = "cpu",
    steps: Annotated[int, typer.Option(min=1, max=RESPONSE - WARM - 1)] = 30,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure every arm at every length."""
    rows = [
        row
        for context in contexts.split(",")
        for row in cell(
            SHAPES[shape].with_layers(layers), int(context), torch.device(device), steps
        )
    ]
    table = Table(title="a step with its sampler")
    for name in Row.__dataclass_fields__:
        table.add_column(name)
    for row in rows:
        table.add_row(
            *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in asdict(row).values())
        )
    console.print(table)
    if json_file is not None:
        found = {"environment": environment.describe(), "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    app()
