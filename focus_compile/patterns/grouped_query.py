"""Repeated K/V heads of grouped-query attention: repeat_interleave, or unsqueeze-expand-reshape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from focus_compile.passes.graph_tools import arg, op_name, position, shape_of
from focus_compile.patterns.match import look_through

__all__ = ["examples", "strip_repeat"]

HEAD_AXIS = 1


def strip_repeat(node: fx.Node) -> tuple[fx.Node, int]:
    """The K or V before its heads were repeated, and how often: [B, Hkv, S, d], Hq / Hkv.

    Returns the node itself and 1 where heads are not repeated, or not in the order
    (each head r times in a row) that grouped-query attention needs.
    """
    behind = look_through(node)
    if op_name(behind) == "repeat_interleave.self_int":
        axis: Any = arg(behind, 2) if len(behind.args) > 2 else behind.kwargs.get("dim")
        if axis is not None and position(int(axis), len(shape_of(behind))) == HEAD_AXIS:
            return arg(behind, 0), int(arg(behind, 1))
    if op_name(behind) == "reshape.default":
        return _expanded(node, behind)
    return node, 1


def _expanded(node: fx.Node, reshape: fx.Node) -> tuple[fx.Node, int]:
    """reshape(expand(unsqueeze(x, 2), [B, Hkv, r, S, d]), [B, Hkv * r, S, d])."""
    expand = look_through(arg(reshape, 0))
    if op_name(expand) != "expand.default" or len(shape_of(expand)) != 5:
        return node, 1
    inner = arg(expand, 0)
    assert isinstance(inner, fx.Node)
    batch, heads, repeats, length, width = shape_of(expand)
    before = [batch, heads, 1, length, width]
    if shape_of(inner) != before or shape_of(reshape) != [batch, heads * repeats, length, width]:
        return node, 1
    inner = look_through(inner)
    if op_name(inner) == "unsqueeze.default" and int(arg(inner, 1)) in (2, -3):
        return arg(inner, 0), int(repeats)
    return node, 1


def examples() -> Iterator[tuple[str, Any, bool]]:
    """(what, function of k [B, Hkv, S, d], whether the repeat is found)."""

    def expanded(k: Any) -> Any:
        b, h, s, d = k.shape
        return k[:, :, None].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)

    yield "expand", expanded, True
    yield "repeat_interleave", lambda k: k.repeat_interleave(2, 1), True
    yield "tiled heads", lambda k: k.repeat(1, 2, 1, 1), False
