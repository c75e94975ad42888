"""Microseconds of the kernels that select: blocks, sinks, and how sure the model is of its rows.

    python -m benchmarks.kernels_selection --json benchmarks/results/kernels_selection.json

CUDA only, bfloat16, 64 query rows, blocks of 32 keys. Each result is verified first, against
float64. Then calls are captured in one CUDA graph, over as many copies of the large input as
exceed the L2 cache, since a layer finds its own nowhere but in memory; a time is the median of the
replays, divided by the calls. The floor is the time to read that input once.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from focus_compile.demo import environment
from focus_compile.kernels.block_selection import cpu as plain_blocks
from focus_compile.kernels.block_selection import kernel as blocks_kernel
from focus_compile.kernels.block_summaries.op import block_summaries
from focus_compile.kernels.confidence import cpu as plain_confidence
from focus_compile.kernels.confidence import kernel as confidence_kernel
from focus_compile.kernels.sink_capture import cpu as plain_sinks
from focus_compile.kernels.sink_capture import kernel as sinks_kernel

ROWS, WIDTH, KEY_BLOCK, SINKS = 64, 128, 32, 16
COLD_BYTES = 96 << 20  # of copies; the L2 cache of an H100 is 50 MiB
CALLS = 12  # at least, in one graph
app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Model:
    """The sizes that the kernels see."""

    name: str
    heads: int
    kv_heads: int
    vocabulary: int


MODELS = (Model("LLaDA", 32, 32, 126464), Model("Dream", 28, 4, 152064))


@dataclass(frozen=True)
class Row:
    """One kernel at one size. plain_us: the plain torch of that op, which waits for the host."""

    op: str
    model: str
    length: int
    rows: int
    microseconds: float
    floor_us: float
    over_floor: float
    plain_us: float
    megabytes: float


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def bandwidth() -> float:
    """Bytes a second that a copy reaches on this device."""
    return 4.3e12 if "H200" in torch.cuda.get_device_name() else 3.0e12


def replayed(calls: list[Callable[[], Any]], replays: int = 7) -> float:
    """Microseconds of one call: all of them in one graph, the median replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    del kept
    return statistics.median(times[2:])


def in_turn(call: Callable[[Tensor], Any], large: Tensor) -> list[Callable[[], Any]]:
    """Calls that read copy after copy of the large input."""
    size = large.numel() * large.element_size()
    copies = [large, *(large.clone() for _ in range(COLD_BYTES // size))]
    copies *= -(-CALLS // len(copies))
    return [functools.partial(call, copy) for copy in copies]


def eager(call: Callable[[], Any]) -> float:
    """Microseconds of a call of plain torch."""
    times = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[1:])


def row(
    op: str,
    model: Model,
    sizes: tuple[int, int],
    large: Tensor,
    call: Callable[[Tensor], Any],
    plain: Callable[[], Any],
) -> Row:
    """sizes: (length, rows)."""
    size = large.numel() * large.element_size()
    floor = size / bandwidth() * 1e6
    measured = replayed(in_turn(call, large))
    return Row(op, model.name, *sizes, measured, floor, measured / floor, eager(plain), size / 1e6)


def verify_highest(chosen: Tensor, scores: Tensor, count: int) -> None:
    """Ascending, and but for rounding the highest of float64 scores."""
    ids = chosen[chosen >= 0]
    assert ids.shape[0] == min(count, scores.shape[0])
    assert torch.equal(ids, ids.unique())
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[ids] = False
    error = 1e-4 * float(scores.abs().max())
    assert not rest.any() or float(scores[ids].min()) >= float(scores[rest].max()) - error


def block_row(model: Model, length: int) -> Row:
    q = normal(1, ROWS, model.heads, WIDTH).transpose(1, 2)
    summaries = block_summaries(normal(1, model.kv_heads, length, WIDTH), KEY_BLOCK, "bound")
    weight = torch.ones(1, ROWS, device="cuda")
    total = length // KEY_BLOCK
    candidates = torch.tensor([total - 8], device="cuda")
    keep = candidates // 2
    parts = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1).double().sum(2)
    pooled = parts.unflatten(1, (model.kv_heads, -1)).sum(2)[0]
    scores = (summaries[0].double() @ pooled[..., None]).sum(0)[:, 0]

    def call(s: Tensor) -> Tensor:
        return blocks_kernel.select_blocks(q, weight, s, candidates, keep)

    verify_highest(call(summaries)[0], scores[: total - 8], int(keep))
    return row(
        "select_blocks", model, (length, ROWS), summaries, call,
        lambda: plain_blocks.select_blocks(q, weight, summaries, candidates, keep),
    )  # fmt: skip


def sink_row(model: Model, length: int) -> Row:
    scale = WIDTH**-0.5
    q = normal(1, ROWS, model.heads, WIDTH).transpose(1, 2)
    k = normal(1, model.kv_heads, length, WIDTH)
    weight = torch.ones(1, ROWS, device="cuda")
    limit = torch.tensor([length - 256], device="cuda")
    group = model.heads // model.kv_heads
    lse = torch.empty(1, model.heads, ROWS, device="cuda")
    scores = torch.zeros(length, dtype=torch.float64, device="cuda")
    for head in range(model.heads):
        logits = scale * (q[0, head].float() @ k[0, head // group].float().T).double()
        lse[0, head] = logits.logsumexp(-1).float()
        scores += logits.softmax(-1).sum(0)

    def call(keys: Tensor) -> Tensor:
        return sinks_kernel.capture_sinks(q, keys, lse, weight, None, limit, SINKS, scale)

    verify_highest(call(k)[0], scores[: length - 256], SINKS)
    return row(
        "capture_sinks", model, (length, ROWS), k, call,
        lambda: plain_sinks.capture_sinks(q, k, lse, weight, None, limit, SINKS, scale),
    )  # fmt: skip


def confidence_row(model: Model, rows: int) -> Row:
    logits = normal(1, rows, model.vocabulary) * 3
    probability, token = confidence_kernel.confidence(logits)
    expected, best = logits.double().softmax(-1).max(-1)
    torch.testing.assert_close(probability.double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(token, logits.float().argmax(-1)) or torch.equal(
        logits.gather(-1, token[..., None]), logits.gather(-1, best[..., None])
    )
    return row(
        "confidence", model, (0, rows), logits, confidence_kernel.confidence,
        lambda: plain_confidence.confidence(logits),
    )  # fmt: skip


def show(rows: list[Row]) -> None:
    table = Table(title="kernels that select")
    for name in asdict(rows[0]):
        table.add_column(name, justify="right")
    for one in rows:
        values = asdict(one).values()
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


@app.command()
def main(
    lengths: Annotated[str, typer.Option(help="Lengths in tokens.")] = "8192,16384,32768",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Verify and measure on the CUDA device."""
    torch.manual_seed(0)
    sizes = [int(length) for length in lengths.split(",")]
    rows: list[Row] = []
    with torch.no_grad():
        for model in MODELS:
            for length in sizes:
                rows.append(block_row(model, length))
                rows.append(sink_row(model, length))
            rows += [confidence_row(model, count) for count in (64, 128)]
    show(rows)
    if json_file is not None:
        where = environment.describe() | {"device": torch.cuda.get_device_name()}
        result = {"environment": where, "rows": [asdict(one) for one in rows]}
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app()
