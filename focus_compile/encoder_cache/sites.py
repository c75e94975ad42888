"""Attention over a cache that the forward was given, followed by the keys of its own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from focus_compile.passes.graph_tools import (
    arg,
    concrete,
    fake_of,
    op_name,
    position,
    shape_of,
    tensor_of,
    user_line,
)
from focus_compile.passes.match_attention import PATTERNS, canonical_mask, upright_key
from focus_compile.patterns.grouped_query import strip_repeat
from focus_compile.patterns.match import AttentionMatch, MaskTerm, Miss

__all__ = ["CachedSite", "Joined", "cached_sites", "mask_of"]

ZEROS = {"new_zeros.default", "zeros.default", "zeros_like.default"}


@dataclass(frozen=True)
class Joined:
    """Keys or values [batch, heads, held + new, d], made of a cache's and the forward's own.

    places: where the own ones were copied to, int64 [new], over what the cache has there; then
    `held` counts places, `length` (an input) those of them that are filled, and after the last
    there are zeros. None: the own ones follow the cache's.
    """

    cache: fx.Node
    own: fx.Node
    places: fx.Node | None = None
    length: fx.Node | None = None

    @property
    def held(self) -> int:
        """Keys of the cache, as traced."""
        return concrete(fake_of(self.cache).shape[2])


@dataclass(frozen=True)
class CachedSite:
    """One attention over a cache: output [B, H, new, d] of query [B, H, new, d]."""

    output: fx.Node
    query: fx.Node
    key: Joined
    value: Joined
    mask: MaskTerm | None
    scale: float
    spelling: str

    @property
    def where(self) -> str:
        return user_line(self.output)


def cached_sites(graph: fx.Graph) -> list[CachedSite]:
    """Those of the attentions that were recognised, in graph order; a key that is transposed may be
    set upright in the graph."""
    found = []
    for node in list(graph.nodes):
        pattern = next((p for p in PATTERNS if p.is_anchor(node)), None)
        if pattern is None:
            continue
        try:
            site = _site(graph, pattern.match(node))
        except Miss:
            continue
        if site is not None:
            found.append(site)
    return found


def _site(graph: fx.Graph, match: AttentionMatch) -> CachedSite | None:
    if match.causal or any(len(shape_of(n)) != 4 for n in (match.query, match.key, match.value)):
        return None
    with graph.inserting_before(match.output):
        upright = upright_key(graph, match)
    (key, repeats), (value, value_repeats) = strip_repeat(upright), strip_repeat(match.value)
    if repeats != value_repeats:
        key, value = upright, match.value
    keys, values = _joined(key), _joined(value)
    if keys is None or values is None or not _fit(match, keys, values):
        return None
    return CachedSite(
        match.output, match.query, keys, values, match.mask, match.scale, match.spelling
    )


def _fit(match: AttentionMatch, keys: Joined, values: Joined) -> bool:
    """Whether both caches are alike and belong to the queries, and the mask has a column a key.

    As traced: inputs that were as long as each other have lengths of their own where these are
    symbols, and the model's own attention would fail on others.
    """
    query, cache, own = (_sizes(node) for node in (match.query, keys.cache, keys.own))
    dtypes = {fake_of(n).dtype for n in (match.query, match.output, keys.cache, keys.own)}
    mask = match.mask
    return (
        cache == _sizes(values.cache)
        and own == _sizes(values.own)
        and keys.length is values.length
        and (query[0], query[2], query[3]) == (own[0], own[2], own[3])
        and query[1] % own[1] == 0
        and len(dtypes) == 1
        and _sizes(match.output) == query
        and (mask is None or _sizes(mask.node)[-1:] == [cache[2] + own[2]])
        and (mask is None or len(_sizes(mask.node)) == 4)
    )


def _sizes(node: fx.Node) -> list[int]:
    return [concrete(size) for size in fake_of(node).shape]


def _joined(node: fx.Node) -> Joined | None:
    if op_name(node) == "cat.default":
        parts: Any = arg(node, 0)
        axis = position(int(arg(node, 1)) if len(node.args) > 1 else 0, 4)
        if axis == 2 and len(parts) == 2 and _is_cache(parts[0], parts[1]):
            return Joined(parts[0], parts[1])
        return None
    return _copied(node)


def _copied(node: fx.Node) -> Joined | None:
    """index_copy(index_copy(zeros, 2, 0..held, cache), 2, length..length + new, own)."""
    if not _is_copy(node) or not _is_copy(arg(node, 0)):
        return None
    under, _, places, own = node.args
    assert isinstance(under, fx.Node)
    base, _, all_places, cache = under.args
    zeros = isinstance(base, fx.Node) and op_name(base) in ZEROS
    if not isinstance(own, fx.Node) or not isinstance(cache, fx.Node):
        return None
    if not zeros or not _is_cache(cache, own):
        return None
    held, new = fake_of(cache).shape[2], fake_of(own).shape[2]
    length = _offset(places, new)
    full = _sizes(node)[2] == _sizes(cache)[2] + _sizes(own)[2]
    if length is None or not full or not _counts(all_places, held):
        return None
    assert isinstance(places, fx.Node)
    return Joined(cache, own, places, length)


def _is_copy(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and op_name(node) == "index_copy.default"
        and position(int(arg(node, 1)), 4) == 2
    )


def _is_cache(cache: Any, own: Any) -> bool:
    """An input of the graph as long as it likes, otherwise of the shape of the graph's own keys."""
    if not isinstance(cache, fx.Node) or not isinstance(own, fx.Node) or cache.op != "placeholder":
        return False
    if tensor_of(cache) is None or tensor_of(own) is None:
        return False
    held, new = shape_of(cache), shape_of(own)
    return len(held) == len(new) == 4 and [*held[:2], held[3]] == [*new[:2], new[3]]


def _counts(node: Any, count: Any) -> bool:
    """arange(count)."""
    if not isinstance(node, fx.Node):
        return False
    end = node.args[0] if len(node.args) == 1 else None
    value = end.meta["val"] if isinstance(end, fx.Node) else end
    return op_name(node) == "arange.default" and concrete(value) == concrete(count)


def _offset(node: Any, count: Any) -> fx.Node | None:
    """The input `length` of arange(count) + length."""
    if not isinstance(node, fx.Node) or op_name(node) != "add.Tensor" or node.kwargs:
        return None
    for first, second in (node.args, reversed(node.args)):
        if _counts(first, count) and isinstance(second, fx.Node) and second.op == "placeholder":
            length = tensor_of(second)
            return second if length is not None and length.numel() == 1 else None
    return None


def mask_of(graph: fx.Graph, site: CachedSite) -> fx.Node | None:
    """The site's mask as the kernels take it: bool (True attends) or added to the logits."""
    return canonical_mask(graph, site.mask, site.query)
