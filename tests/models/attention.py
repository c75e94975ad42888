"""Attention in every spelling: what the pattern files must match, and what they must refuse."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.layers import RMSNorm, Weights, linear, linear_of
from tests.models.positions import rotate_half, rotate_interleaved
from tests.models.spec import UNMATCHED_ATTENTIONS, ModelSpec

SOFTCAP = 5.0
GAIN = 1.4
"""Queries and keys of this std give scores of std 2: some keys matter, none alone."""


class Core(nn.Module):
    """q [B, H, T, d], k, v [B, Hkv, T, d], mask as `Masks` makes it -> [B, H, T, d]."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.scale = spec.scale if spec.scaling.startswith("scores") else 1.0
        if spec.attention == "sink":
            self.sinks = nn.Parameter(weights.draw("sinks", spec.heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.site(*self.prescaled(q, k), v, mask)

    def site(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = self.grouped(k), self.grouped(v)
        if self.spec.attention == "sdpa":
            return self.sdpa(q, k, v, mask)
        if self.spec.attention == "linear":
            return self.linear(q, k, v)
        return self.weighted(self.softmax(self.masked(self.scores(q, k), mask)).to(q.dtype), v)

    def prescaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.scaling == "query_mul":
            return q * self.spec.scale, k
        if self.spec.scaling == "query_div":
            return q / (1 / self.spec.scale), k
        if self.spec.scaling == "both":
            root = math.sqrt(self.spec.scale)
            return q * root, k * root
        return q, k

    def grouped(self, x: Tensor) -> Tensor:
        """[B, Hkv, T, d] to [B, H, T, d]."""
        groups = self.spec.heads // self.spec.kv_heads
        if groups == 1 or self.spec.grouping == "enable_gqa":
            return x
        if self.spec.grouping == "repeat_interleave":
            return x.repeat_interleave(groups, dim=1)
        batch, heads, length, width = x.shape
        wide = x[:, :, None].expand(batch, heads, groups, length, width)
        return wide.reshape(batch, heads * groups, length, width)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        default = self.spec.scaling == "scores_div" and self.spec.sharpness == 1.0
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=self.spec.causal == "is_causal",
            scale=None if default else self.scale,
            enable_gqa=self.spec.grouping == "enable_gqa" and k.shape[1] != q.shape[1],
        )

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q k^T, scaled unless q or k already are: [B, H, T, T]."""
        batch, heads, length, width = q.shape
        if self.spec.attention == "bmm":
            flat_q = q.reshape(batch * heads, length, width)
            flat_k = k.reshape(batch * heads, length, width)
            scores = torch.bmm(flat_q, flat_k.transpose(1, 2)).view(batch, heads, length, length)
        elif self.spec.attention == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        elif self.spec.attention == "einsum_tokens_first":
            scores = torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
        else:
            scores = torch.matmul(q, k.transpose(-2, -1))
        if self.spec.scaling == "scores_mul":
            scores = scores * self.scale
        elif self.spec.scaling == "scores_div":
            scores = scores / (1 / self.scale)
        if self.spec.attention == "softcap":
            scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
        return scores

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return scores
        if mask.dtype != torch.bool:
            return scores + mask
        lowest = torch.finfo(scores.dtype).min
        if self.spec.mask_form == "masked_fill":
            return scores.masked_fill(~mask, lowest)
        return torch.where(mask, scores, lowest)

    def softmax(self, scores: Tensor) -> Tensor:
        if self.spec.attention == "manual_softmax":
            powers = torch.exp(scores - scores.amax(-1, keepdim=True))
            return powers / powers.sum(-1, keepdim=True)
        if self.spec.attention == "sink":
            sinks = self.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            return F.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        if self.spec.softmax == "float32":
            return F.softmax(scores, dim=-1, dtype=torch.float32)
        return scores.softmax(dim=-1)

    def weighted(self, probability: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, width = v.shape
        if self.spec.attention == "bmm":
            flat = probability.view(batch * heads, length, length)
            return torch.bmm(flat, v.reshape(batch * heads, length, width)).view(v.shape)
        if self.spec.attention == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", probability, v)
        if self.spec.attention == "einsum_tokens_first":
            rows = torch.einsum("bhqk,bkhd->bqhd", probability, v.transpose(1, 2))
            return rows.transpose(1, 2)
        return torch.matmul(probability, v)

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """phi(q) (phi(k)^T v) / phi(q) sum(phi(k)), phi = elu + 1."""
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2)[..., None])


class OpenCore(Core):
    """A core whose site is `softmax(q k^T scale + mask) v`, so that a test may answer `attend`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.attend(*self.prescaled(q, k), v, mask, self.scale)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """The site; `scale` is told to whoever stands in for it, the spelling has its own."""
        return self.site(q, k, v, mask)


class RowWiseCore(nn.Module):
    """Attention replaced by q + k + v of the row itself: nothing is left that mixes tokens."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        own = k + v
        return q + own.repeat_interleave(q.shape[1] // own.shape[1], dim=1)


class Projections(nn.Module):
    """[B, T, hidden] to q [B, T, H, d] and k, v [B, T, Hkv, d]."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        sizes = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        parts = {
            name: linear(
                weights,
                [name],
                heads * spec.head_dim,
                spec.hidden,
                spec.bias,
                1.0 if name == "v" else GAIN,
            )
            for name, heads in sizes.items()
        }
        if spec.projection == "separate":
            self.parts = nn.ModuleDict(parts)
        else:
            tensors = [part.weight.detach() for part in parts.values()]
            biases = [part.bias.detach() for part in parts.values()] if spec.bias else None
            self.qkv = linear_of(self.fuse(tensors), self.fuse(biases) if biases else None)

    def fuse(self, tensors: list[Tensor]) -> Tensor:
        """q, k, v one under another, or interleaved head by head."""
        if self.spec.projection != "per_head":
            return torch.cat(tensors)
        heads = [tensor.unflatten(0, (self.spec.heads, self.spec.head_dim)) for tensor in tensors]
        return torch.cat(heads, dim=1).flatten(0, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec, (batch, length, _) = self.spec, x.shape
        if spec.projection == "unbind":
            q, k, v = self.qkv(x).view(batch, length, 3, spec.heads, spec.head_dim).unbind(2)
        elif spec.projection == "per_head":
            q, k, v = self.qkv(x).view(batch, length, spec.heads, -1).chunk(3, dim=-1)
        elif spec.projection == "split":
            kv_width = spec.kv_heads * spec.head_dim
            widths = [spec.heads * spec.head_dim, kv_width, kv_width]
            q, k, v = (
                part.reshape(batch, length, -1, spec.head_dim)
                for part in self.qkv(x).split(widths, dim=-1)
            )
        else:
            q, k, v = (
                part(x).view(batch, length, -1, spec.head_dim) for part in self.parts.values()
            )
        return q, k, v


class Attention(nn.Module):
    """[B, T, hidden] to the same; `core` holds the site, `mixer` acts on the keys."""

    def __init__(self, spec: ModelSpec, weights: Weights, mixer: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.project = Projections(spec, weights)
        self.mixer = mixer
        opaque = spec.attention in UNMATCHED_ATTENTIONS or spec.causal == "is_causal"
        self.core = Core(spec, weights) if opaque else OpenCore(spec, weights)
        width = spec.heads * spec.head_dim
        self.out = linear(weights, ["out"], spec.hidden, width, spec.bias, 2.0)
        if spec.qk_norm:
            self.q_norm = RMSNorm(GAIN * (1 + weights.draw("q_norm", spec.head_dim, std=0.2)))
            self.k_norm = RMSNorm(GAIN * (1 + weights.draw("k_norm", spec.head_dim, std=0.2)))

    def forward(
        self, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        q, k, v = self.project(x)
        if not isinstance(self.mixer, nn.Identity):
            k = self.mixer(k.flatten(2)).unflatten(2, k.shape[2:])
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotated(q, k, rotation)
        rows = self.core(q, k, v.transpose(1, 2), mask).transpose(1, 2)
        return self.out(rows.reshape(*x.shape[:2], -1))

    def rotated(
        self, q: Tensor, k: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """q, k [B, T, H, d] to [B, H, T, d], rotated before or after the transpose."""
        if rotation is None:
            return q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = rotation
        if self.spec.position == "rope_interleaved":
            cos, sin = cos[None, :, None], sin[None, :, None]
            q = q * cos + rotate_interleaved(q) * sin
            k = k * cos + rotate_interleaved(k) * sin
            return q.transpose(1, 2), k.transpose(1, 2)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = cos[None, None], sin[None, None]
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
