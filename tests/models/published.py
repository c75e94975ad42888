"""Small twins of published dLLMs, written as their modelling files are: what those do that stock
models do not. Ids [B, T] to `ModelOutput`.

LLaDA: rotation tables kept in float32 and applied under autocast that is off, fused or separate
projections, an attention bias, a cache argument left alone. Dream: biased grouped-query
projections, a mask that is looked at, a cache that starts empty in every call. LLaDA2.0: sigmoid
gate, experts of the best groups only, partial rotation. SDAR: a mask that every layer looks at.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.layers import RMSNorm
from tests.models.network import ModelOutput
from tests.models.positions import rotate_half
from tests.models.spec import MAX_LENGTH_TOKENS
from tests.models.stock import MASK_TOKEN_ID, VOCAB, draw_weights

__all__ = ["PUBLISHED", "build_published"]

HIDDEN, HEADS, HEAD_DIM, WIDTH, LAYERS = 32, 2, 16, 48, 3
EXPERTS, GROUPS, KEPT_GROUPS, CHOSEN, EXPERT_WIDTH = 8, 4, 2, 2, 16


def rms_norm(width: int = HIDDEN) -> RMSNorm:
    return RMSNorm(torch.ones(width))


def heads_apart(x: Tensor) -> Tensor:
    """[B, T, heads * d] to [B, heads, T, d]."""
    return x.view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)


class Rotation(nn.Module):
    """Rotates the first `width` channels of [B, H, T, d] by their position, in float32."""

    inverse: Tensor

    def __init__(self, width: int = HEAD_DIM, *, tables: bool = False) -> None:
        super().__init__()
        inverse = 100.0 ** (-torch.arange(0, width, 2).float() / width)
        self.width = width
        self.register_buffer("inverse", inverse, persistent=False)
        self.tables = (
            self.angles(torch.arange(MAX_LENGTH_TOKENS)[None], inverse) if tables else None
        )

    @staticmethod
    def angles(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, T, width] of positions [B or 1, T]."""
        expanded = inverse[None, :, None].expand(positions.shape[0], -1, 1)
        angles = (expanded @ positions[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if self.tables is not None:
                cos, sin = (table[:, :, : x.shape[2]].to(x.device) for table in self.tables)
            else:
                if positions is None:
                    positions = torch.arange(x.shape[2], device=x.device)[None]
                cos, sin = self.angles(positions, self.inverse)
            turned, rest = x[..., : self.width].float(), x[..., self.width :]
            turned = turned * cos + rotate_half(turned) * sin
            return torch.cat((turned.type_as(x), rest), -1)


class Attention(nn.Module):
    """[B, T, hidden] to the same.

    kv_heads: of keys and values; fused: one projection for all three; bias: of the projections;
    qk_norm: of each head; looks: at its mask, as SDAR does.
    """

    def __init__(
        self,
        rotation: Rotation,
        *,
        kv_heads: int = HEADS,
        fused: bool = False,
        bias: bool = False,
        qk_norm: bool = False,
        looks: bool = False,
    ) -> None:
        super().__init__()
        self.widths = [HEADS * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM]
        self.repeats, self.looks, self.rotation = HEADS // kv_heads, looks, rotation
        if fused:
            self.att_proj = nn.Linear(HIDDEN, sum(self.widths), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(HIDDEN, width, bias=bias) for width in self.widths
            )
        self.norms = nn.ModuleList([rms_norm(HEAD_DIM), rms_norm(HEAD_DIM)] if qk_norm else [])
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def projected(self, x: Tensor) -> list[Tensor]:
        if hasattr(self, "att_proj"):
            return list(self.att_proj(x).split(self.widths, -1))
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def forward(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any = None
    ) -> Tensor:
        q, k, v = map(heads_apart, self.projected(x))
        if self.norms:
            q, k = self.norms[0](q), self.norms[1](k)
        q, k = self.rotation(q, positions), self.rotation(k, positions)
        if cache is not None:
            k, v = torch.cat((cache[0], k), -2), torch.cat((cache[1], v), -2)
        k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        if self.looks and mask is not None and torch.all(mask):
            mask = None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)
        return self.out(attended.transpose(1, 2).contiguous().view(*x.shape[:2], -1))


class MLP(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A shared expert, and of the others the best of the best groups.

    spelling: "grouped" (sorted by expert), "batched" (weights looked up by row), or "loop", over
    slices whose sizes are read from the device.
    """

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.expert_bias = nn.Parameter(torch.zeros(EXPERTS))
        self.shared = MLP(EXPERT_WIDTH)
        self.up = nn.Parameter(torch.empty(EXPERTS, HIDDEN, EXPERT_WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, EXPERT_WIDTH, HIDDEN))

    def routed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and expert of each choice, both [N, CHOSEN]."""
        scores = self.gate(tokens).float().sigmoid()
        biased = scores + self.expert_bias
        groups = biased.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, -1)[0].sum(-1)
        best = groups.topk(KEPT_GROUPS, -1, sorted=False)[1]
        mask = torch.zeros_like(groups)
        mask.scatter_(1, best, 1)
        mask = mask[..., None].expand(-1, GROUPS, EXPERTS // GROUPS).reshape(-1, EXPERTS)
        _, experts = biased.masked_fill(~mask.bool(), -torch.inf).topk(CHOSEN, -1)
        weights = scores.gather(1, experts)
        return 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), experts

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, experts = self.routed(tokens)
        rows = getattr(self, self.spelling)(tokens, experts)
        chosen = (rows.view(*experts.shape, HIDDEN) * weights[..., None]).sum(1)
        return chosen.view(x.shape) + self.shared(x)

    def batched(self, tokens: Tensor, experts: Tensor) -> Tensor:
        rows = tokens.repeat_interleave(CHOSEN, 0)[:, None]
        rows = F.silu(rows @ self.up[experts.flatten()])
        return (rows @ self.down[experts.flatten()])[:, 0]

    def grouped(self, tokens: Tensor, experts: Tensor) -> Tensor:
        import transformers.integrations.moe  # noqa: F401

        product = torch.ops.transformers.grouped_mm_fallback
        by_expert, order = experts.flatten().sort()
        ends = torch.histc(by_expert.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        rows = F.silu(product(tokens[order // CHOSEN], self.up, ends))
        rows = product(rows, self.down, ends)
        return rows[order.argsort()]

    def loop(self, tokens: Tensor, experts: Tensor) -> Tensor:
        order = experts.flatten().argsort()
        counts = torch.bincount(experts.flatten(), minlength=EXPERTS)
        groups = tokens[order // CHOSEN].split(counts.tolist())
        done = [
            F.silu(g @ up) @ down for g, up, down in zip(groups, self.up, self.down, strict=True)
        ]
        rows = torch.cat(done)
        back = torch.empty_like(rows)
        back[order] = rows
        return back


class Published(nn.Module):
    """Embedding, layers, norm and head; a family's forward says what its arguments mean."""

    def __init__(self, attention: dict[str, Any], rotation: Rotation, mlps: list[nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.attentions = nn.ModuleList(Attention(rotation, **attention) for _ in mlps)
        self.mlps = nn.ModuleList(mlps)
        self.norms = nn.ModuleList(rms_norm() for _ in range(2 * len(mlps)))
        self.norm, self.head = rms_norm(), nn.Linear(HIDDEN, VOCAB, bias=False)

    def run(
        self, ids: Tensor, mask: Any = None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        x = self.embedding(ids)
        for at, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * at](x), mask, positions, cache)
            x = x + mlp(self.norms[2 * at + 1](x))
        return self.norm(x)


class Llada(Published):
    def __init__(self, *, fused: bool = False) -> None:
        mlps: list[nn.Module] = [MLP() for _ in range(LAYERS)]
        super().__init__({"fused": fused}, Rotation(tables=True), mlps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> ModelOutput:
        assert past_key_values is None
        assert not use_cache
        return ModelOutput(self.logits(input_ids, attention_mask, attention_bias))

    def logits(self, ids: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        lowest = torch.finfo(torch.float).min
        if mask is not None and 0.0 in mask:
            added = (1 - mask.float()[:, None, None]) * lowest
            bias = added if bias is None else bias + added
        elif bias is not None and bias.dtype == torch.bool:
            bias = bias.float()
            bias.masked_fill_(bias == 0.0, lowest)
        return self.head(self.run(ids, bias))


class Dream(Published):
    def __init__(self) -> None:
        mlps: list[nn.Module] = [MLP() for _ in range(LAYERS)]
        super().__init__({"kv_heads": 1, "bias": True}, Rotation(), mlps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | str | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        num_logits_to_keep: int = 0,
    ) -> ModelOutput:
        mask = attention_mask
        if isinstance(mask, Tensor):
            if not torch.any(mask == 0.0):
                mask = "full"
            else:
                mask = torch.logical_and(mask[:, None, None], mask[:, None, :, None]).bool()
        cache = (torch.tensor([]), torch.tensor([])) if use_cache else None
        hidden = self.run(input_ids, mask if mask != "full" else None, position_ids, cache)
        return ModelOutput(self.head(hidden[:, -num_logits_to_keep:]))


class Llada2(Published):
    def __init__(self, *, experts: str = "grouped") -> None:
        mlps = [MLP(), *(Experts(experts) for _ in range(LAYERS - 1))]
        attention = {"kv_heads": 1, "fused": True, "qk_norm": True}
        super().__init__(attention, Rotation(HEAD_DIM // 2), mlps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> ModelOutput:
        mask = attention_mask
        if mask is not None:
            lowest = torch.finfo(torch.float).min
            mask = torch.zeros_like(mask, dtype=torch.float).masked_fill_(~mask, lowest)
        return ModelOutput(self.head(self.run(input_ids, mask, position_ids)).float())


class Sdar(Published):
    def __init__(self) -> None:
        mlps: list[nn.Module] = [MLP() for _ in range(LAYERS)]
        super().__init__({"kv_heads": 1, "qk_norm": True, "looks": True}, Rotation(), mlps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        return ModelOutput(self.head(self.run(input_ids, attention_mask)))


PUBLISHED: dict[str, type[Published]] = {
    "llada": Llada,
    "dream": Dream,
    "llada2": Llada2,
    "sdar": Sdar,
}


def build_published(name: str, seed: int = 0, **options: Any) -> Published:
    """The twin in eval mode, weights from `seed`; mask id `MASK_TOKEN_ID`."""
    model = PUBLISHED[name](**options)
    draw_weights(model, torch.Generator().manual_seed(seed))
    assert model.embedding.num_embeddings == MASK_TOKEN_ID + 1
    return model.eval()
