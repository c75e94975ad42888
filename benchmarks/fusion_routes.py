"""Two ways to fuse a step's layer with Inductor on one CUDA device, timed side by side.

    python -m benchmarks.fusion_routes --json benchmarks/results/fusion_routes_h100.json

The *template* route has Inductor emit the matrix product or the attention from its own Triton
template, with neighbours fused into it as prologue and epilogue: `max_autotune_gemm` for the
linear layers, FlexAttention over a BlockMask for the attention. The *opaque* route is what
focus_compile does: cuBLAS or the project's own kernel as one op, and Inductor fuses what lies
between. A call is one layer's MLP (RMSNorm, gate and up, SwiGLU, down, residual) or attention
(RoPE of the queries, attention over chosen key blocks, output projection, residual) of LLaDA-8B's
shape in bfloat16, replayed from a CUDA graph over several layers' tensors, so that no weight or
key is found in the L2 cache. Both routes compute the same numbers; that is checked.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from focus_compile.demo import environment
from focus_compile.kernels.sparse_attention.op import sparse_attention

HIDDEN, WIDE, HEADS, HEAD_DIM = 4096, 12288, 32, 128
LAYERS = 4
KEY_BLOCK = 32
TAIL = 256
KEEP = 0.5
TOLERANCE = 5e-2
TEMPLATES = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "TRITON",
    "epilogue_fusion": True,
    "prologue_fusion": True,
}
LIBRARIES = ("cublas", "cublaslt")
Call = Callable[..., Tensor]

app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Row:
    """One half of a layer by one route. error: largest relative error of a row, to the first."""

    half: str
    rows: int
    length: int | None
    route: str
    microseconds: float | None
    launches: int | None
    error: float | None
    failed: str = ""


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def mlp(x: Tensor, norm: Tensor, wide: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(F.rms_norm(x, (HIDDEN,), norm), wide).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = q.chunk(2, -1)
    return q * cos + torch.cat((-second, first), -1) * sin


def joined(x: Tensor, attended: Tensor, out: Tensor) -> Tensor:
    return x + F.linear(attended.transpose(1, 2).reshape(x.shape), out)


def by_op(
    x: Tensor, q: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, out: Tensor,
    blocks: Tensor, sinks: Tensor, candidates: Tensor,
) -> Tensor:  # fmt: skip
    attended = sparse_attention(
        rotated(q, cos, sin), k, v, blocks, sinks, candidates, KEY_BLOCK, None, HEAD_DIM**-0.5
    )
    return joined(x, attended, out)


def by_template(options: dict[str, Any]) -> Call:
    def call(
        x: Tensor, q: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, out: Tensor,
        mask: BlockMask,
    ) -> Tensor:  # fmt: skip
        attended = flex_attention(
            rotated(q, cos, sin), k, v, block_mask=mask, kernel_options=options
        )
        assert isinstance(attended, Tensor)
        return joined(x, attended, out)

    return call


def replayed(call: Call, layers: list[tuple[Any, ...]]) -> tuple[float, int, Tensor]:
    """(median microseconds of one layer, its launches, the first layer's result)."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for layer in layers:
            result = call(*layer)
    torch.cuda.synchronize()
    result = call(*layers[0]).clone()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(*layers[0])
        torch.cuda.synchronize()
    launches = sum(e.count for e in profile.key_averages() if "Memcpy" not in e.key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for layer in layers:
            call(*layer)
    times = []
    for _ in range(21):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        for _ in range(5):
            graph.replay()
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 5 / len(layers) * 1e3)
    return statistics.median(times[1:]), launches, result


def compare(
    half: str, rows: int, length: int | None, routes: dict[str, Callable[[], tuple[Call, Any]]]
) -> list[Row]:
    """Time the routes; each makes its call and its layers' arguments when its turn comes."""
    found: list[Row] = []
    expected: Tensor | None = None
    for route, make in routes.items():
        try:
            microseconds, launches, result = replayed(*make())
        except Exception as error:  # a template that does not compile is a result as well
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found.append(Row(half, rows, length, route, None, None, None, text[:200]))
            continue
        expected = result if expected is None else expected
        apart = (result.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
        error_of_row = float(apart.max())
        assert error_of_row < TOLERANCE, f"{half} by {route} differs by {error_of_row}"
        found.append(Row(half, rows, length, route, microseconds, launches, error_of_row))
    return found


def mlp_rows(rows: int) -> list[Row]:
    x = normal(1, rows, HIDDEN)
    layers = [
        (x, normal(HIDDEN), normal(2 * WIDE, HIDDEN, scale=0.02), normal(HIDDEN, WIDE, scale=0.02))
        for _ in range(LAYERS)
    ]

    def opaque(library: str) -> tuple[Call, Any]:
        torch.backends.cuda.preferred_blas_library(library)
        return torch.compile(mlp, dynamic=False), layers

    def template() -> tuple[Call, Any]:
        return torch.compile(mlp, dynamic=False, options=TEMPLATES), layers

    routes: dict[str, Callable[[], tuple[Call, Any]]] = {
        f"opaque ({library})": lambda library=library: opaque(library)  # type: ignore[misc]
        for library in LIBRARIES
    }
    return compare("mlp", rows, None, routes | {"template": template})


def attention_rows(rows: int, length: int) -> list[Row]:
    prompt = (length - TAIL) // KEY_BLOCK
    kept = torch.randperm(prompt, device="cuda")[: int(KEEP * prompt)].sort().values
    total = length // KEY_BLOCK
    blocks = torch.full((1, total), -1, device="cuda")
    blocks[0, : kept.shape[0]] = kept
    sinks = torch.full((1, 1), -1, device="cuda")
    candidates = torch.tensor([prompt], device="cuda")
    read = torch.cat([kept, torch.arange(prompt, total, device="cuda")]).int()
    order = torch.zeros(total, dtype=torch.int32, device="cuda")
    order[: read.shape[0]] = read
    tiles = -(-rows // 128)
    mask = BlockMask.from_kv_blocks(
        torch.zeros(1, 1, tiles, dtype=torch.int32, device="cuda"),
        torch.zeros(1, 1, tiles, total, dtype=torch.int32, device="cuda"),
        torch.full((1, 1, tiles), read.shape[0], dtype=torch.int32, device="cuda"),
        order.expand(1, 1, tiles, total).contiguous(),
        BLOCK_SIZE=(128, KEY_BLOCK),
        seq_lengths=(rows, length),
    )
    x, q = normal(1, rows, HIDDEN), normal(1, rows, HEADS, HEAD_DIM).transpose(1, 2)
    angle = torch.rand(1, 1, rows, HEAD_DIM, device="cuda")
    common = [
        (x, q, angle.cos().bfloat16(), angle.sin().bfloat16(), *(
            normal(1, HEADS, length, HEAD_DIM) for _ in range(2)
        ), normal(HIDDEN, HIDDEN, scale=0.02))
        for _ in range(LAYERS)
    ]  # fmt: skip
    torch.backends.cuda.preferred_blas_library("cublas")
    routes: dict[str, Callable[[], tuple[Call, Any]]] = {
        "opaque": lambda: (
            torch.compile(by_op, dynamic=False),
            [(*layer, blocks, sinks, candidates) for layer in common],
        )
    }
    for name, options in {
        "template (decoding)": {},
        "template (64x32)": {"FORCE_USE_FLEX_ATTENTION": True, "BLOCK_M": 64, "BLOCK_N": 32},
    }.items():
        routes[name] = lambda options=options: (  # type: ignore[misc]
            torch.compile(by_template(options), dynamic=False),
            [(*layer, mask) for layer in common],
        )
    return compare("attention", rows, length, routes)


def show(rows: list[Row]) -> None:
    table = Table(title="one layer of a step, by route")
    for name in Row.__dataclass_fields__:
        table.add_column(name, justify="right")
    for row in rows:
        values = asdict(row).values()
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


@app.command()
def main(
    rows: Annotated[str, typer.Option(help="Query rows.")] = "32,64,128",
    lengths: Annotated[str, typer.Option(help="Tokens in the cache.")] = "8192,32768",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time every shape by every route."""
    torch.manual_seed(0)
    found: list[Row] = []
    with torch.no_grad():
        for count in (int(part) for part in rows.split(",")):
            found += mlp_rows(count)
            for length in (int(part) for part in lengths.split(",")):
                found += attention_rows(count, length)
                torch._dynamo.reset()
    show(found)
    if json_file is not None:
        where = environment.describe() | {"device": torch.cuda.get_device_name()}
        result = {"environment": where, "rows": [asdict(row) for row in found]}
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app()
