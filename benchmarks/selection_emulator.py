"""Focus-dLLM decoding by hand for `EuroBertForMaskedLM`, with every open choice a setting.

Only the rows that a step computes go through the layers, against K/V caches kept here, for many
sequences at once; keys that a site does not read are masked rather than skipped. Independent of the
compiler: it exists to choose its defaults.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.eurobert.modeling_eurobert import apply_rotary_pos_emb

__all__ = ["Answer", "Cache", "Choice", "Emulator", "Rows"]

CHUNK = 8
"""Most sequences in one full forward."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to decode. The fields of `FocusConfig` mean what they mean there."""

    policy: Literal["focus-dllm", "dual-cache", "dense"] = "focus-dllm"
    block_length: int = 32
    dense_layers: int = 3
    expansion: int = 4
    window: int = 8
    keep_ratio: float = 0.5
    sink_tokens: int = 16
    key_block: int = 32
    placement: Literal["after", "before"] = "after"
    """Which side of the focus row the extra row of an even window lies on."""
    summary: Literal["mean", "max", "bound", "peak", "mass"] = "mean"
    """What a focus row's query is compared with. mean, max: the mean or the largest entries of the
    block's keys. bound: q . k is at most this for any key between the block's least and largest
    entries. peak: the largest q . k in the block. mass: its share of the row's attention, the
    goal that the others estimate (a step cannot know it without reading every key)."""
    scores: Literal["dot", "softmax"] = "dot"
    """Whether a row's scores are compared as they are, or as softmax over the blocks."""
    rows: Literal["mean", "max"] = "mean"
    """How the scores of several rows become one."""
    heads: Literal["mean", "max", "kv"] = "mean"
    """How the scores of several heads become one; "kv": one list of blocks per key-value head."""
    queries: Literal["focus", "active"] = "focus"
    """Which rows score the blocks."""
    sinks_in_budget: bool = False
    """Whether sinks take the place of as many block tokens."""
    sink_rows: Literal["mean", "max"] = "mean"
    """How the attention that a key receives from several rows and heads becomes one number."""
    reuse: bool = False
    """Whether the blocks chosen at the first sparse site serve all others."""


@dataclass
class Answer:
    """What one batch decoded."""

    ids: Tensor
    """int64 [B, T], all decided."""
    predicted: int = 0
    """Positions decoded in steps that were focus rows of that step."""
    decoded: int = 0
    """Positions decoded in steps."""
    refreshes: int = 0


@dataclass
class Cache:
    """K and V [L, B, Hkv, T, d]; confidence and token [B, G] of the response's latest logits."""

    keys: Tensor
    values: Tensor
    confidence: Tensor
    tokens: Tensor

    def clone(self) -> Cache:
        """A copy that a trial step may write to."""
        parts = (self.keys, self.values, self.confidence, self.tokens)
        return Cache(*(part.clone() for part in parts))


@dataclass
class Rows:
    """Active rows int64 [B, R], padded by repetition; weights float [B, R], 0 on repetitions."""

    index: Tensor
    active: Tensor
    focus: Tensor


Watch = Callable[[Tensor, Cache, Rows, int], None]


