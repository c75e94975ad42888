"""A decoder over a cache that it reads, in the two forms that transformers gives one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 30, 24, 4, 2, 8


@dataclass
class Cache:
    """Keys and values of every layer [batch, kv_heads, places, d], and how many are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: Tensor

    @classmethod
    def random(cls, batch: int, places: list[int], filled: int, seed: int = 0) -> Cache:
        generator = torch.Generator().manual_seed(seed)

        def drawn(count: int) -> Tensor:
            tensor = torch.zeros(batch, KV_HEADS, count, HEAD_DIM)
            part = tensor[:, :, : min(filled, count)]
            part.copy_(torch.randn(part.shape, generator=generator))
            return tensor

        keys, values = ([drawn(count) for count in places] for _ in range(2))
        return cls(keys, values, torch.tensor(filled))

    def to(self, device: str) -> Cache:
        moved = ([tensor.to(device) for tensor in held] for held in (self.keys, self.values))
        return Cache(*moved, self.length.to(device))


class Decoder(nn.Module):
    """Bidirectional over the cache and its own tokens. form: "copy" (a static cache, own keys
    copied in behind what is filled) or "cat" (a dynamic one)."""

    def __init__(self, layers: int, form: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.form = form
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        own = KV_HEADS * HEAD_DIM
        self.qkv = nn.ModuleList(
            nn.Linear(WIDTH, HEADS * HEAD_DIM + 2 * own) for _ in range(layers)
        )
        self.out = nn.ModuleList(nn.Linear(HEADS * HEAD_DIM, WIDTH) for _ in range(layers))
        with torch.no_grad():
            for layer in self.qkv:
                layer.weight.mul_(2)

    def forward(
        self,
        ids: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        length: Tensor,
        mask: Tensor | None,
        only: list[Tensor | None] | None = None,
    ) -> Tensor:
        """Logits; only: by layer a bool mask more [batch, 1, 1, keys], for the oracle."""
        x = self.embed(ids)
        batch, count = ids.shape
        for at, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            widths = [count * HEAD_DIM for count in (HEADS, KV_HEADS, KV_HEADS)]
            parts = qkv(F.layer_norm(x, (WIDTH,))).split(widths, -1)
            q, k, v = (p.view(batch, count, -1, HEAD_DIM).transpose(1, 2) for p in parts)
            k, v = self.joined(keys[at], k, length), self.joined(values[at], v, length)
            seen = mask
            if mask is not None and mask.shape[-1] != k.shape[2]:
                seen = mask[..., -k.shape[2] :]
            if only is not None and only[at] is not None:
                seen = only[at] if seen is None else _both(seen, only[at])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            x = x + out(y.transpose(1, 2).reshape(batch, count, -1))
        return self.head(x)

    def joined(self, cache: Tensor, own: Tensor, length: Tensor) -> Tensor:
        if self.form == "cat":
            return torch.cat([cache, own], dim=-2)
        batch, heads, places, width = cache.shape
        count = own.shape[2]
        joined = own.new_zeros(batch, heads, places + count, width)
        device = cache.device
        joined.index_copy_(2, torch.arange(places, device=device), cache)
        joined.index_copy_(2, torch.arange(count, device=device) + length, own)
        return joined


def _both(mask: Tensor, only: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask & only
    return mask.masked_fill(~only, float("-inf"))
