"""`F.scaled_dot_product_attention`, with or without `enable_gqa`, mask and scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from focus_compile.passes.graph_tools import op_name, shape_of, tensor_of
from focus_compile.patterns.match import DROPOUT, AttentionMatch, MaskTerm, Miss

__all__ = ["ScaledDotProduct"]

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class ScaledDotProduct:
    """aten.scaled_dot_product_attention as one site."""

    name = "sdpa"

    @staticmethod
    def is_anchor(node: fx.Node) -> bool:
        return op_name(node) == "scaled_dot_product_attention.default"

    @staticmethod
    def match(node: fx.Node) -> AttentionMatch:
        """Raises Miss: dropout on, or operands without a head axis."""
        given: dict[str, Any] = dict(zip(ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
        if given.get("dropout_p", 0.0):
            raise Miss(DROPOUT)
        query = given["query"]
        if len(shape_of(query)) != 4:
            raise Miss(f"query has {len(shape_of(query))} axes, expected [batch, heads, rows, d]")
        mask = given.get("attn_mask")
        head_dim = int(shape_of(query)[-1])
        scale = given.get("scale")
        return AttentionMatch(
            anchor=node,
            output=node,
            query=query,
            key=given["key"],
            value=given["value"],
            scale=float(scale) if scale is not None else 1 / math.sqrt(head_dim),
            spelling=ScaledDotProduct.name,
            mask=None if mask is None else MaskTerm(_mask_kind(mask), mask),
            causal=bool(given.get("is_causal", False)),
        )

    @staticmethod
    def examples() -> Iterator[tuple[str, Any, bool]]:
        """(what, function of q, k, v [B, H, T, d], whether it is a hit)."""
        sdpa = torch.nn.functional.scaled_dot_product_attention
        yield "plain", lambda q, k, v: sdpa(q, k, v), True
        yield "scaled", lambda q, k, v: sdpa(q, k, v, scale=0.3), True
        mask = torch.rand(6, 6) > 0.3
        yield "masked", lambda q, k, v: sdpa(q, k, v, attn_mask=mask.to(q.device)), True
        yield "grouped", lambda q, k, v: sdpa(q, k[:, :2], v[:, :2], enable_gqa=True), True
        yield "dropout", lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), False
        yield "wide values", lambda q, k, v: sdpa(q, k, torch.cat([v, v], -1)), False
        yield "three axes", lambda q, k, v: sdpa(q[:, 0], k[:, 0], v[:, 0]), False


def _mask_kind(mask: fx.Node) -> str:
    tensor = tensor_of(mask)
    return "bool" if tensor is not None and tensor.dtype == torch.bool else "add"
