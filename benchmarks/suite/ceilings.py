"""What the device can do, measured in the same run as everything that is held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

__all__ = ["Ceilings", "gemm_tflop_s", "measure_ceilings", "synchronize"]


@dataclass(frozen=True)
class Ceilings:
    """copy_tb_s counts bytes read and written; read_tb_s bytes read by a reduction."""

    copy_tb_s: float
    read_tb_s: float
    gemm_tflop_s: float

    @property
    def fastest_tb_s(self) -> float:
        """What nothing that reads memory can exceed, for the check of measured times."""
        return max(self.copy_tb_s, self.read_tb_s)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Best of several runs: a ceiling is what was reached at least once."""
    big = device.type == "cuda"
    copy, read = _bandwidth(device, 1 << 31 if big else 1 << 25)
    shapes = [(8192,) * 3, (32768, 4096, 12288)] if big else [(512,) * 3]
    return Ceilings(copy, read, max(_gemm(device, *shape) for shape in shapes))


def _bandwidth(device: torch.device, size: int) -> tuple[float, float]:
    """TB/s of a copy of `size` bytes, and of a reduction over them."""
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device)
    read = _best_seconds(source.amax, device)
    return 2 * size / copy / 1e12, size / read / 1e12


def gemm_tflop_s(device: torch.device) -> float:
    """A short matrix product, to see whether the clock drifts between arms."""
    side = 8192 if device.type == "cuda" else 512
    return _gemm(device, side, side, side)


def _gemm(device: torch.device, rows: int, inner: int, columns: int) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    seconds = _best_seconds(lambda: left @ right, device)
    return 2 * rows * inner * columns / seconds / 1e12


def _best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    best = float("inf")
    for _ in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
