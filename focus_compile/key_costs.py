"""What the keys of a step cost: choosing some in every layer, against reading all. Measured."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from focus_compile.kernels.attention.op import attention, attention_with_lse
from focus_compile.kernels.block_selection.op import select_blocks
from focus_compile.kernels.block_summaries.op import block_summaries
from focus_compile.kernels.sink_capture.op import capture_sinks
from focus_compile.kernels.sparse_attention.op import sparse_attention

__all__ = ["KeyCosts", "KeyShape", "key_costs"]

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 28
"""Caches that are read in turn, so that none is still in the GPU's own cache: 256 MiB."""
MARGIN = 0.9
"""Chosen keys must save a tenth: all keys are exact keys, and a choice must not hang on noise."""


@dataclass(frozen=True, slots=True)
class KeyShape:
    """What the layers from the sink capture on read, and by how many rows.

    blocks: key blocks of the prompt; kept: those that a sparse layer reads; sparse: sparse layers.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    rows: int
    key_block: int
    kept: int
    sinks: int
    block_summary: str
    sparse: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class KeyCosts:
    """Microseconds of the attention of one step in the layers from the sink capture on."""

    length: int
    rows: int
    sparse: float
    dense: float

    @property
    def dense_wins(self) -> bool:
        return self.dense * MARGIN < self.sparse

    def to_dict(self) -> dict[str, Any]:
        return {"length": self.length, "rows": self.rows, "sparse": self.sparse,
                "dense": self.dense, "dense_wins": self.dense_wins}  # fmt: skip

    def __str__(self) -> str:
        chosen = "all in every layer" if self.dense_wins else "some in the sparse layers"
        return (
            f"{chosen}: from the sink capture on, {self.rows} rows of a step attend in "
            f"{self.sparse:.0f} us to chosen keys and in {self.dense:.0f} us to all "
            f"{self.length:,} (measured on this device)"
        )


@functools.lru_cache(maxsize=256)
def key_costs(shape: KeyShape) -> KeyCosts | None:
    """Time both on random tensors, on a GPU as CUDA graphs; None if the device has no room."""
    try:
        with torch.no_grad():
            times = [_microseconds(call, shape.device) for call in _sparse_and_dense(shape)]
    except torch.OutOfMemoryError:
        log.info("no room to measure what keys cost; sparse layers choose theirs")
        return None
    return KeyCosts(shape.length, shape.rows, *times)


def _microseconds(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=0.05).median * 1e6)
    from triton.testing import do_bench_cudagraph

    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        return float(do_bench_cudagraph(call, rep=10) * 1e3)


def _sparse_and_dense(shape: KeyShape) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The two ways through the layers from the sink capture on, as functions without arguments."""
    s = shape
    options: dict[str, Any] = {"dtype": s.dtype, "device": s.device}
    one = s.batch * s.kv_heads * s.length * s.head_dim * s.dtype.itemsize
    copies = min(s.sparse + 1, max(1, CACHE_BYTES // (2 * one)))
    size = (copies, s.batch, s.kv_heads, s.length, s.head_dim)
    keys, values = torch.randn(size, **options), torch.randn(size, **options)
    summaries = [block_summaries(k, s.key_block, s.block_summary) for k in keys]
    q = torch.randn(s.batch, s.heads, s.rows, s.head_dim, **options)
    weight = torch.ones(s.batch, s.rows, device=s.device)
    blocks = s.length // s.key_block
    candidates = torch.full((s.batch,), blocks, device=s.device)
    keep = torch.full((s.batch,), min(s.kept, blocks), device=s.device)
    scale = s.head_dim**-0.5

    def sparse() -> Tensor:
        out, lse = attention_with_lse(q, keys[0], values[0], None, scale)
        limit = candidates * s.key_block
        sinks = capture_sinks(q, keys[0], lse, weight, None, limit, s.sinks, scale)
        for layer in range(s.sparse):
            at = (layer + 1) % copies
            chosen = select_blocks(q, weight, summaries[at], candidates, keep)
            out = sparse_attention(
                q, keys[at], values[at], chosen, sinks, candidates, s.key_block, None, scale
            )
        return out

    def dense() -> Tensor:
        for layer in range(s.sparse + 1):
            out = attention(q, keys[layer % copies], values[layer % copies], None, scale)
        return out

    return sparse, dense
