"""Every attention subgraph becomes one `focus_compile::attention` node, whatever its spelling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from focus_compile.kernels.attention import op as _attention  # noqa: F401  (defines the op)
from focus_compile.passes.graph_tools import (
    arg,
    fake_of,
    insert_call,
    op_name,
    shape_of,
    user_line,
)
from focus_compile.patterns.grouped_query import strip_repeat
from focus_compile.patterns.match import AttentionMatch, MaskTerm, Miss, OtherKeys, look_through
from focus_compile.patterns.sdpa import ScaledDotProduct
from focus_compile.patterns.softmax import MatmulSoftmaxMatmul
from focus_compile.plan import Refusal

__all__ = ["PATTERNS", "MatchAttention", "canonical_mask", "upright_key"]

aten = torch.ops.aten
FLATTENING = {"reshape.default", "clone.default", "_to_copy.default"}
PATTERNS = (ScaledDotProduct, MatmulSoftmaxMatmul)


@dataclass(frozen=True)
class MatchAttention:
    """Needs: canonical ATen. Replaces matches; collects near misses and causal sites."""

    name: ClassVar[str] = "match-attention"
    misses: list[Refusal] = field(default_factory=list)
    causal: list[Refusal] = field(default_factory=list)
    other_keys: list[Refusal] = field(default_factory=list)
    """Those of the misses whose keys are not those of the call's own tokens."""

    def apply(self, gm: fx.GraphModule) -> int:
        """Number of attention sites found."""
        found = 0
        for node in list(gm.graph.nodes):
            pattern = next((p for p in PATTERNS if p.is_anchor(node)), None)
            if pattern is None:
                continue
            try:
                match = pattern.match(node)
                _canonicalise(gm.graph, match)
            except Miss as miss:
                refusal = _refusal(node, f"{pattern.name}: {miss}")
                self.misses.append(refusal)
                if isinstance(miss, OtherKeys):
                    self.other_keys.append(refusal)
                continue
            found += 1
            if match.causal:
                self.causal.append(_refusal(node, "causal attention"))
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return found


def _refusal(node: fx.Node, reason: str) -> Refusal:
    return Refusal(reason, f"{node.name}, {user_line(node)}")


def _canonicalise(graph: fx.Graph, match: AttentionMatch) -> None:
    """Insert the canonical op before the match's output and reroute its users."""
    output = match.output
    with graph.inserting_before(output):
        query = _with_heads(graph, match.query, None)
        heads = shape_of(query)[:2]
        key = _with_heads(graph, upright_key(graph, match), heads)
        value = _with_heads(graph, match.value, heads)
        (key, value) = _without_repeats(query, key, value)
        _check_shapes(query, key, value)
        mask = canonical_mask(graph, match.mask, query)
        site = insert_call(
            graph, torch.ops.focus_compile.attention.default, query, key, value, mask, match.scale
        )
        site.meta["spelling"] = match.spelling
        site.meta["stack_trace"] = output.meta.get("stack_trace") or output.stack_trace
        result = site
        expected = fake_of(output)
        if expected.dim() == 3:
            sizes = [-1, _size(graph, query, 2), _size(graph, value, 3)]
            result = insert_call(graph, aten.reshape.default, site, sizes)
        if result.meta["val"].dtype != expected.dtype:
            raise Miss(f"the output is {expected.dtype}, the queries are {fake_of(query).dtype}")
    output.replace_all_uses_with(result)
    graph.erase_node(output)


def _size(graph: fx.Graph, node: fx.Node, axis: int) -> int | fx.Node:
    """The length of an axis as an argument of a reshape."""
    size = fake_of(node).shape[axis]
    return size if isinstance(size, int) else insert_call(graph, aten.sym_size.int, node, axis)


def upright_key(graph: fx.Graph, match: AttentionMatch) -> fx.Node:
    """The key as [..., S, d]."""
    if not match.key_is_transposed:
        return match.key
    key = look_through(match.key)
    if _swaps_last_axes(key):
        return arg(key, 0)
    return insert_call(graph, aten.transpose.int, match.key, -2, -1)


