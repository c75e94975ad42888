"""What acts on hidden states between the sites: real token mixers, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.layers import Weights, embedding, linear
from tests.models.spec import IDS_NEAR_MISSES, MAX_LENGTH_TOKENS, ModelSpec


def _shift_cat(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def _neighbour_gather(x: Tensor) -> Tensor:
    length = x.shape[1]
    neighbour = (torch.arange(length, device=x.device) + 1) % length
    return x.gather(1, neighbour[None, :, None].expand(x.shape))


def _scrambled_view(x: Tensor) -> Tensor:
    """A view where a transpose was meant: rows hold other rows' features."""
    batch, length, width = x.shape
    return x.reshape(batch, width, length).transpose(1, 2)


def _token_layernorm(x: Tensor) -> Tensor:
    return F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2)


# Each takes and returns [B, T, C] and makes rows depend on other rows.
_MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll(1, dims=1),
    "shift_cat": _shift_cat,
    "flip": lambda x: x.flip(1),
    "neighbour_gather": _neighbour_gather,
    "first_row": lambda x: x[:, :1].expand_as(x),
    "scrambled_view": _scrambled_view,
    "mean": lambda x: x.mean(dim=1, keepdim=True),
    "max": lambda x: x.amax(dim=1, keepdim=True),
    "cumsum": lambda x: x.cumsum(dim=1) * 0.2,
    "sort": lambda x: x.sort(dim=1).values,
    "softmax": lambda x: x.softmax(dim=1) * 4,
    "token_layernorm": _token_layernorm,
    "global_scale": lambda x: torch.tanh(x / x.abs().mean()),
    "fft": lambda x: torch.fft.fft(x, dim=1).real * 0.3,
    "batch_mean": lambda x: x.mean(dim=0, keepdim=True),
}


class Mixer(nn.Module):
    """x [B, T, C] plus a mix of its rows (batch_mean: of the sequences).

    Dynamo breaks the graph at gru: each part must be refused by itself, also the one that ends
    in hidden states and the one that begins with them.
    """

    def __init__(self, kind: str, weights: Weights, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "conv1d":
            self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1)
        elif kind == "gru":
            self.gru = nn.GRU(width, width, batch_first=True)
        elif kind == "token_linear":
            table = weights.draw("tokens", MAX_LENGTH_TOKENS, MAX_LENGTH_TOKENS, std=0.3)
            self.tokens = nn.Parameter(table)
        if kind in ("conv1d", "gru"):
            for name, parameter in self.named_parameters():
                parameter.data = weights.draw(name, *parameter.shape, std=width**-0.5)

    def mixed(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.kind == "conv1d":
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        if self.kind == "gru":
            return self.gru(x)[0]
        if self.kind == "token_linear":
            return F.linear(x.transpose(1, 2), self.tokens[:length, :length]).transpose(1, 2)
        return _MIXES[self.kind](x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(x)


def _topk_features(x: Tensor) -> Tensor:
    """Soft threshold at the fourth largest feature; continuous, so that rounding stays small."""
    return F.relu(x - x.topk(4, dim=-1).values[..., -1:]) + 0.5 * x


def _chunk_features(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first * torch.sigmoid(second)], dim=-1)


def _position_gate(x: Tensor) -> Tensor:
    phase = torch.arange(x.shape[1], device=x.device).to(x.dtype)
    return x * (1 + 0.5 * torch.sin(phase))[None, :, None]


# Each takes and returns [B, T, C], every row of its own (and its position) alone.
_TOKEN_WISE: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax_features": lambda x: x * (1 + 2 * x.softmax(dim=-1)),
    "topk_features": _topk_features,
    "chunk_features": _chunk_features,
    "cumsum_features": lambda x: x + 0.1 * x.cumsum(dim=-1),
    "sort_features": lambda x: x.sort(dim=-1).values,
    "flip_features": lambda x: x + 0.5 * x.flip(-1),
    "roll_features": lambda x: x + 0.5 * x.roll(1, dims=-1),
    "mean_features": lambda x: x - x.mean(dim=-1, keepdim=True),
    "transposed": lambda x: (x.transpose(1, 2).contiguous() * 1.1).transpose(1, 2),
    "position_gate": _position_gate,
}


class FeatureNearMiss(nn.Module):
    """Acts on hidden states [B, T, hidden] in each layer, row by row; ids [B, T]."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        super().__init__()
        self.kind = spec.near_miss
        if spec.near_miss == "dropout":
            self.dropout = nn.Dropout(0.5)
        elif spec.near_miss == "squeeze_excite":
            self.squeeze = linear(weights, ["squeeze"], 8, spec.hidden, True)
            self.excite = linear(weights, ["excite"], spec.hidden, 8, True)
        elif spec.near_miss == "ids_gate":
            self.gate = embedding(weights, "gate", spec.vocab, spec.hidden)

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        if self.kind is None or self.kind in IDS_NEAR_MISSES:
            return hidden
        if self.kind == "dropout":
            return self.dropout(hidden)
        if self.kind == "squeeze_excite":
            return hidden * torch.sigmoid(self.excite(F.relu(self.squeeze(hidden))))
        if self.kind == "ids_gate":
            return hidden * (1 + self.gate(ids))
        return _TOKEN_WISE[self.kind](hidden)


class IdsNearMiss(nn.Module):
    """Added to the embeddings: [B, T or 1, hidden] made of ids [B, T] alone, or None.

    cumsum_positions are RoBERTa's, token_types and segments BERT's (from the id itself, from
    the separators so far), mask_ratio a diffusion time. All but token_types read other ids.
    """

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        rows = {"cumsum_positions": MAX_LENGTH_TOKENS + 1, "token_types": 2, "segments": 2}
        if spec.near_miss in rows:
            self.table = embedding(weights, spec.near_miss, rows[spec.near_miss], spec.hidden)
        elif spec.near_miss == "mask_ratio":
            self.time = linear(weights, ["time"], spec.hidden, 1, True)

    def forward(self, ids: Tensor) -> Tensor | None:
        if self.spec.near_miss == "cumsum_positions":
            real = (ids != self.spec.pad_token_id).long()
            return self.table(real.cumsum(dim=1) * real)
        if self.spec.near_miss == "token_types":
            return self.table((ids >= self.spec.vocab // 2).long())
        if self.spec.near_miss == "segments":
            return self.table((ids == self.spec.vocab // 2).long().cumsum(dim=1) % 2)
        if self.spec.near_miss == "mask_ratio":
            masked = (ids == self.spec.mask_token_id).to(self.time.weight.dtype)
            return self.time(masked.mean(dim=1, keepdim=True)[..., None])
        return None
