"""The least time that a call can take on a device: bytes over bandwidth, FLOPs over GEMM speed.

A step reads every weight once and the keys and values that its layers attend to:

    step bytes = 2 * (layers * layer_parameters + head_parameters)
               + sum over layers of keys_read * 2 * kv_heads * head_dim * 2
    keys_read  = length                                       in a dense layer
               = keep * key_block + (length - prompt blocks)  in a sparse layer
    keep       = ceil(keep_ratio * (prompt // key_block))

Sinks may lie inside kept blocks, so they are not counted; activations and block summaries are not
counted either. A full pass (vanilla, or a refresh) must do

    FLOPs = 2 * rows * ((layers - 1) * layer_parameters + key_value_parameters)
          + 4 * (layers - 1) * heads * head_dim * rows * length + 2 * needed * head_parameters

where the last layer and the head are only needed for `needed` rows, those whose logits are read
(for the last layer's other matrices and attention they are left out: this is a lower bound).
A step's FLOPs are the same with its own rows in all layers and the keys that each layer reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.suite.ceilings import Ceilings
from benchmarks.suite.policy import FocusSettings
from benchmarks.suite.shapes import Shape

__all__ = ["Floor", "full_pass_floor", "keys_read", "step_floor"]

BYTES = 2
"""bf16."""


@dataclass(frozen=True)
class Floor:
    """Work of one call, and the milliseconds it takes at the ceilings."""

    gigabytes: float
    teraflops: float
    bytes_ms: float
    flops_ms: float
    impossible_ms: float
    """No measured time may be below this: the same with the fastest bandwidth seen."""

    @property
    def ms(self) -> float:
        return max(self.bytes_ms, self.flops_ms)


def keys_read(shape: Shape, length: int, prompt: int, settings: FocusSettings | None) -> list[int]:
    """Keys that each layer of a step reads; `settings` None reads all in every layer."""
    if settings is None:
        return [length] * shape.layers
    candidates = prompt // settings.key_block
    keep = min(candidates, math.ceil(settings.keep_ratio * candidates))
    sparse = length - (candidates - keep) * settings.key_block
    regions = settings.regions(shape.layers)
    return [sparse if region == "sparse" else length for region in regions]


def step_floor(
    shape: Shape,
    length: int,
    prompt: int,
    rows: float,
    settings: FocusSettings | None,
    ceilings: Ceilings,
    width: int = BYTES,
) -> Floor:
    """Floor of a step of `rows` rows."""
    keys = sum(keys_read(shape, length, prompt, settings))
    weights = shape.layers * shape.layer_parameters + shape.head_parameters
    size = width * (weights + keys * 2 * shape.kv_heads * shape.head_dim)
    flops = 2 * rows * weights + 4 * shape.heads * shape.head_dim * rows * keys
    return _floor(size, flops, ceilings)


def full_pass_floor(
    shape: Shape, length: int, needed: int, ceilings: Ceilings, width: int = BYTES
) -> Floor:
    """Floor of a forward over all rows whose logits are read at `needed` of them."""
    deep = (shape.layers - 1) * shape.layer_parameters + shape.key_value_parameters
    attention = 4 * (shape.layers - 1) * shape.heads * shape.head_dim * length * length
    flops = 2 * length * deep + attention + 2 * needed * shape.head_parameters
    weights = shape.layers * shape.layer_parameters + shape.head_parameters
    return _floor(width * weights, flops, ceilings)


def _floor(size: float, flops: float, ceilings: Ceilings) -> Floor:
    flops_ms = flops / ceilings.gemm_tflop_s / 1e9
    return Floor(
        gigabytes=size / 1e9,
        teraflops=flops / 1e12,
        bytes_ms=size / ceilings.copy_tb_s / 1e9,
        flops_ms=flops_ms,
        impossible_ms=max(size / ceilings.fastest_tb_s / 1e9, flops_ms),
    )
