"""The options of Focus-dLLM that the arms share, read from `FocusConfig`'s defaults."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from benchmarks.suite.shapes import Shape
from focus_compile import FocusConfig

__all__ = ["FocusSettings", "known_options"]


@dataclass(frozen=True)
class FocusSettings:
    """See `FocusConfig` for the meaning of each."""

    keep_ratio: float
    expansion: int
    window: int
    sink_tokens: int
    key_block: int
    capture_layer: int
    dense_tail_layers: int

    @classmethod
    def of(cls, shape: Shape, keep_ratio: float, **changed: Any) -> FocusSettings:
        """The defaults, with the shape's options and `changed` over them."""
        config = FocusConfig(**(shape.options | changed), keep_ratio=keep_ratio)
        return cls(
            keep_ratio=keep_ratio,
            expansion=config.expansion,
            window=config.window,
            sink_tokens=config.sink_tokens,
            key_block=config.key_block,
            capture_layer=config.dense_layers_for(shape.layers),
            dense_tail_layers=config.dense_tail_layers,
        )

    def regions(self, layers: int) -> list[str]:
        """ "dense", "capture" or "sparse" for each layer."""
        tail = layers - self.dense_tail_layers
        return [
            "capture"
            if layer == self.capture_layer
            else "dense"
            if layer < self.capture_layer or layer >= tail
            else "sparse"
            for layer in range(layers)
        ]

    def candidates(self, prompt: int) -> int:
        """Prompt blocks that a sparse layer chooses from."""
        return prompt // self.key_block

    def keep(self, prompt: int) -> int:
        """Prompt blocks that it keeps."""
        candidates = self.candidates(prompt)
        return min(candidates, math.ceil(self.keep_ratio * candidates))


def known_options(**options: Any) -> dict[str, Any]:
    """Those that this version's `FocusConfig` has."""
    names = {field.name for field in dataclasses.fields(FocusConfig)}
    return {name: value for name, value in options.items() if name in names}
