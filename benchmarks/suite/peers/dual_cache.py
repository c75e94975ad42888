"""Fast-dLLM's dual cache (arXiv 2505.22618) in eager PyTorch, as its authors run it.

Their code caches keys before RoPE, so every layer of every step applies it to all of them; the
block's rows are replaced in place; keys and values of grouped heads are repeated; the head runs on
every row that was fed, all of them in the pass that enters a block. Kinder than theirs: RoPE in the
model's dtype rather than in float32, no fp64 softmax over all fed rows, no unused attention bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.suite.loop import Canvas, Ran
from benchmarks.suite.peers.layers import Layers

__all__ = ["FastDllm"]


class FastDllm:
    """(c) Dual cache, eager."""

    letter = "c"

    def __init__(self, model: nn.Module):
        self.layers = Layers(model)
        self.ran = Ran("refresh", 0, 0)
        self.release()

    def release(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.entered = -1

    def begin(self, canvas: Canvas) -> None:
        self.release()
        self.cos, self.sin = self.layers.positions(canvas.length, canvas.ids.device)

    @torch.no_grad()
    def __call__(self, canvas: Canvas, block: slice) -> Tensor:
        if block.start != self.entered:
            return self._refresh(canvas, block)
        count = block.stop - block.start
        self.ran = Ran("step", count, count)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][:, :, block] = k
            self.values[layer][:, :, block] = v
            return self._attend(layer, q, block)

        return self.layers.head(self.layers.run(canvas.ids[0, block], attend))

    def _refresh(self, canvas: Canvas, block: slice) -> Tensor:
        self.keys.clear()
        self.values.clear()
        everything = slice(0, canvas.length)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys.append(k)
            self.values.append(v)
            return self._attend(layer, q, everything)

        logits = self.layers.head(self.layers.run(canvas.ids[0], attend))
        self.entered = block.start
        self.ran = Ran("refresh", canvas.length, canvas.length)
        return logits[block]

    def _attend(self, layer: int, q: Tensor, rows: slice) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        q = self.layers.rotate(q, self.cos[:, rows], self.sin[:, rows])
        k = self.layers.rotate(keys, self.cos, self.sin)
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k = k.repeat_interleave(group, 1)
            values = values.repeat_interleave(group, 1)
        return nn.functional.scaled_dot_product_attention(q, k, values)

    def poison(self) -> None:
        """Nothing that was handed out is read again."""
