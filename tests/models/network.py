"""The transformer of a `ModelSpec`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.models.attention import Attention
from tests.models.layers import MLP, Head, Weights, embedding, norm
from tests.models.mixers import FeatureNearMiss, IdsNearMiss, Mixer
from tests.models.positions import LearnedPositions, Masks, Rotation
from tests.models.spec import ModelSpec


@dataclass
class ModelOutput:
    """What a model of `output="dataclass"` returns."""

    logits: Tensor
    loss: Tensor | None = None


def _mixer(spec: ModelSpec, weights: Weights, place: str, width: int) -> nn.Module:
    if spec.mixer is None or spec.mixer_place != place:
        return nn.Identity()
    return Mixer(spec.mixer, weights.under("mixer"), width)


class Block(nn.Module):
    """One layer: [B, T, hidden] to the same."""

    def __init__(self, spec: ModelSpec, weights: Weights, last: bool) -> None:
        super().__init__()

        def mixer(place: str, width: int) -> nn.Module:
            return _mixer(spec, weights, place, width) if last else nn.Identity()

        keys = mixer("keys", spec.kv_heads * spec.head_dim)
        self.pre = spec.norm_place == "pre"
        self.parallel = spec.parallel
        self.attention = Attention(spec, weights.under("attention"), keys)
        self.mlp = MLP(spec, weights.under("mlp"), mixer("flat", spec.hidden))
        self.norm = norm(spec, weights, "norm", spec.hidden)
        if not spec.parallel:
            self.mlp_norm = norm(spec, weights, "mlp_norm", spec.hidden)
        self.near_miss = FeatureNearMiss(spec, weights.under("near_miss"))
        self.mixer = mixer("residual", spec.hidden)

    def forward(
        self,
        hidden: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        source = self.norm(hidden) if self.pre else hidden
        attended = hidden + self.attention(source, mask, rotation)
        if self.parallel:
            hidden = self.between(attended + self.mlp(source), ids)
            return hidden if self.pre else self.norm(hidden)
        if self.pre:
            hidden = self.between(attended, ids)
            return hidden + self.mlp(self.mlp_norm(hidden))
        hidden = self.between(self.norm(attended), ids)
        return self.mlp_norm(hidden + self.mlp(hidden))

    def between(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return self.mixer(self.near_miss(hidden, ids))


class Dllm(nn.Module):
    """Ids [B, T] int64 and optionally `attention_mask` [B, T] to logits [B, T, vocab]."""

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        super().__init__()
        weights = Weights(seed)
        self.spec = spec
        self.embedding = embedding(weights, "embedding", spec.vocab, spec.hidden)
        self.positions = LearnedPositions(spec, weights) if spec.position == "learned" else None
        self.near_miss = IdsNearMiss(spec, weights.under("near_miss"))
        self.rotation = Rotation(spec) if spec.position.startswith("rope") else None
        self.masks = Masks(spec)
        self.layers = nn.ModuleList(
            Block(spec, weights.under(f"layers.{index}"), last=index == spec.layers - 1)
            for index in range(spec.layers)
        )
        self.mixer = _mixer(spec, weights, "head", spec.hidden)
        pre = spec.norm_place == "pre"
        self.norm = norm(spec, weights, "norm", spec.hidden) if pre else nn.Identity()
        tied = self.embedding.weight if spec.tied else None
        self.head = Head(spec, weights.under("head"), tied)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor] | ModelOutput:
        hidden = self.embedding(input_ids)
        if self.positions is not None:
            hidden = hidden + self.positions(input_ids)
        extra = self.near_miss(input_ids)
        if extra is not None:
            hidden = hidden + extra
        mask = self.masks(input_ids, attention_mask, hidden.dtype)
        rotation = None if self.rotation is None else self.rotation(hidden)
        for layer in self.layers:
            hidden = layer(hidden, input_ids, mask, rotation)
        logits = self.head(self.norm(self.mixer(hidden)))
        if self.spec.output == "tensor":
            return logits
        return (logits,) if self.spec.output == "tuple" else ModelOutput(logits=logits)


def build(spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> Dllm:
    """The spec's model in eval mode, with random weights large enough that attention matters."""
    return Dllm(spec, seed).to(dtype).eval()


def logits_of(output: object) -> Tensor:
    """The logits [B, T, V] in whatever a model returned."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    logits = getattr(output, "logits", None)
    assert isinstance(logits, Tensor), f"no logits in {type(output).__name__}"
    return logits
