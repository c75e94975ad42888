"""The split-KV attention kernel on one CUDA device, beside torch's SDPA over gathered keys.

    python -m benchmarks.kernels_attention --json benchmarks/results/kernels_attention.json
    python -m benchmarks.kernels_attention --tune
    python -m benchmarks.kernels_attention --models diffusion-gemma --lengths 32768,131072 \\
        --rows 256 --peer efficient

One layer's attention of a step: R query rows of LLaDA-8B (32 heads), Dream-7B (28 heads on 4 kv
heads) or a full layer of DiffusionGemma (16 heads on 2, 512 wide) against a bfloat16 cache of T
tokens: 256 after the prompt, 16 sinks, and the given share of the prompt's blocks of 32. A call is
the ops alone, replayed from a CUDA graph over so many caches that none is found in the L2 cache;
every shape is first compared to float32.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from focus_compile.demo import environment
from focus_compile.kernels.split_kv import KeyList, attend, tiling_for
from focus_compile.kernels.tiling import Tiling, choose_splits, device_limits

HEADS = {"llada": (32, 32, 128), "dream": (28, 4, 128), "diffusion-gemma": (16, 2, 512)}
"""Query heads, kv heads and their width."""
KEY_BLOCK = 32
TAIL = 256
SINKS = 16
DTYPE = torch.bfloat16
COLD_BYTES = 256 * 2**20
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Call = Callable[[], Any]
app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Row:
    """One shape. TB/s count each kept key and value once, TFLOP/s both products."""

    model: str
    length: int
    rows: int
    keep: float
    keys: int
    tiling: str
    ms: float
    tb_s: float
    tflop_s: float
    share_of_copy: float
    """Of the bandwidth of a device-to-device copy in this run."""
    sdpa_ms: float
    """Torch's SDPA over keys gathered before."""
    gather_sdpa_ms: float
    error_over_sdpa: float


@dataclass(frozen=True)
class Case:
    """q [1, H, R, d] and several caches (k, v) of one shape; `read` the positions, ascending."""

    model: str
    keep: float
    q: Tensor
    caches: list[tuple[Tensor, Tensor]]
    keys: KeyList | None
    read: Tensor

    @classmethod
    def make(cls, model: str, length: int, rows: int, keep: float, device: str = "cuda") -> Case:
        heads, kv_heads, width = HEADS[model]
        candidates = (length - TAIL) // KEY_BLOCK
        kept = torch.randperm(candidates, device=device)[: int(keep * candidates)].sort().values
        blocks = torch.full((1, length // KEY_BLOCK), -1, device=device)
        blocks[0, : kept.shape[0]] = kept
        sinks = torch.randperm(candidates * KEY_BLOCK, device=device)[:SINKS].sort().values
        read = torch.zeros(length, dtype=torch.bool, device=device)
        read[: candidates * KEY_BLOCK].view(-1, KEY_BLOCK)[kept] = True
        read[sinks] = True
        read[candidates * KEY_BLOCK :] = True
        limits = torch.tensor([candidates], device=device)
        keys = None if keep == 1 else KeyList(blocks, sinks[None], limits, KEY_BLOCK)
        shape = (1, kv_heads, length, width)
        one = 2 * kv_heads * int(read.sum()) * width * DTYPE.itemsize
        caches = [
            (
                torch.randn(shape, device=device, dtype=DTYPE),
                torch.randn(shape, device=device, dtype=DTYPE),
            )
            for _ in range(max(2, min(24, COLD_BYTES // one)))
        ]
        q = torch.randn((1, rows, heads, width), device=device, dtype=DTYPE).transpose(1, 2)
        return cls(model, keep, q, caches, keys, read.nonzero().squeeze(1))

    @property
    def scale(self) -> float:
        return float(self.q.shape[3] ** -0.5)

    @property
    def gathers(self) -> bool:
        return self.keys is not None

    def kernel(self, cache: tuple[Tensor, Tensor], tiling: Tiling | None = None) -> Tensor:
        return attend(self.q, *cache, None, self.scale, self.keys, tiling=tiling)

    def gather(self, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not self.gathers:
            return cache
        k, v = cache
        return k.index_select(2, self.read), v.index_select(2, self.read)

    def sdpa(self, gathered: tuple[Tensor, Tensor], backend: SDPBackend) -> Tensor:
        """The rows of a group packed, so that keys are read once a kv head."""
        kv_heads = gathered[0].shape[1]
        packed = self.q.reshape(1, kv_heads, -1, self.q.shape[3])
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(packed, *gathered, scale=self.scale)
        return out.reshape(self.q.shape)

    def gather_sdpa(self, cache: tuple[Tensor, Tensor], backend: SDPBackend) -> Tensor:
        return self.sdpa(self.gather(cache), backend)


def check(case: Case, backend: SDPBackend) -> float:
    """The kernel's largest error against float32, over SDPA's; refuses a wrong kernel."""
    gathered = case.gather(case.caches[0])
    exact = Case(case.model, case.keep, case.q.float(), [], case.keys, case.read)
    wanted = exact.sdpa((gathered[0].float(), gathered[1].float()), SDPBackend.MATH)

    def error(out: Tensor) -> float:
        return float((out.float() - wanted).abs().max())

    ours, theirs = error(case.kernel(case.caches[0])), error(case.sdpa(gathered, backend))
    allowed = 3 * theirs + torch.finfo(DTYPE).eps * float(wanted.abs().max())
    if not ours <= allowed:
        raise SystemExit(f"{case.model}, {case.q.shape}: error {ours:.3g}, allowed {allowed:.3g}")
    return ours / theirs


def milliseconds(calls: Sequence[Call], at_least: int = 8) -> float:
    """Median time of a call, of graphs that hold each call equally often."""
    calls = [*calls] * -(-at_least // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds([partial(target.copy_, source)]) * 1e-3)


def kept_bytes(case: Case) -> int:
    _, kv_heads, _, width = case.caches[0][0].shape
    return 2 * kv_heads * case.read.shape[0] * width * DTYPE.itemsize


def flops(case: Case) -> int:
    return 4 * case.q[0].numel() * case.read.shape[0]


def measure(case: Case, copy: float, backend: SDPBackend) -> Row:
    ratio = check(case, backend)
    ms = milliseconds([partial(case.kernel, cache) for cache in case.caches])
    gathered = [case.gather(cache) for cache in case.caches]
    sdpa_ms = milliseconds([partial(case.sdpa, pair, backend) for pair in gathered])
    both_ms = sdpa_ms
    if case.gathers:
        del gathered
        both_ms = milliseconds([partial(case.gather_sdpa, c, backend) for c in case.caches])
    return Row(
        model=case.model,
        length=case.caches[0][0].shape[2],
        rows=case.q.shape[2],
        keep=case.keep,
        keys=case.read.shape[0],
        tiling=short(tiling_for(case.q, case.caches[0][0], None)),
        ms=ms,
        tb_s=kept_bytes(case) / ms * 1e-9,
        tflop_s=flops(case) / ms * 1e-9,
        share_of_copy=kept_bytes(case) / (ms * 1e-3) / copy,
        sdpa_ms=sdpa_ms,
        gather_sdpa_ms=both_ms,
        error_over_sdpa=ratio,
    )


def short(t: Tiling) -> str:
    return f"{t.block_m}x{t.block_n} {t.splits} splits {t.warps} warps {t.stages} stages"


def candidates(case: Case) -> Iterator[Tiling]:
    """Some tilings of a shape: rows and keys a tile, warps, stages, programs a multiprocessor."""
    packed = case.q.shape[1] // case.caches[0][0].shape[1] * case.q.shape[2]
    shapes = [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 64, 8, 4)]
    shapes += [(64, 32, 8, 2), (64, 16, 8, 3)] if case.q.shape[3] > 256 else []
    if packed <= 32:
        shapes += [(32, 64, 4, 3), (32, 64, 4, 4)]
    if packed > 64:
        shapes += [(128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3)]
    device = device_limits(case.q.device)
    for block_m, block_n, warps, stages in shapes:
        programs = case.caches[0][0].shape[1] * -(-packed // block_m)
        counts = {choose_splits(programs, device.multiprocessors * n, 32) for n in (1, 2, 3)}
        for splits in sorted(counts):
            yield Tiling(block_m, block_n, splits, warps, stages)


def tune(case: Case, copy: float) -> dict[str, Any]:
    """The time of each candidate; one that does not fit the device is left out."""
    times = {}
    for tiling in candidates(case):
        try:
            calls = [partial(case.kernel, cache, tiling) for cache in case.caches]
            times[short(tiling)] = milliseconds(calls)
        except triton.runtime.errors.OutOfResources:
            continue
    best = sorted(times, key=times.__getitem__)
    own = milliseconds([partial(case.kernel, cache) for cache in case.caches])
    return {
        "model": case.model,
        "length": case.caches[0][0].shape[2],
        "rows": case.q.shape[2],
        "keep": case.keep,
        "chosen_ms": own,
        "best_ms": times[best[0]],
        "share_of_copy": kept_bytes(case) / (times[best[0]] * 1e-3) / copy,
        "tflop_s": flops(case) / times[best[0]] * 1e-9,
        "best": best[0],
        "second": f"{best[1]} ({times[best[1]]:.4f})",
        "third": f"{best[2]} ({times[best[2]]:.4f})",
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


@app.command()
def main(
    models: Annotated[str, typer.Option(help="llada, dream, diffusion-gemma.")] = "llada,dream",
    lengths: Annotated[str, typer.Option(help="Tokens in the cache.")] = "8192,16384,32768",
    rows: Annotated[str, typer.Option(help="Query rows.")] = "32,64,128",
    keep: Annotated[str, typer.Option(help="Share of blocks kept; 1 is dense.")] = "1,0.5,0.25",
    peer: Annotated[str, typer.Option(help="SDPA's backend: flash, cudnn or efficient.")] = "flash",
    tuned: Annotated[
        bool, typer.Option("--tune", help="Only time other tilings, at 8K and 32K, half kept.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time every shape."""
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    torch.manual_seed(0)
    copy = copy_bandwidth()
    console.print(f"{torch.cuda.get_device_name()}, copies at {copy * 1e-12:.2f} TB/s")
    if tuned:
        lengths, keep = "8192,32768", "0.5"
    found = []
    for model in models.split(","):
        for length in numbers(lengths):
            for share in numbers(keep):
                for count in numbers(rows):
                    case = Case.make(model, int(length), int(count), share)
                    if tuned:
                        found.append(tune(case, copy))
                    else:
                        found.append(asdict(measure(case, copy, PEERS[peer])))
    show("tilings" if tuned else "attention", found)
    if json_file is not None:
        where = environment.describe() | {
            "device": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "copy_tb_s": copy * 1e-12,
            "peer": peer,
        }
        json_file.write_text(json.dumps({"environment": where, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    app()