@dataclass
class Emulator:
    """A model and the refreshes computed for it so far."""

    model: Any
    mask_token_id: int
    memory: int = 64
    """Most sequences whose refresh is remembered."""
    refreshed: OrderedDict[bytes, tuple[Tensor, ...]] = field(default_factory=OrderedDict)

    @torch.inference_mode()
    def decode(
        self, prompts: Tensor, response: int, choice: Choice, *, watch: Watch | None = None
    ) -> Answer:
        """Fill `response` masked positions after prompts int64 [B, P], one a step.

        watch: called before every step with what `step` is about to get.
        """
        batch, start = prompts.shape
        ids = functional.pad(prompts, (0, response), value=self.mask_token_id)
        answer, everyone = Answer(ids), torch.arange(batch, device=ids.device)
        changed = cache = None
        for call in range(response):
            first = call // choice.block_length * choice.block_length
            block = range(first, min(first + choice.block_length, response))
            open_ = ids[:, start:] == self.mask_token_id
            open_[:, : block.start] = open_[:, block.stop :] = False
            focus = None
            if changed is None or cache is None or choice.policy == "dense" or call == first:
                cache = self._refresh(ids, start, remember=choice.policy != "dense")
                answer.refreshes += 1
            else:
                focus = self._focus(open_, cache, start, choice)
                members = range(start + block.start, start + block.stop)
                rows = self._rows(focus, changed, members, ids.shape[1], choice)
                if watch:
                    watch(ids, cache, rows, start)
                self.step(ids, cache, rows, start, choice)
            column = cache.confidence.masked_fill(~open_, -1.0).argmax(1)
            changed = start + column
            if focus is not None:
                answer.predicted += int((focus == changed[:, None]).any(1).sum())
                answer.decoded += batch
            ids[everyone, changed] = cache.tokens[everyone, column]
        return answer

    def _refresh(self, ids: Tensor, start: int, *, remember: bool) -> Cache:
        names = [row.numpy().tobytes() for row in ids.cpu()]
        missing = [b for b, name in enumerate(names) if not remember or name not in self.refreshed]
        found = {}
        for some in (missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)):
            full = self._full(ids[some], start, keep=remember)
            for i, b in enumerate(some):
                one = slice(i, i + 1)
                found[b] = (full[0][:, one], full[1][:, one], full[2][one], full[3][one])
        for b, part in found.items():
            if remember:
                self.refreshed[names[b]] = part
        parts = [found.get(b) or self.refreshed[name] for b, name in enumerate(names)]
        cache = Cache(
            *(torch.cat([part[i] for part in parts], 1 if i < 2 else 0) for i in range(4))
        )
        while len(self.refreshed) > self.memory:
            self.refreshed.popitem()
        return cache

    def _full(self, ids: Tensor, start: int, *, keep: bool) -> tuple[Tensor, ...]:
        """All rows from all keys: K, V, and confidence and token of the response."""
        x = self.model.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = self.model.model.rotary_emb(x, position_ids=positions)
        keys, values = [], []
        for layer in self.model.model.layers:
            q, k, v = self._project(layer, x, rotary)
            x = self._finish(layer, x, _attend(q, k, v, None))
            if keep:
                keys.append(k)
                values.append(v)
        empty = x.new_zeros(1, len(ids), 0, 0, 0)
        kv = (torch.stack(keys), torch.stack(values)) if keep else (empty, empty)
        return (*kv, *self._logits(x[:, start:]).softmax(-1).max(-1))

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: Cache, rows: Rows, start: int, choice: Choice) -> Tensor:
        """Compute the rows, update the cache in place; logits [B, R, V]. start: prompt tokens."""
        x = self.model.model.embed_tokens(ids.gather(1, rows.index))
        rotary = self.model.model.rotary_emb(x, position_ids=rows.index)
        everyone = torch.arange(len(ids), device=ids.device)[:, None]
        prompt = start // choice.key_block * choice.key_block
        sinks = blocks = None
        for site, layer in enumerate(self.model.model.layers):
            q, k, v = self._project(layer, x, rotary)
            keys, values = cache.keys[site], cache.values[site]
            keys[everyone, :, rows.index] = k.transpose(1, 2)
            values[everyone, :, rows.index] = v.transpose(1, 2)
            mask = None
            if choice.policy == "focus-dllm" and prompt:
                if site == choice.dense_layers and choice.sink_tokens:
                    sinks = _sinks(q, keys, rows, prompt, choice)
                if site > choice.dense_layers:
                    if blocks is None or not choice.reuse:
                        blocks = _blocks(q, keys, rows, prompt, choice)
                    mask = _allowed(blocks, sinks, keys.shape[2], prompt, choice)
            x = self._finish(layer, x, _attend(q, keys, values, mask))
        logits = self._logits(x)
        confidence, tokens = logits.softmax(-1).max(-1)
        response = cache.confidence.shape[1]
        # Rows of the prompt have no place in the response: they go to a spare last column.
        at = rows.index - start
        at = torch.where(at < 0, response, at)
        for latest, new in ((cache.confidence, confidence), (cache.tokens, tokens)):
            spare = functional.pad(latest, (0, 1)).scatter_(1, at, new)
            latest.copy_(spare[:, :response])
        return logits

    def _project(self, layer: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            project(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return (*apply_rotary_pos_emb(q, k, *rotary), v)

    def _finish(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(x))
        return logits.float()

    def _focus(self, open_: Tensor, cache: Cache, start: int, choice: Choice) -> Tensor:
        """int64 [B, F]: the positions expected to decode; as many are open in every sequence."""
        count = int(open_[0].sum())
        if choice.policy == "focus-dllm":
            count = min(count, choice.expansion)
        scores = cache.confidence.masked_fill(~open_, -1.0)
        return start + scores.argsort(dim=1, descending=True, stable=True)[:, :count]

    def _rows(
        self, focus: Tensor, changed: Tensor, block: range, length: int, choice: Choice
    ) -> Rows:
        """Windows around the focus rows and the changed row, or the whole block."""
        if choice.policy == "dual-cache":
            index = torch.tensor(block, device=focus.device).expand(len(focus), -1)
        else:
            lead = (choice.window - 1) // 2
            if choice.placement == "before":
                lead = choice.window // 2
            offsets = torch.arange(-lead, choice.window - lead, device=focus.device)
            around = focus[..., None] + offsets
            around = torch.where(around < length, around, focus[..., None])
            index = torch.cat([around.flatten(1), changed[:, None]], 1).sort(1).values
        distinct = functional.pad(index[:, 1:] != index[:, :-1], (1, 0), value=True)
        chosen = (index[..., None] == focus[:, None]).any(-1) & distinct
        return Rows(index, distinct.float(), chosen.float())


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, H, R, d] on k, v [B, Hkv, T, d]; mask bool [B, 1 or Hkv, 1, T]."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return functional.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)


def _scaled(q: Tensor, k: Tensor) -> Tensor:
    """q [B, H, R, d] . k [B, Hkv, N, d] / sqrt(d), float32 [B, H, R, N]."""
    grouped = q.float().reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return (grouped @ k.float().mT / math.sqrt(q.shape[-1])).reshape(*q.shape[:3], -1)


def _sinks(q: Tensor, keys: Tensor, rows: Rows, prompt: int, choice: Choice) -> Tensor:
    """int64 [B, sink_tokens]: the prompt positions that receive most attention."""
    probability = _scaled(q, keys).softmax(-1)[..., :prompt] * rows.active[:, None, :, None]
    received = probability.amax((1, 2)) if choice.sink_rows == "max" else probability.sum((1, 2))
    return received.topk(min(choice.sink_tokens, prompt)).indices


def _blocks(q: Tensor, keys: Tensor, rows: Rows, prompt: int, choice: Choice) -> Tensor:
    """bool [B, 1 or Hkv, prompt // key_block]: the blocks to read."""
    scores = _relevance(q, keys, prompt, choice)
    if choice.scores == "softmax":
        scores = scores.softmax(-1)
    weight = (rows.focus if choice.queries == "focus" else rows.active)[:, None, :, None]
    if choice.rows == "max":
        scores = scores.masked_fill(weight == 0, -math.inf).amax(2)
    else:
        scores = (scores * weight).sum(2) / weight.sum(2)
    if choice.heads == "kv":
        scores = scores.unflatten(1, (keys.shape[1], -1)).mean(2)
    elif choice.heads == "max":
        scores = scores.amax(1, keepdim=True)
    else:
        scores = scores.mean(1, keepdim=True)
    count = scores.shape[-1]
    keep = math.ceil(choice.keep_ratio * count)
    if choice.sinks_in_budget:
        keep = max(1, round(keep - choice.sink_tokens / choice.key_block))
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _relevance(q: Tensor, keys: Tensor, prompt: int, choice: Choice) -> Tensor:
    """float32 [B, H, R, blocks]: how much each row wants each block."""
    size = choice.key_block
    tokens = keys[:, :, :prompt].float().unflatten(2, (-1, size))
    if choice.summary == "mean":
        return _scaled(q, tokens.mean(3))
    if choice.summary == "max":
        return _scaled(q, tokens.amax(3))
    if choice.summary == "bound":
        return _scaled(q.clamp(min=0), tokens.amax(3)) + _scaled(q.clamp(max=0), tokens.amin(3))
    if choice.summary == "peak":
        return _scaled(q, keys[:, :, :prompt]).unflatten(-1, (-1, size)).amax(-1)
    probability = _scaled(q, keys).softmax(-1)[..., :prompt]
    return probability.unflatten(-1, (-1, size)).sum(-1)


def _allowed(
    blocks: Tensor, sinks: Tensor | None, length: int, prompt: int, choice: Choice
) -> Tensor:
    """bool [B, 1 or Hkv, 1, T]: tokens of the blocks, sinks, and everything from `prompt` on."""
    tokens = blocks.repeat_interleave(choice.key_block, -1)
    allowed = functional.pad(tokens, (0, length - prompt), value=True)
    if sinks is not None:
        allowed.scatter_(-1, sinks[:, None].expand(-1, allowed.shape[1], -1), True)
    return allowed[:, :, None]
