"""Position encodings and masks: everything made of lengths, ids and the padding mask alone."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, nn

from tests.models.layers import Weights, embedding
from tests.models.spec import MAX_LENGTH_TOKENS, ModelSpec

ROPE_BASE = 100.0


class Rotation(nn.Module):
    """The rotary tables cos, sin, each [T, head_dim]."""

    angles: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.interleaved = spec.position == "rope_interleaved"
        self.buffered = spec.position_table == "buffer"
        if self.buffered:
            self.register_buffer("angles", self.make(MAX_LENGTH_TOKENS, torch.device("cpu")))

    def make(self, length: int, device: torch.device) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32)
        frequencies = ROPE_BASE ** (-exponents / self.head_dim)
        angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
        return angles.repeat_interleave(2, -1) if self.interleaved else torch.cat([angles] * 2, -1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        length = hidden.shape[1]
        angles = self.angles[:length] if self.buffered else self.make(length, hidden.device)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) to (-b, a), a and b the halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_interleaved(x: Tensor) -> Tensor:
    """(a, b) to (-b, a) for each pair of neighbours of the last axis."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


class LearnedPositions(nn.Module):
    """Learned absolute positions [1, T, hidden]."""

    indices: Tensor

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        super().__init__()
        self.table = embedding(weights, "positions", MAX_LENGTH_TOKENS, spec.hidden)
        self.buffered = spec.position_table == "buffer"
        if self.buffered:
            self.register_buffer("indices", torch.arange(MAX_LENGTH_TOKENS)[None])

    def forward(self, ids: Tensor) -> Tensor:
        if self.buffered:
            return self.table(self.indices[:, : ids.shape[1]])
        return self.table(torch.arange(ids.shape[1], device=ids.device)[None])


class Masks(nn.Module):
    """The attention mask: None, bool (True = attend) or float, broadcastable to [B, H, T, T]."""

    biases: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.buffered = spec.position == "alibi" and spec.position_table == "buffer"
        if self.buffered:
            self.register_buffer("biases", self.alibi(MAX_LENGTH_TOKENS, torch.device("cpu")))

    def alibi(self, length: int, device: torch.device) -> Tensor:
        """-slope_h * |i - j| as [1, H, T, T]."""
        positions = torch.arange(length, device=device)
        distance = (positions[:, None] - positions[None, :]).abs()
        slopes = 2.0 ** -torch.arange(1, self.spec.heads + 1, device=device).float()
        return -slopes[None, :, None, None] * distance

    def keep(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Which keys may be read: bool [B, 1, 1 or T, T], None for all."""
        found: list[Tensor] = []
        if self.spec.padding and attention_mask is not None:
            found.append(attention_mask[:, None, None, :].bool())
        if self.spec.near_miss == "mask_from_ids":
            found.append((ids != self.spec.pad_token_id)[:, None, None, :])
        if self.spec.causal == "tril":
            square = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
            found.append(torch.tril(square)[None, None])
        return functools.reduce(operator.and_, found) if found else None

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        keep = self.keep(ids, attention_mask)
        bias = None
        if self.spec.position == "alibi":
            length = ids.shape[1]
            table = self.biases if self.buffered else self.alibi(length, ids.device)
            bias = table[:, :, :length, :length].to(dtype)
        if keep is None:
            return bias
        lowest = torch.finfo(dtype).min
        if self.spec.mask_form == "additive":
            added = (1 - keep.to(dtype)) * lowest
            return added if bias is None else bias + added
        if bias is not None:
            return torch.where(keep, bias, lowest)
        if self.spec.mask_form == "masked_fill" and self.spec.attention == "sdpa":
            return torch.zeros(keep.shape, dtype=dtype, device=ids.device).masked_fill(
                ~keep, lowest
            )
        return keep
