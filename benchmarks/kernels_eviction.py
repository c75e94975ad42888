"""Microseconds of the kernels for token eviction: score, choose, compact, and attend.

    python -m benchmarks.kernels_eviction --json benchmarks/results/kernels_eviction.json

CUDA only, bfloat16, the heads of SDAR-8B. Each result is verified first, against the reference or
float64. Then calls are captured in one CUDA graph, attention and `importance` over as many copies
of what they read as exceed the L2 cache; a time is the median of the replays, divided by the calls.
The floor is the longest of: reading the inputs once, the products on the matrix units, and a kernel
that does nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kernels_selection import CALLS, bandwidth, eager, in_turn, normal, replayed
from focus_compile.demo import environment
from focus_compile.kernels.compaction import cpu as plain_compaction
from focus_compile.kernels.compaction import kernel as compaction_kernel
from focus_compile.kernels.importance import cpu as plain_importance
from focus_compile.kernels.importance import kernel as importance_kernel
from focus_compile.kernels.ragged_attention import cpu as plain_attention
from focus_compile.kernels.ragged_attention import kernel as attention_kernel
from focus_compile.kernels.row_selection import cpu as plain_selection
from focus_compile.kernels.row_selection import kernel as selection_kernel

HEADS, KV_HEADS, WIDTH = 32, 8, 128
SCALE = WIDTH**-0.5
MASKED = 0.8  # of a block's rows, while it is decoded
KEPT = 6  # rows of a sequence after eviction
FLOPS = 990e12  # bfloat16, dense, H100 and H200
app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Row:
    """One kernel at one size. rows: of a sequence; context: 0 where there is none.

    plain_us: the plain torch of that op, captured too, but for attention, which waits for the host.
    """

    op: str
    sequences: int
    block: int
    rows: int
    context: int
    microseconds: float
    floor_us: float
    over_floor: float
    plain_us: float
    megabytes: float


@dataclass(frozen=True)
class Size:
    """Of one call."""

    sequences: int
    block: int
    rows: int
    context: int = 0

    @property
    def starts(self) -> Tensor:
        return torch.arange(self.sequences + 1, device="cuda") * self.rows

    @property
    def total(self) -> int:
        return self.sequences * self.rows


@functools.cache
def nothing_us() -> float:
    """A kernel of one element."""
    one = torch.zeros(1, device="cuda")
    return replayed([lambda: one.add_(1)] * CALLS)


def as_row(
    op: str, size: Size, calls: list[Callable[[], Any]], plain_us: float, read: int, flops: int = 0
) -> Row:
    """read: bytes."""
    floor = max(read / bandwidth() * 1e6, flops / FLOPS * 1e6, nothing_us())
    measured = replayed(calls)
    return Row(
        op, **asdict(size), microseconds=measured, floor_us=floor, over_floor=measured / floor,
        plain_us=plain_us, megabytes=read / 1e6,
    )  # fmt: skip


def importance_row(size: Size) -> Row:
    """q and k as a fused projection leaves them, [T, H + Hkv, d]."""
    states = normal(size.total, HEADS + KV_HEADS, WIDTH)
    masked = torch.rand(size.total, device="cuda") < MASKED
    starts = size.starts

    def call(states: Tensor, module: Any = importance_kernel) -> Tensor:
        q, k = states.transpose(0, 1).split((HEADS, KV_HEADS))
        return module.importance(q, k, masked, starts, size.block, SCALE)

    expected = call(states.double(), plain_importance)
    torch.testing.assert_close(call(states), expected, rtol=1e-4, atol=1e-5)
    counts = masked.view(size.sequences, size.rows).sum(1)
    read = int(counts.sum()) * (HEADS + KV_HEADS) * WIDTH * 2
    flops = 2 * HEADS * WIDTH * int(counts.square().sum())
    plain = replayed([lambda: call(states, plain_importance)] * 3)
    return as_row("importance", size, in_turn(call, states), plain, read, flops)


def selection_rows(size: Size) -> list[Row]:
    delta = torch.randn(size.total, device="cuda")
    masked = torch.rand(size.total, device="cuda") < MASKED
    positions, starts = torch.arange(size.total, device="cuda") % size.rows, size.starts
    target = torch.full((size.sequences,), KEPT // 2, device="cuda")
    progress = torch.full_like(target, size.block // 2)
    lists = delta, masked, positions, starts, target, progress

    def select(module: Any) -> Tensor:
        return module.select_rows(*lists, size.block)

    def compact(module: Any) -> tuple[Tensor, Tensor]:
        return module.compact_rows(keep, starts, size.total)

    keep = select(selection_kernel)
    assert torch.equal(keep, select(plain_selection))
    for found, expected in zip(compact(compaction_kernel), compact(plain_compaction), strict=True):
        assert torch.equal(found, expected)
    rows = []
    for op, call, kernel, plain, read in (
        ("select_rows", select, selection_kernel, plain_selection, size.total * 14),
        ("compact_rows", compact, compaction_kernel, plain_compaction, size.total * 9),
    ):
        calls = [functools.partial(call, kernel)] * CALLS
        plain_us = replayed([functools.partial(call, plain)] * 3)
        rows.append(as_row(op, size, calls, plain_us, read))
    return rows


def attention_row(size: Size, spread: float) -> Row:
    """spread: the shortest context, as a share of the longest."""
    q = normal(size.total, HEADS, WIDTH).transpose(0, 1)
    caches = normal(2, size.sequences, KV_HEADS, size.context, WIDTH)
    shortest = max(int(size.context * spread), 1)
    lengths = torch.randint(shortest, size.context + 1, (size.sequences,), device="cuda")
    slot, starts = torch.randperm(size.sequences, device="cuda"), size.starts

    def call(caches: Tensor, module: Any = attention_kernel) -> Tensor:
        return module.ragged_attention(q, *caches, slot, starts, lengths, size.block, SCALE)

    out = call(caches)
    for s in {0, size.sequences // 2, size.sequences - 1}:
        rows = slice(s * size.rows, (s + 1) * size.rows)
        k, v = caches[:, slot[s], :, : int(lengths[s])].double()
        exact = F.scaled_dot_product_attention(
            q[:, rows].double()[None], k[None], v[None], scale=SCALE, enable_gqa=True
        )
        torch.testing.assert_close(out[:, rows].double(), exact[0], rtol=2e-2, atol=2e-3)
    keys = int(lengths.sum())
    read = 4 * keys * KV_HEADS * WIDTH + 4 * q.numel()
    flops = 4 * keys * size.rows * HEADS * WIDTH
    plain = eager(lambda: call(caches, plain_attention))
    return as_row("ragged_attention", size, in_turn(call, caches), plain, read, flops)


def show(rows: list[Row]) -> None:
    table = Table(title="kernels for token eviction")
    for name in asdict(rows[0]):
        table.add_column(name, justify="right")
    for one in rows:
        values = asdict(one).values()
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@app.command()
def main(
    sequences: Annotated[str, typer.Option(help="Sequences in a batch.")] = "1,16,64,256",
    blocks: Annotated[str, typer.Option(help="Block lengths.")] = "32,64",
    contexts: Annotated[str, typer.Option(help="Longest contexts in tokens.")] = "1024,8192",
    spread: Annotated[float, typer.Option(help="Shortest context over the longest.")] = 0.5,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Verify and measure on the CUDA device."""
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.no_grad():
        for count, block in product(numbers(sequences), numbers(blocks)):
            whole = Size(count, block, block)
            rows += [importance_row(whole), *selection_rows(whole)]
            for context, left in product(numbers(contexts), (block, KEPT)):
                rows.append(attention_row(Size(count, block, left, context), spread))
                torch.cuda.empty_cache()
    show(rows)
    if json_file is not None:
        where = environment.describe() | {"device": torch.cuda.get_device_name()}
        result = {"environment": where, "rows": [asdict(one) for one in rows]}
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app()
