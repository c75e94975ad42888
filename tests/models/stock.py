"""Tiny stock transformers, with random weights large enough that attention matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from focus_compile.coverage import FAMILIES, IMPLEMENTATIONS, MASK, VOCABULARY, build

__all__ = ["IMPLEMENTATIONS", "MASK_TOKEN_ID", "STOCK", "VOCAB", "build_stock", "draw_weights"]

VOCAB, MASK_TOKEN_ID = VOCABULARY, MASK
STOCK = tuple(FAMILIES)


def build_stock(
    name: str,
    implementation: str = "sdpa",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """A tiny bidirectional stock model in eval mode, weights from `seed`.

    `implementation` is one of `IMPLEMENTATIONS`; `options` override the config
    (`is_causal=True` gives a decoder back its causal mask). One name and seed have the same
    weights under every implementation. The MoE's routing is discontinuous: no rounding bound
    holds where two experts nearly tie.
    """
    model = build(name, implementation, **options)
    if name.endswith("_moe"):
        model.set_experts_implementation("batched_mm")  # type: ignore[operator] # grouped_mm knows no float64
    draw_weights(model, torch.Generator().manual_seed(seed))
    model.to(dtype).eval()
    return model


def draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of unit gain (queries and keys 1.4), norms about one, embeddings of std 0.5."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = _scaled(name, noise, id(parameter) in embeddings)


def _scaled(name: str, noise: Tensor, embedding: bool) -> Tensor:
    if embedding:
        return 0.5 * noise
    if noise.ndim == 1:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise
    sharp = any(part in name for part in ("q_proj", "k_proj", "query", "key", "Wqkv", "att_proj"))
    return noise * (1.4 if sharp else 1.0) * noise.shape[-1] ** -0.5