def _swaps_last_axes(node: fx.Node) -> bool:
    rank = len(shape_of(node))
    if op_name(node) == "transpose.int":
        return {arg(node, 1) % rank, arg(node, 2) % rank} == {rank - 1, rank - 2}
    if op_name(node) == "permute.default":
        order = [int(axis) % rank for axis in arg(node, 1)]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return op_name(node) in ("mT.default", "numpy_T.default") and rank >= 2


def _with_heads(graph: fx.Graph, node: fx.Node, heads: list[Any] | None) -> fx.Node:
    """[B, H, S, d]: the node itself, or what its head-flattening reshape was made from."""
    rank = len(shape_of(node))
    if rank == 4:
        return node
    if rank != 3:
        raise Miss(f"an operand has {rank} axes, expected 4, or 3 with heads flattened")
    source = node
    while len(shape_of(source)) != 4 and op_name(source) in FLATTENING:
        source = arg(source, 0)
    if len(shape_of(source)) == 4 and shape_of(source)[2:] == shape_of(node)[1:]:
        return source
    if heads is not None and all(size.is_Integer for size in (*heads, *shape_of(node))):
        sizes = [int(size) for size in (*heads, *shape_of(node)[1:])]
        if int(shape_of(node)[0]) == sizes[0] * sizes[1]:
            return insert_call(graph, aten.reshape.default, node, sizes)
    raise Miss("an operand has 3 axes and no flattened heads behind it")


def _without_repeats(query: fx.Node, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    bare_key, repeats = strip_repeat(key)
    bare_value, value_repeats = strip_repeat(value)
    if repeats == value_repeats and repeats > 1:
        return bare_key, bare_value
    return key, value


def _check_shapes(query: fx.Node, key: fx.Node, value: fx.Node) -> None:
    q, k, v = shape_of(query), shape_of(key), shape_of(value)
    dtypes = [str(fake_of(node).dtype).removeprefix("torch.") for node in (query, key, value)]
    if len(set(dtypes)) > 1:
        raise Miss("query, key and value are {}, {} and {}".format(*dtypes))
    if q[2] != k[2]:
        raise OtherKeys(f"{q[2]} queries and {k[2]} keys: only self-attention over all tokens")
    if q[0] != k[0] or k[:3] != v[:3]:
        raise Miss(f"query {q}, key {k} and value {v} do not belong together")
    if q[3] != k[3]:
        raise Miss(f"query width {q[3]} differs from key width {k[3]}")
    if k[3] != v[3]:
        raise Miss(f"keys and values differ in width ({k[3]} and {v[3]})")
    if q[1] % k[1] != 0:
        raise Miss(f"{q[1]} query heads over {k[1]} key heads")


def canonical_mask(graph: fx.Graph, term: MaskTerm | None, query: fx.Node) -> fx.Node | None:
    """Bool (True: attend) or additive, of at most four axes."""
    if term is None:
        return None
    mask = term.node
    rank = len(shape_of(mask))
    if rank > 4:
        raise Miss(f"the mask has {rank} axes")
    if rank == 3 and shape_of(mask)[0] != 1:
        sizes = [*shape_of(query)[:2], *shape_of(mask)[1:]]
        if not all(size.is_Integer for size in sizes):
            raise Miss("a mask per flattened head with symbolic sizes")
        mask = insert_call(graph, aten.reshape.default, mask, [int(size) for size in sizes])
    if term.kind == "add":
        return mask
    dropped = mask if term.kind == "not" else insert_call(graph, aten.logical_not.default, mask)
    if term.fill == float("-inf"):
        return mask if term.kind == "bool" else insert_call(graph, aten.logical_not.default, mask)
    kind = fake_of(query).dtype
    zeros = insert_call(graph, aten.zeros_like.default, mask)
    zeros = insert_call(graph, aten.to.dtype, zeros, kind)
    lowest = max(term.fill, torch.finfo(kind).min)
    return insert_call(graph, aten.masked_fill.Scalar, zeros, dropped, lowest)
