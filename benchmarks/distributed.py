"""Several ranks against one: milliseconds of a refresh and a step, and memory a rank.

    torchrun --nproc-per-node 2 -m benchmarks.distributed --json benchmarks/results/tp_cpu.json
    torchrun --nproc-per-node 2 -m benchmarks.distributed --shape llada --contexts 32768,131072
    torchrun --nproc-per-node 2 -m benchmarks.distributed --parallel context --contexts 1024

On a machine with a GPU for each rank over NCCL, else over gloo on the CPU. Random weights: compute
ratios, nothing about answers. `tensor` splits the model, `context` the keys and values. The first
rank measures the whole model by itself while the others wait; a length that one card has no memory
for leaves the ratios out.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist

import focus_compile
from benchmarks.suite.shapes import SHAPES, Shape, build
from examples.tensor_parallel import split
from focus_compile.demo import environment

RESPONSE = 64
WARM = 2
app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Measured:
    """Medians of a decode by one arrangement; peak_gib: of this rank, None on a CPU."""

    refresh_ms: float
    step_ms: float
    held_gib: float
    peak_gib: float | None
    rows: list[int]


@dataclass(frozen=True)
class Row:
    """One length. parallel: what the ranks split, "tensor" or "context". Ratios are of one rank's
    time to all ranks', None where one has no room."""

    shape: str
    context: int
    ranks: int
    device: str
    parallel: str
    one: Measured | None
    split: Measured
    refresh_ratio: float | None = None
    step_ratio: float | None = None
    same_rows: bool | None = None


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    begun = time.perf_counter()
    call()
    sync()
    return (time.perf_counter() - begun) * 1e3


def _prompt(shape: Shape, context: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, shape.mask_token_id, (1, context + RESPONSE), generator=generator)
    ids[:, context:] = shape.mask_token_id
    return ids.to(device)


def measure(
    model: nn.Module, shape: Shape, context: int, steps: int, lowering: str, **more: Any
) -> Measured:
    """Refreshes of new prompts, and steps that decode a token each."""
    device = next(model.parameters()).device
    compiled = focus_compile.compile(
        model, dynamic=False, mask_token_id=shape.mask_token_id, block_length=RESPONSE,
        logits="response", lowering=lowering, strict=True, **shape.options, **more,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    refreshes, took = [], []
    with torch.no_grad(), focus_compile.record() as history:
        for seed in range(WARM + 3):
            ids = _prompt(shape, context, device, seed)
            refreshes.append(_milliseconds(lambda ids=ids: compiled(ids), device))
            if seed < WARM:  # decode a little, so that every program is compiled
                ids[:, context] = 1
                compiled(ids)
        for at in range(WARM + steps):
            ids[:, context + at] = 1
            took.append(_milliseconds(lambda: compiled(ids), device))
    rows = [call.rows for call in history if call.program == "step"]
    held = sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return Measured(
        statistics.median(refreshes[WARM:]), statistics.median(took[WARM:]), held / 2**30, peak,
        rows,
    )  # fmt: skip


def _freed() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cell(
    shape: Shape, context: int, device: torch.device, parallel: str, steps: int, lowering: str
) -> Row:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    one = None
    if dist.get_rank() == 0:
        try:
            one = measure(build(shape, device, dtype), shape, context, steps, lowering)
        except (torch.OutOfMemoryError, focus_compile.RefusalError) as error:
            console.print(f"{context} tokens on one rank: {str(error).splitlines()[0]}")
    _freed()
    dist.barrier()
    model, more = build(shape, device, dtype), {}
    if parallel == "tensor":
        model = split(model, device.type)
    else:
        more = {"context_parallel": "world"}
    found = measure(model, shape, context, steps, lowering, **more)
    del model
    _freed()
    row = Row(shape.name, context, dist.get_world_size(), device.type, parallel, one, found)
    if one is None:
        return row
    return replace(
        row,
        refresh_ratio=one.refresh_ms / found.refresh_ms,
        step_ratio=one.step_ms / found.step_ms,
        same_rows=one.rows == found.rows,
    )


def _show(rows: list[Row]) -> None:
    table = Table(title="one rank, and all of them")
    names = ("context", "refresh ms", "step ms", "weights GiB", "peak GiB", "refresh x", "step x")
    for name in names:
        table.add_column(name)
    for row in rows:
        for arm, ratios in ((row.one, ("", "")), (row.split, (row.refresh_ratio, row.step_ratio))):
            if arm is None:
                continue
            values = (arm.refresh_ms, arm.step_ms, arm.held_gib, arm.peak_gib, *ratios)
            shown = (f"{v:.3g}" if isinstance(v, float) else str(v or "") for v in values)
            table.add_row(str(row.context), *shown)
    console.print(table)


@app.command()
def main(
    shape: Annotated[
        str, typer.Option(help="Of the benchmark suite: tiny, llada, dream.")
    ] = "tiny",
    contexts: Annotated[str, typer.Option(help="Prompt tokens.")] = "256,1024",
    parallel: Annotated[str, typer.Option(help="What is split: tensor or context.")] = "tensor",
    steps: Annotated[int, typer.Option(min=1, max=RESPONSE - WARM - 1)] = 16,
    layers: Annotated[int | None, typer.Option(min=2, help="Fewer layers than the shape.")] = None,
    lowering: Annotated[str, typer.Option(help="inductor or eager.")] = "inductor",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure every length."""
    if "RANK" not in os.environ:
        raise typer.BadParameter("start it with torchrun --nproc-per-node N")
    if parallel not in ("tensor", "context"):
        raise typer.BadParameter("--parallel is tensor or context")
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda" if on_gpus else "cpu")
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=datetime.timedelta(hours=2))
    sizes = SHAPES[shape] if layers is None else SHAPES[shape].with_layers(layers)
    rows = [cell(sizes, int(c), device, parallel, steps, lowering) for c in contexts.split(",")]
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, [row.split.peak_gib for row in rows])
    if dist.get_rank() == 0:
        _show(rows)
        if json_file is not None:
            found = {
                "environment": environment.describe(),
                "rows": [asdict(row) for row in rows],
                "peak_gib_by_rank": peaks,
            }
            json_file.write_text(json.dumps(found, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    app()
