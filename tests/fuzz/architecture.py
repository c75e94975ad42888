"""What a generated model looks like: one frozen description, JSON both ways."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["CHOICES", "MASK", "MAX_LENGTH_TOKENS", "PAD", "VOCAB", "Architecture"]

VOCAB, PAD, MASK = 40, 0, 39
MAX_LENGTH_TOKENS = 64
"""Rows of position tables that are buffers."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "layers": (2, 1, 2, 3),
    "hidden": (16, 32, 48),
    "kv_heads": (2, 1, 4),
    "groups": (1, 2, 4),
    "head_dim": (8, 4, 16),
    "wide_values": (False,) * 24 + (True,),
    "product": ("linear", "linear", "matmul", "einsum", "addmm"),
    "bias": (False, True),
    "norm": ("layernorm", "rmsnorm", "functional_rmsnorm", "module_rmsnorm", "gemma"),
    "norm_place": ("pre", "post", "sandwich"),
    "parallel": (False, False, True),
    "qkv": ("separate", "split", "chunk", "unbind", "per_head"),
    "qk_norm": (None, None, "head", "full"),
    "attention": ("sdpa",) * 6 + ("softmax",) * 4 + ("bmm", "baddbmm", "einsum", "einsum",
                  "einsum_tokens_first", "grouped_einsum", "exp"),
    "grouping": ("repeat_interleave", "expand", "enable_gqa"),
    "scaling": ("mul", "div", "query", "both"),
    "softmax_dtype": (None, "float32"),
    "score_cap": (False,) * 12 + (True,),
    "dropout": (False, True),
    "position": ("rope",) * 6 + ("learned", "sinusoidal", "alibi", "relative", "none"),
    "rope_style": ("half", "half", "interleaved", "complex"),
    "rope_fraction": (1.0, 1.0, 0.5),
    "rope_scaling": (None, None, "linear", "ntk", "dynamic", "blended"),
    "rope_place": ("heads_first", "tokens_first"),
    "position_table": ("computed", "buffer", "layer"),
    "position_ids": ("arange", "arange", "mask"),
    "window": (None, None, "all", "alternate"),
    "window_tokens": (3, 1, 8),
    "window_form": ("distance", "band"),
    "padding": (False, True),
    "block_causal": (False, False, False, True),
    "mask_form": ("additive", "bool", "masked_fill"),
    "mlp": ("gelu", "relu_squared", "swiglu", "geglu"),
    "gate_up": ("separate", "chunk", "split", "interleaved"),
    "flatten": (False, False, True),
    "moe": (None,) * 7 + ("soft", "mask", "gather", "scatter", "sigmoid"),
    "shared_expert": (False, True),
    "embedding_scale": (False, False, True),
    "embedding_norm": (False, False, True),
    "layer_scale": (None, None, "number", "weight"),
    "tied": (False, True),
    "head": ("linear", "bert"),
    "logit_cap": (False, False, True),
    "shift": (None,) * 30 + ("cat", "roll"),
    "output": ("tensor", "tuple", "dataclass"),
}  # fmt: skip
"""Values of each field, simplest first; repeated ones are drawn more often."""


@dataclass(frozen=True)
class Architecture:
    """A dLLM-like transformer; `tests.fuzz.source` writes it as a module."""

    layers: int = 2
    hidden: int = 16
    kv_heads: int = 2
    groups: int = 1
    """Query heads a kv head."""
    head_dim: int = 8
    wide_values: bool = False
    """Values twice as wide as keys."""
    product: str = "linear"
    """How a linear layer is spelt: nn.Linear, `x @ w`, einsum, or addmm of merged tokens."""
    bias: bool = False
    norm: str = "layernorm"
    norm_place: str = "pre"
    parallel: bool = False
    """Attention and MLP read the same input and are added together."""
    qkv: str = "separate"
    """Separate; fused and split by widths, chunked, unbound or chunked by head."""
    qk_norm: str | None = None
    """RMS norm of queries and keys, by head or over all heads."""
    attention: str = "sdpa"
    grouping: str = "repeat_interleave"
    scaling: str = "mul"
    softmax_dtype: str | None = None
    score_cap: bool = False
    dropout: bool = False
    """Dropout that eval mode turns off."""
    position: str = "rope"
    rope_style: str = "half"
    rope_fraction: float = 1.0
    rope_scaling: str | None = None
    rope_place: str = "heads_first"
    position_table: str = "computed"
    """Computed by the model, a buffer of the model's, or computed by every layer."""
    position_ids: str = "arange"
    """Counted, or counted where the padding mask is set."""
    window: str | None = None
    """Which layers see a window of `window_tokens` to either side."""
    window_tokens: int = 3
    window_form: str = "distance"
    padding: bool = False
    """Whether the padding mask is read."""
    block_causal: bool = False
    """Whether the mask is given, as bool [1, 1, tokens, tokens]."""
    mask_form: str = "additive"
    mlp: str = "gelu"
    gate_up: str = "separate"
    flatten: bool = False
    """The MLP sees tokens merged into [batch * tokens, hidden]."""
    moe: str | None = None
    shared_expert: bool = False
    embedding_scale: bool = False
    embedding_norm: bool = False
    layer_scale: str | None = None
    tied: bool = False
    head: str = "linear"
    logit_cap: bool = False
    shift: str | None = None
    """A row's logits are computed by the row before it."""
    output: str = "tensor"

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r}: expected one of {CHOICES[name]}")
        for broken, reason in self._problems():
            if broken:
                raise ValueError(reason)

    def _problems(self) -> list[tuple[bool, str]]:
        biased = self.position in ("alibi", "relative")
        return [
            (
                self.qkv not in ("separate", "split") and not self.equal_heads,
                f"{self.qkv} projections need heads of equal number and width",
            ),
            (
                self.grouping == "enable_gqa" and self.attention != "sdpa",
                "enable_gqa is an argument of SDPA",
            ),
            (
                self.block_causal
                and (self.padding or self.window is not None or self.position_ids == "mask"),
                "a model reads one kind of mask",
            ),
            (self.score_cap and self.attention == "sdpa", "SDPA cannot cap its scores"),
            (
                self.attention == "grouped_einsum" and biased,
                "a bias of each head has no axis of groups",
            ),
        ]

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def value_dim(self) -> int:
        return 2 * self.head_dim if self.wide_values else self.head_dim

    @property
    def equal_heads(self) -> bool:
        return self.groups == 1 and not self.wide_values

    @property
    def experts_compete(self) -> bool:
        """Whether a rounding error may send a row to another expert."""
        return self.moe not in (None, "soft")

    @property
    def known_to_oracle(self) -> bool:
        """Whether each site is softmax(q k^T * scale + mask) v, and row r's logits are of row r."""
        return not self.score_cap and self.shift is None

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value != defaults[name]
        }
