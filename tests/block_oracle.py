"""Block diffusion written slowly and obviously, as the judge of `BatchGenerator`.

One sequence, one stock transformers decoder (Qwen2, Qwen3, Llama), layer by layer out of the
model's own submodules. Keys and values are dictionaries from position to tensor, so that a row that
was never computed cannot be read. Nothing here knows of lists of rows, padding, slots or graphs.

    oracle = BlockOracle(model, block_length=8, mask_token_id=39, policy="focus-evict", alpha=1.5)
    run = oracle.generate(prompt, max_new_tokens=20)
    run.tokens, run.steps[0].listed, run.steps[0].kept, run.steps[0].decoded, run.margin
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BlockOracle", "OracleStep", "Run"]

SAME = 1e-4
"""Two scores closer than this may swap in another order of the same float32 arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `BatchGenerator`, with its meaning, and those of its choice of keys.

    model_first: the first forward of a response is the model's own, as under torch.compile.
    """

    block_length: int
    mask_token_id: int
    policy: str = "focus-evict"
    threshold: float = 0.9
    alpha: float = 1.5
    commit: str = "exact"
    cut: int = 1
    max_length: int = 1 << 30
    keep_ratio: float = 0.5
    key_block: int = 32
    dense_layers: int | None = None
    dense_tail_layers: int = 0
    sink_tokens: int = 16
    block_summary: str = "bound"
    model_first: bool = False


@dataclass
class OracleStep:
    """One forward of one sequence. All positions are absolute and ascending."""

    commits: bool
    """Whether it only finishes the K/V of a decided block."""
    listed: list[int]
    kept: list[int]
    """The rows that went through all layers."""
    visible: int
    """Keys that the kept rows saw at the last layer: positions 0 to this."""
    left_out: dict[int, list[int]]
    """Key blocks that were not read, by layer."""
    logits: dict[int, Tensor]
    """[V] of each kept masked row, before the mask token is ruled out."""
    decoded: list[int] = field(default_factory=list)


@dataclass
class Run:
    tokens: list[int]
    """The response, no longer than was asked for."""
    steps: list[OracleStep]
    margin: float
    """Smallest gap of all choices, of the order of a probability. Below `SAME`, two correct
    implementations may choose differently."""

    @property
    def clear(self) -> bool:
        return self.margin > SAME


@dataclass
class Sequence:
    """tokens: of all positions so far; keys, values [H_kv, d]: per layer, by position."""

    tokens: list[int]
    keys: list[dict[int, Tensor]]
    values: list[dict[int, Tensor]]
    begin: int
    uncached: set[int]
    progress: int
    """The last position of the block that went through all layers, begin - 1 at first."""
    yields: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class BlockOracle:
    """A policy around one model. settings: see `Settings`."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.model, self.settings = model, Settings(**settings)
        self.layers = list(model.model.layers)

    @torch.no_grad()
    def generate(self, prompt: list[int], max_new_tokens: int) -> Run:
        """Blocks until there are enough tokens, or the next one would pass `max_length`."""
        length, mask = self.settings.block_length, self.settings.mask_token_id
        begin = len(prompt) // length * length
        nothing: list[dict[int, Tensor]] = [{} for _ in self.layers]
        sequence = Sequence(list(prompt), nothing, [{} for _ in self.layers], 0, set(), -1)
        for first in range(0, begin, length):
            self._forward(sequence, list(range(first, first + length)), commits=True)
        steps: list[OracleStep] = []
        while True:
            sequence.tokens += [mask] * (begin + length - len(sequence.tokens))
            sequence.begin, sequence.progress, sequence.yields = begin, begin - 1, []
            sequence.uncached = set(range(begin, begin + length))
            while self._masked(sequence):
                steps.append(self._step(sequence, self.settings.model_first and not steps))
            begin += length
            full = begin + length > self.settings.max_length
            if begin - len(prompt) >= max_new_tokens or full:
                break
            steps.append(self._commit(sequence))
        response = sequence.tokens[len(prompt) :][:max_new_tokens]
        return Run(response, steps, min(sequence.gaps, default=math.inf))

    def _block(self, sequence: Sequence) -> list[int]:
        return list(range(sequence.begin, sequence.begin + self.settings.block_length))

    def _masked(self, sequence: Sequence) -> list[int]:
        """Undecided positions of the block."""
        mask = self.settings.mask_token_id
        return [p for p in self._block(sequence) if sequence.tokens[p] == mask]

    def _step(self, sequence: Sequence, exact: bool) -> OracleStep:
        whole = self.settings.policy == "block-diffusion"
        listed = self._block(sequence) if whole else sorted(sequence.uncached)
        step = self._forward(sequence, listed, commits=False, exact=exact)
        sequence.progress = max(sequence.progress, *step.kept)
        self._freeze(sequence, step)
        self._decode(sequence, step)
        if step.decoded:
            sequence.yields.append(len(step.decoded))
        return step

    def _commit(self, sequence: Sequence) -> OracleStep:
        delayed = self.settings.policy != "block-diffusion" and self.settings.commit == "delayed"
        listed = sorted(sequence.uncached) if delayed else self._block(sequence)
        return self._forward(sequence, listed, commits=True)

    def _freeze(self, sequence: Sequence, step: OracleStep) -> None:
        """Rows that were computed while they and their right neighbours were decided."""
        masked, last = self._masked(sequence), self._block(sequence)[-1]
        for p in step.kept:
            if p not in masked and (p == last or p + 1 not in masked):
                sequence.uncached.discard(p)

    def _decode(self, sequence: Sequence, step: OracleStep) -> None:
        confidence, tokens = {}, {}
        for p, logits in step.logits.items():
            allowed = logits.float().clone()
            allowed[self.settings.mask_token_id] = -math.inf
            probability = allowed.softmax(-1)
            tokens[p] = int(probability.argmax())
            confidence[p] = float(probability[tokens[p]])
            first, second = probability.topk(2).values.tolist()
            sequence.gaps.append(first - second)
        threshold = self.settings.threshold
        order = sorted(confidence, key=lambda p: (-confidence[p], p))
        sequence.gaps += [abs(c - threshold) for c in confidence.values()]
        if len(order) > 1 and confidence[order[0]] < threshold:
            sequence.gaps.append(confidence[order[0]] - confidence[order[1]])
        step.decoded = sorted(p for p in order if p == order[0] or confidence[p] >= threshold)
        for p in step.decoded:
            sequence.tokens[p] = tokens[p]

    def _forward(
        self, sequence: Sequence, listed: list[int], *, commits: bool, exact: bool = False
    ) -> OracleStep:
        """Layer by layer; with the policies that evict, rows leave behind the cut's keys and
        values. What commits, or is `exact`, reads all keys."""
        masked = [] if commits else self._masked(sequence)
        policy = self.settings.policy
        evicts = policy in ("focus-evict", "focus-dllm+evict") and bool(masked) and not exact
        left_out: dict[int, list[int]] = {}
        rows, extent = listed, self._extent(sequence, listed)
        hidden = self.model.model.embed_tokens(torch.tensor([sequence.tokens[p] for p in rows]))
        importance: dict[int, Tensor] = {}
        for at, layer in enumerate(self.layers):
            queries, keys, values = self._project(layer, hidden, rows)
            for row, p in enumerate(rows):
                sequence.keys[at][p], sequence.values[at][p] = keys[row], values[row]
            if evicts and at in (self.settings.cut - 1, self.settings.cut):
                where = [rows.index(p) for p in masked]
                importance[at] = self._importance(layer, queries[where], keys[where])
            if evicts and at == self.settings.cut:
                kept = self._keep(sequence, listed, masked, importance[at] - importance[at - 1])
                where = [rows.index(p) for p in kept]
                hidden, queries, rows = hidden[where], queries[where], kept
                extent = self._extent(sequence, kept)
            if policy == "focus-dllm+evict" and not (commits or exact):
                of_masked = [row for row, p in enumerate(rows) if p in masked]
                left_out[at] = self._left_out(sequence, at, queries[of_masked])
            size = self.settings.key_block
            seen = [p for p in range(extent) if p // size not in left_out.get(at, ())]
            attended = self._attend(
                layer,
                queries,
                torch.stack([sequence.keys[at][p] for p in seen]),
                torch.stack([sequence.values[at][p] for p in seen]),
            )
            hidden = hidden + layer.self_attn.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = self.model.lm_head(self.model.model.norm(hidden))
        of_masked = {p: logits[row] for row, p in enumerate(rows) if p in masked}
        return OracleStep(commits, listed, rows, extent, left_out, of_masked)

    def _left_out(self, sequence: Sequence, at: int, queries: Tensor) -> list[int]:
        """The finished key blocks that a layer does not read, by its masked rows' queries."""
        settings, layers = self.settings, len(self.layers)
        size, count = settings.key_block, sequence.begin // settings.key_block
        dense = settings.dense_layers
        if dense is None:
            dense = 6 if layers >= 18 else layers // 3
        if at < dense or at >= layers - settings.dense_tail_layers:
            return []
        sinks = min(count, math.ceil(settings.sink_tokens / size))
        keep = max(math.ceil(settings.keep_ratio * count), sinks)
        scores = []
        for j in range(count):
            keys = torch.stack([sequence.keys[at][p] for p in range(j * size, (j + 1) * size)])
            scores.append(self._relevance(queries, keys))
        order = sorted(range(sinks, count), key=lambda j: (-scores[j], j))
        kept, left_out = order[: keep - sinks], order[keep - sinks :]
        if kept and left_out and len(queries):
            largest = max(map(abs, scores))
            sequence.gaps.append((scores[kept[-1]] - scores[left_out[0]]) / largest)
        return sorted(left_out)

    def _relevance(self, queries: Tensor, keys: Tensor) -> float:
        """Of a block's keys [size, H_kv, d] to queries [R, H, d], summed over rows and heads."""
        total = 0.0
        for q in queries:
            for h in range(q.shape[0]):
                of_head = keys[:, h // (q.shape[0] // keys.shape[1])]
                if self.settings.block_summary == "mean":
                    total += float(q[h] @ of_head.mean(0))
                else:
                    total += float(
                        torch.maximum(q[h] * of_head.amax(0), q[h] * of_head.amin(0)).sum()
                    )
        return total

    def _extent(self, sequence: Sequence, rows: list[int]) -> int:
        """Keys seen: to the rightmost row that is computed now, or was frozen in this block."""
        frozen = set()
        if sequence.uncached:  # not while the prompt is computed
            frozen = set(self._block(sequence)) - sequence.uncached
        return max({*rows, *frozen}) + 1

    def _project(
        self, layer: nn.Module, hidden: Tensor, rows: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, H, d] and k [R, H_kv, d] after their norms and RoPE, and v [R, H_kv, d]."""
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        cos, sin = self.model.model.rotary_emb(hidden, torch.tensor([rows]))
        cos, sin = cos[0][:, None], sin[0][:, None]
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, d] over k, v [N, H_kv, d], as [R, H d]."""
        heads = []
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            scores = q[:, h] @ k[:, g].T * layer.self_attn.head_dim**-0.5
            heads.append(scores.softmax(-1) @ v[:, g])
        return torch.cat(heads, -1)

    def _importance(self, layer: nn.Module, q: Tensor, k: Tensor) -> Tensor:
        """Attention that the masked rows get of one another, [n] float32, over all heads."""
        count = len(q)
        total = torch.zeros(count)
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            scores = (q[:, h] @ k[:, g].T * layer.self_attn.head_dim**-0.5).float()
            pooled = torch.stack(
                [scores[:, max(0, j - 1) : j + 2].amax(1) for j in range(count)], 1
            )
            total += pooled.softmax(-1).sum(0)
        return total

    def _keep(
        self, sequence: Sequence, listed: list[int], masked: list[int], delta: Tensor
    ) -> list[int]:
        """Which of the listed rows go on: budget, then the constraints."""
        mean = sum(sequence.yields) / len(sequence.yields) if sequence.yields else 1.0
        wanted = self.settings.alpha * max(mean, 1.0)
        # 1.5 * (8 / 3) is 4, however it is rounded.
        target = len(masked) if math.isinf(wanted) else math.ceil(wanted - 1e-6)
        target = min(len(masked), max(1, target))
        chosen = self._chosen(sequence, masked, delta.tolist(), target)
        selected = set(chosen)
        selected |= {p for p in masked if p + 1 in chosen}
        selected = selected or set(masked)
        right = max(selected)
        selected |= {p for p in masked if sequence.progress < p < right}
        return [p for p in listed if p not in masked or p in selected]

    def _chosen(
        self, sequence: Sequence, masked: list[int], delta: list[float], target: int
    ) -> set[int]:
        """The outliers if there are enough, else the highest, of equal ones the leftmost."""
        count = len(masked)
        if count <= target:
            return set(masked)
        mean = sum(delta) / count
        std = math.sqrt(sum((d - mean) ** 2 for d in delta) / count)
        outliers = [at for at, d in enumerate(delta) if d - mean >= std * (1 - 1e-12)]
        order = sorted(range(count), key=lambda at: (-delta[at], at))
        chosen = outliers if len(outliers) >= target else order[:target]
        self._note_gaps(sequence, [delta[at] for at in order], len(chosen), target)
        return {masked[at] for at in chosen}

    def _note_gaps(
        self, sequence: Sequence, falling: list[float], chosen: int, target: int
    ) -> None:
        """How nearly another set would have been chosen. Exact ties are decided, not near."""
        if falling[0] == falling[-1]:
            return
        scale = self.model.config.num_attention_heads
        if chosen == target and falling[target - 1] != falling[target]:
            sequence.gaps.append((falling[target - 1] - falling[target]) / scale)
        mean = sum(falling) / len(falling)
        bar = mean + math.sqrt(sum((d - mean) ** 2 for d in falling) / len(falling))
        # Whether the first `target` are outliers changes nothing.
        sequence.gaps += [abs(d - bar) / scale for d in falling[target:]]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin
