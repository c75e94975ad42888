"""Focus-dLLM (arXiv 2602.02159) in eager PyTorch: gathered keys, attention by SDPA.

At block entry all rows and all K/V are computed. A step computes windows around the masked
positions of the block that were most confident; the first layers read all keys, one layer picks
the sinks, and the sparse layers read the prompt's most relevant blocks, the sinks and everything
after the prompt's whole blocks. The head runs on rows around the block only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.suite.loop import Canvas, Ran
from benchmarks.suite.peers.layers import Layers, attend
from benchmarks.suite.policy import FocusSettings

__all__ = ["FocusEager"]


class FocusEager:
    """(e) Focus-dLLM, eager, with gathered keys."""

    letter = "e"
    row_multiple = 1
    """Steps are padded to a multiple of this by repeating a row."""

    def __init__(self, model: nn.Module, settings: FocusSettings):
        self.layers = Layers(model)
        self.settings = settings
        self.regions = settings.regions(self.layers.count)
        self.ran = Ran("refresh", 0, 0)
        self.release()

    def release(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.summaries: dict[int, Tensor] = {}
        self.logits = torch.empty(0)
        self.entered = -1

    def begin(self, canvas: Canvas) -> None:
        self.release()
        self.cos, self.sin = self.layers.positions(canvas.length, canvas.ids.device)
        self.tail_start = self.settings.candidates(canvas.prompt) * self.settings.key_block
        positions = torch.arange(canvas.length, device=canvas.ids.device)
        self.in_tail = positions >= self.tail_start

    @torch.no_grad()
    def __call__(self, canvas: Canvas, block: slice) -> Tensor:
        if block.start != self.entered:
            self._refresh(canvas, block)
        else:
            self._step(canvas, block)
        self.seen = canvas.ids[0].clone()
        return self.logits[block.start - self.first : block.stop - self.first]

    def _refresh(self, canvas: Canvas, block: slice) -> None:
        for cache in (self.keys, self.values, self.summaries):
            cache.clear()

        def store(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (self.layers.rotate(x, self.cos, self.sin) for x in (q, k))
            self.keys.append(k)
            self.values.append(v)
            if self.regions[layer] == "sparse":
                self.summaries[layer] = self._summarise(k)
            return attend(q, k, v)

        hidden = self.layers.run(canvas.ids[0], store)
        # Windows reach a little past the block on both sides.
        self.first = max(0, block.start - self.settings.window)
        reached = hidden[self.first : block.stop + self.settings.window]
        self.logits = self.layers.head(reached)
        self.confidence = self._confidence(self.logits)
        self.entered = block.start
        self.ran = Ran("refresh", canvas.length, canvas.length)

    def _summarise(self, k: Tensor) -> Tensor:
        """Bounding box of each prompt block's keys, [Hkv, blocks, 2 d] float32."""
        size = self.settings.key_block
        blocks = k[0, :, : self.tail_start].unflatten(1, (self.tail_start // size, size))
        return torch.cat([blocks.amax(2), blocks.amin(2)], -1).float()

    @staticmethod
    def _confidence(logits: Tensor) -> Tensor:
        return logits.float().softmax(-1).amax(-1)

    def _step(self, canvas: Canvas, block: slice) -> None:
        rows, focus, real = self._choose_rows(canvas, block)
        cos, sin = self.cos[:, rows], self.sin[:, rows]
        sinks = rows[:0]

        def attend_cached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal sinks
            q, k = (self.layers.rotate(x, cos, sin) for x in (q, k))
            keys = self.keys[layer].index_copy_(2, rows, k)
            values = self.values[layer].index_copy_(2, rows, v)
            if self.regions[layer] == "sparse":
                blocks = self._choose_blocks(self.summaries[layer], q, focus)
                return self._sparse(q, keys, values, blocks, sinks)
            if self.regions[layer] == "capture":
                sinks = self._choose_sinks(q, keys, real)
            return attend(q, keys, values)

        logits = self.layers.head(self.layers.run(canvas.ids[0, rows], attend_cached))
        self.logits.index_copy_(0, rows - self.first, logits)
        self.confidence.index_copy_(0, rows - self.first, self._confidence(logits))

    def _choose_rows(self, canvas: Canvas, block: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(active rows [R] int64, focus weight [R], 1 for a row that is no padding [R]).

        The one place where a step waits for the device: the number of rows.
        """
        settings, ids = self.settings, canvas.ids[0]
        changed = ids != self.seen
        masked = ids[block] == canvas.mask_token_id
        confidence = self.confidence[block.start - self.first : block.stop - self.first]
        scores = torch.where(masked, confidence, -1.0)
        rank = scores.argsort(descending=True, stable=True).argsort()
        focus = torch.zeros_like(changed)
        focus[block] = masked & (rank < settings.expansion * changed.sum().clamp(min=1))
        before, after = (settings.window - 1) // 2, settings.window // 2
        padded = functional.pad(focus.float()[None], (after, before))
        around = functional.max_pool1d(padded, settings.window, stride=1)[0] > 0
        rows = (around | changed).nonzero()[:, 0]
        count = len(rows)
        padding = -count % self.row_multiple
        self.ran = Ran("step", count, count + padding, all_keys=False)
        real = torch.ones_like(rows, dtype=torch.float32)
        if padding:
            rows = torch.cat([rows, rows[:1].expand(padding)])
            real = functional.pad(real, (0, padding))
        return rows, focus[rows].float() * real, real

    def _choose_sinks(self, q: Tensor, k: Tensor, real: Tensor) -> Tensor:
        """Prompt positions that the active rows of all heads attend to most."""
        group = q.shape[1] // k.shape[1]
        queries = q[0].unflatten(0, (-1, group)).flatten(1, 2)  # [Hkv, g R, d]
        scores = (queries @ k[0].transpose(1, 2)).float() * q.shape[-1] ** -0.5
        received = real.repeat(group) @ scores.softmax(-1)  # [Hkv, T]
        prompt = received.sum(0)[: self.tail_start]
        return prompt.topk(min(self.settings.sink_tokens, len(prompt))).indices

    def _choose_blocks(self, summaries: Tensor, q: Tensor, focus: Tensor) -> Tensor:
        """Ids of the prompt blocks to keep: largest mean over focus rows and heads of q . bound."""
        queries = q[0].float()
        split = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], -1)  # [H, R, 2 d]
        per_head = (focus @ split).unflatten(0, (len(summaries), -1)).sum(1)  # [Hkv, 2 d]
        scores = (summaries @ per_head[:, :, None]).sum((0, 2))
        return scores.topk(self._keep(len(scores))).indices

    def _keep(self, candidates: int) -> int:
        return self.settings.keep(candidates * self.settings.key_block)

    def _kept_tokens(self, blocks: Tensor, sinks: Tensor) -> Tensor:
        """Positions that a sparse layer reads, bool [T]."""
        kept = self.in_tail.clone()
        size = self.settings.key_block
        kept[: self.tail_start].unflatten(0, (self.tail_start // size, size))[blocks] = True
        kept[sinks] = True
        return kept

    def _sparse(
        self, q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, sinks: Tensor
    ) -> Tensor:
        """Attention over the union of kept blocks, sinks and tail."""
        at = self._kept_tokens(blocks, sinks).nonzero()[:, 0]
        return attend(q, keys.index_select(2, at), values.index_select(2, at))

    def poison(self) -> None:
        """What was handed out is this arm's own, and read again."""
