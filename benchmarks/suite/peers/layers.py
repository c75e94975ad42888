"""A stock model taken layer by layer in eager PyTorch, over any rows: the eager peers' base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Layers", "attend"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [1, H, R, d], k and v [1, Hkv, R, d], without RoPE) to [1, H, R, d]."""


class Layers:
    """Runs some rows through the modules of an EuroBert model, attention apart."""

    def __init__(self, model: Any):
        from transformers.models.eurobert.modeling_eurobert import apply_rotary_pos_emb

        self.base: Any = model.model
        self.head: nn.Linear = model.lm_head
        self._rotate = apply_rotary_pos_emb
        self.count = len(self.base.layers)

    def positions(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """RoPE's cos and sin of all positions, [1, length, d], in the model's dtype."""
        like = torch.empty(0, dtype=self.head.weight.dtype, device=device)
        return self.base.rotary_emb(like, torch.arange(length, device=device)[None])

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE of [1, H, R, d] by cos and sin [1, R, d], as the model does it."""
        return self._rotate(x, x[:, :0], cos, sin)[0]

    def run(self, ids: Tensor, attend: Attend) -> Tensor:
        """Hidden states [R, hidden], after the last norm, of ids [R]."""
        hidden = self.base.embed_tokens(ids[None])
        for index, layer in enumerate(self.base.layers):
            shape = (1, len(ids), -1, layer.self_attn.head_dim)
            states = layer.input_layernorm(hidden)
            attention = layer.self_attn
            q = attention.q_proj(states).view(shape).transpose(1, 2)
            k = attention.k_proj(states).view(shape).transpose(1, 2)
            v = attention.v_proj(states).view(shape).transpose(1, 2)
            out = attend(index, q, k, v).transpose(1, 2).reshape(1, len(ids), -1)
            hidden = hidden + attention.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.base.norm(hidden)[0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, whichever kernel it chooses; grouped heads share keys in place."""
    return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
