"""The shapes that are measured: LLaDA-8B's and Dream-7B's, as stock models with random weights.

`EuroBertForMaskedLM` of transformers is their architecture: bidirectional attention with RoPE and
grouped query heads, RMSNorm before each part, SwiGLU. Random weights give compute ratios: how much
work a call does and how fast it runs, nothing about answers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["SHAPES", "Shape", "build"]

STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """One model's sizes. `options` are what its focus arms set beside `FocusConfig`'s defaults."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    mask_token_id: int
    rope_theta: float
    head_dim: int = 128
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices: q, k, v, o, gate, up, down."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def key_value_parameters(self) -> int:
        """The part of `layer_parameters` that makes keys and values."""
        return 2 * self.hidden * self.head_dim * self.kv_heads

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocabulary

    def with_layers(self, layers: int) -> Shape:
        """The same shape, less deep."""
        return dataclasses.replace(self, layers=min(layers, self.layers))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llada", 32, 4096, 32, 32, 12288, 126464, 126336, 5e5),
        # The paper keeps Dream's last four layers dense.
        Shape(
            "dream", 28, 3584, 28, 4, 18944, 152064, 151666, 1e6, options={"dense_tail_layers": 4}
        ),
        Shape(
            "tiny",
            layers=6,
            hidden=64,
            heads=4,
            kv_heads=2,
            mlp=96,
            vocabulary=256,
            mask_token_id=255,
            rope_theta=1e4,
            head_dim=16,
            options={"key_block": 8, "sink_tokens": 4, "expansion": 2, "window": 4},
        ),
    )
}


def build(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """The stock model with normal weights, made on the device, ready for inference."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    config = EuroBertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        mask_token_id=shape.mask_token_id,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = EuroBertForMaskedLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    # Small models would attend evenly with the small deviation of the large ones.
    deviation = STANDARD_DEVIATION * max(1.0, (4096 / shape.hidden) ** 0.5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, deviation, generator=generator)
            else:
                weight.fill_(1)
    return model.eval().requires_grad_(False)
