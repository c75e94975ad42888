"""What a generated transformer looks like: one frozen description, checked when made."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LENGTH_TOKENS = 256

MLPS = ("gelu", "swiglu")
NORMS = ("layernorm", "rmsnorm", "functional_rmsnorm")
NORM_PLACES = ("pre", "post")
ATTENTIONS = ("sdpa", "matmul", "bmm", "einsum", "einsum_tokens_first")
UNMATCHED_ATTENTIONS = ("softcap", "sink", "linear", "manual_softmax")
GROUPINGS = ("repeat_interleave", "expand", "enable_gqa")
SCALINGS = ("scores_mul", "scores_div", "query_mul", "query_div", "both")
MASK_FORMS = ("additive", "bool", "masked_fill")
SOFTMAXES = ("plain", "float32")
PROJECTIONS = ("separate", "split", "unbind", "per_head")
POSITIONS = ("rope_half", "rope_interleaved", "learned", "alibi", "none")
POSITION_TABLES = ("computed", "buffer")
HEADS = ("linear", "bert")
OUTPUTS = ("tensor", "tuple", "dataclass")
CAUSALS = ("is_causal", "tril")

MIXERS = (
    "roll", "shift_cat", "flip", "neighbour_gather", "first_row", "scrambled_view",
    "mean", "max", "cumsum", "sort", "softmax", "token_layernorm", "global_scale",
    "conv1d", "token_linear", "fft", "gru", "batch_mean",
)  # fmt: skip
MIXER_PLACES = ("residual", "keys", "flat", "head")

FEATURE_NEAR_MISSES = (
    "dropout", "softmax_features", "topk_features", "chunk_features", "cumsum_features",
    "sort_features", "flip_features", "roll_features", "mean_features", "squeeze_excite",
    "transposed", "position_gate", "ids_gate",
)  # fmt: skip
IDS_NEAR_MISSES = (
    "cumsum_positions", "token_types", "segments", "mask_ratio", "mask_from_ids",
)  # fmt: skip
NEAR_MISSES = FEATURE_NEAR_MISSES + IDS_NEAR_MISSES

SPELLING_FIELDS: dict[str, tuple[object, ...]] = {
    "attention": ATTENTIONS,
    "grouping": GROUPINGS,
    "scaling": SCALINGS,
    "mask_form": MASK_FORMS,
    "softmax": SOFTMAXES,
    "projection": PROJECTIONS,
    "position_table": POSITION_TABLES,
    "output": OUTPUTS,
    "flatten": (False, True),
}
"""Fields that change how a model is written, not the function it computes."""

_CHOICES: dict[str, tuple[object, ...]] = SPELLING_FIELDS | {
    "attention": ATTENTIONS + UNMATCHED_ATTENTIONS,
    "mlp": MLPS,
    "norm": NORMS,
    "norm_place": NORM_PLACES,
    "position": POSITIONS,
    "head": HEADS,
    "causal": (None, *CAUSALS),
    "mixer": (None, *MIXERS),
    "mixer_place": MIXER_PLACES,
    "near_miss": (None, *NEAR_MISSES),
}


@dataclass(frozen=True)
class ModelSpec:
    """A small dLLM-like transformer; `tests.models.build` makes the module.

    Two specs that differ only in `SPELLING_FIELDS` compute, built with one seed, the same
    function. A combination that no model can have raises ValueError.
    """

    vocab: int = 40
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    mlp: str = "swiglu"
    norm: str = "rmsnorm"
    """layernorm (nn.LayerNorm), rmsnorm (by hand, in float32), functional_rmsnorm (F.rms_norm)."""
    norm_place: str = "pre"
    parallel: bool = False
    """Attention and MLP read the same input and are added together."""
    bias: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head, before the rotation."""
    position: str = "rope_half"
    """rope_half rotates [B, H, T, d], rope_interleaved [B, T, H, d]; alibi is a float mask."""
    position_table: str = "computed"
    """Positions and rotations computed in forward, or a buffer of 256 of them, sliced."""
    tied: bool = False
    head: str = "linear"
    """linear, or BERT's dense, gelu, norm, decoder."""
    output: str = "dataclass"
    """The logits themselves, a tuple of them, or a dataclass with `.logits`."""
    flatten: bool = False
    """The MLP sees tokens merged into [B * T, hidden]."""

    attention: str = "sdpa"
    """A matched spelling (`ATTENTIONS`) or one to refuse (`UNMATCHED_ATTENTIONS`)."""
    grouping: str = "repeat_interleave"
    """How fewer kv heads serve the query heads; enable_gqa is SDPA's own and needs it."""
    scaling: str = "scores_mul"
    """Where the scale goes; "both" multiplies queries and keys by its root.

    For SDPA scores_mul is `scale=`, scores_div the default, and the others `scale=1.0`.
    """
    sharpness: float = 1.0
    """The scale is sharpness / sqrt(head_dim)."""
    mask_form: str = "additive"
    """additive (BERT's `(1 - keep) * min`), bool (torch.where), masked_fill."""
    softmax: str = "plain"
    """float32 names the dtype as transformers' eager attention does; SDPA ignores it."""
    projection: str = "separate"
    """separate; fused and split in three; unbind of a [3, H, d] view; chunks of each head."""
    padding: bool = False
    """Whether `attention_mask` [B, T] (1 = token) is used; without, it is ignored."""
    causal: str | None = None

    mixer: str | None = None
    mixer_place: str = "residual"
    """Last layer's residual stream, keys, flattened MLP input; or just before the head."""
    near_miss: str | None = None

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {choices}")
        for broken, why in self._conflicts():
            if broken:
                raise ValueError(why)

    def _conflicts(self) -> list[tuple[bool, str]]:
        return [
            (self.layers < 2, "a mixer in layer 1 would see ids only: layers >= 2"),
            (self.heads % self.kv_heads != 0, "kv_heads must divide heads"),
            (self.head_dim % 2 != 0, "a rotation needs an even head_dim"),
            (self.grouping == "enable_gqa" and self.attention != "sdpa", "enable_gqa is SDPA's"),
            (
                self.projection in ("unbind", "per_head") and self.kv_heads != self.heads,
                f"{self.projection} projections need as many kv heads as heads",
            ),
            (
                self.causal == "is_causal" and (self.attention != "sdpa" or self.masked),
                "is_causal is SDPA's and excludes any mask",
            ),
            (
                self.mixer_place == "flat" and self.mixer is not None and not self.flatten,
                "a flat mixer needs flatten",
            ),
            (
                self.mixer_place == "flat" and self.mixer == "batch_mean",
                "merged tokens have no batch to mix",
            ),
            (
                self.attention == "linear" and (self.causal is not None or self.masked),
                "linear attention knows no mask",
            ),
        ]

    @property
    def pad_token_id(self) -> int:
        return 0

    @property
    def mask_token_id(self) -> int:
        return self.vocab - 1

    @property
    def scale(self) -> float:
        return self.sharpness * float(self.head_dim) ** -0.5

    @property
    def masked(self) -> bool:
        """Whether a mask other than the causal one may reach the scores."""
        return self.padding or self.position == "alibi" or self.near_miss == "mask_from_ids"

    @property
    def refusal(self) -> str | None:
        """Why a correct compiler must run the model as it is: mixer, causal, attention."""
        if self.causal is not None:
            return "causal"
        if self.mixer is not None:
            return "mixer"
        return "attention" if self.attention in UNMATCHED_ATTENTIONS else None

    @property
    def separates_rows(self) -> bool:
        """Whether rows of equal ids differ.

        Where not, all masked rows have equal logits but for rounding, so that nothing may be
        expected of an order by confidence.
        """
        return self.position != "none" or self.near_miss in ("cumsum_positions", "position_gate")
