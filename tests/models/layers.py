"""Weights by name, and the token-wise layers: norms, projections, MLP, head."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.spec import ModelSpec

EPSILON = 1e-5


class Weights:
    """Random weights by name: one seed and name give one value, whatever the spelling."""

    def __init__(self, seed: int, prefix: str = "") -> None:
        self.seed = seed
        self.prefix = prefix

    def under(self, name: str) -> Weights:
        return Weights(self.seed, f"{self.prefix}{name}.")

    def draw(self, name: str, *shape: int, std: float = 1.0) -> Tensor:
        """Normal float32 values; drawn alike for every dtype, so that twins share them."""
        key = f"{self.seed}/{self.prefix}{name}".encode()
        generator = torch.Generator().manual_seed(zlib.crc32(key))
        return std * torch.randn(shape, generator=generator)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> Tensor:
        """[rows, columns] that turns unit-variance inputs into outputs of std `gain`."""
        return self.draw(name, rows, columns, std=gain * float(columns) ** -0.5)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear with weight [out, in] and bias [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def linear(
    weights: Weights, names: Sequence[str], rows: int, columns: int, bias: bool, gain: float = 1.0
) -> nn.Linear:
    """One projection holding the named ones, each [rows, columns], one under another."""
    matrices = [weights.matrix(f"{name}.weight", rows, columns, gain) for name in names]
    biases = [weights.draw(f"{name}.bias", rows, std=0.2) for name in names]
    return linear_of(torch.cat(matrices), torch.cat(biases) if bias else None)


def embedding(
    weights: Weights, name: str, rows: int, columns: int, std: float = 0.5
) -> nn.Embedding:
    return nn.Embedding.from_pretrained(weights.draw(name, rows, columns, std=std), freeze=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 as transformers does."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        return self.weight * wide.to(x.dtype)


class FunctionalRMSNorm(RMSNorm):
    """The same through F.rms_norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPSILON)


def norm(spec: ModelSpec, weights: Weights, name: str, width: int) -> nn.Module:
    """The spec's norm over the last axis of `width`."""
    weight = 1 + weights.draw(f"{name}.weight", width, std=0.2)
    if spec.norm == "rmsnorm":
        return RMSNorm(weight)
    if spec.norm == "functional_rmsnorm":
        return FunctionalRMSNorm(weight)
    layer = nn.LayerNorm(width, eps=EPSILON)
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(weights.draw(f"{name}.bias", width, std=0.1))
    return layer


class MLP(nn.Module):
    """[B, T, hidden] to the same, through [B * T, hidden] if the spec says flatten."""

    def __init__(self, spec: ModelSpec, weights: Weights, mixer: nn.Module) -> None:
        super().__init__()
        width = 2 * spec.hidden
        self.flatten = spec.flatten
        self.gated = spec.mlp == "swiglu"
        self.fused = self.gated and spec.projection != "separate"
        self.mixer = mixer
        if self.fused:
            self.gate_up = linear(weights, ["gate", "up"], width, spec.hidden, spec.bias)
        else:
            self.up = linear(weights, ["up"], width, spec.hidden, spec.bias)
        if self.gated and not self.fused:
            self.gate = linear(weights, ["gate"], width, spec.hidden, spec.bias)
        self.down = linear(weights, ["down"], spec.hidden, width, spec.bias)

    def inner(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return F.silu(gate) * up
        if self.gated:
            return F.silu(self.gate(x)) * self.up(x)
        return F.gelu(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.flatten:
            return self.down(self.inner(x))
        batch, length, hidden = x.shape
        tokens = self.mixer(x.reshape(1, -1, hidden)).view(-1, hidden)
        return self.down(self.inner(tokens)).view(batch, length, hidden)


class Head(nn.Module):
    """Hidden states [B, T, hidden] to logits [B, T, vocab]."""

    def __init__(self, spec: ModelSpec, weights: Weights, tied: Tensor | None) -> None:
        super().__init__()
        bert = spec.head == "bert"
        self.transform = nn.Sequential()
        if bert:
            dense = linear(weights, ["dense"], spec.hidden, spec.hidden, True)
            self.transform = nn.Sequential(
                dense, nn.GELU(), norm(spec, weights, "norm", spec.hidden)
            )
        self.decoder = linear(weights, ["decoder"], spec.vocab, spec.hidden, bert or spec.bias, 2.0)
        if tied is not None:
            self.decoder.weight = tied

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))
