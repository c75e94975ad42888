"""What a pattern returns: a match in canonical terms, or the condition that failed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from focus_compile.passes.graph_tools import arg, op_name, shape_of, tensor_of

__all__ = [
    "CASTS",
    "DROPOUT",
    "NEGLIGIBLE",
    "AttentionMatch",
    "MaskTerm",
    "Miss",
    "OtherKeys",
    "look_through",
    "mask_rank_is_four",
]

NEGLIGIBLE = -1e8
"""A finite fill at or below this absorbs any score, so adding it equals filling with it."""
DROPOUT = "attention dropout is on, which model.eval() turns off"
CASTS = {"_to_copy.default", "clone.default", "to.dtype", "type_as.default"}


class Miss(Exception):
    """The anchor looked like attention but a condition failed; the message says which."""


class OtherKeys(Miss):
    """Attention whose keys are not those of the call's own tokens."""


@dataclass(frozen=True)
class MaskTerm:
    """One masking of the scores: kind "bool" (keep where True), "not" (drop where True) or "add".

    fill: what dropped scores become, for "bool" and "not".
    """

    kind: str
    node: fx.Node
    fill: float = float("-inf")


@dataclass(frozen=True)
class AttentionMatch:
    """softmax(query key^T * scale + mask) value, found around `anchor`, producing `output`.

    Shapes: query [B, H, T, d], key [B, Hkv, S, d], value [B, Hkv, S, dv]; `key_is_transposed`
    says that the key node is [B, Hkv, d, S] instead.
    """

    anchor: fx.Node
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    spelling: str
    mask: MaskTerm | None = None
    key_is_transposed: bool = False
    causal: bool = False


def look_through(node: fx.Node, names: set[str] = CASTS) -> fx.Node:
    """The value behind casts and copies."""
    while op_name(node) in names and isinstance(arg(node, 0), fx.Node):
        node = arg(node, 0)
    return node


def mask_rank_is_four(node: fx.Node) -> bool:
    """True where the mask broadcasts to [B, H, T, S] without hidden axes in front."""
    return tensor_of(node) is not None and len(shape_of(node)) <= 4
