"""The step program: the forward as it is, but for how layers read the whole of a cache.

The model copies a cache and its own keys into one tensor before it attends. Here each is attended
to where it lies, and the two results are joined by their log-sum-exp, which gives the same.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from focus_compile.capture import copy_graph_module
from focus_compile.encoder_cache.plan import EncoderCachePlan, whole_cache_sites
from focus_compile.encoder_cache.sites import CachedSite, Joined, mask_of
from focus_compile.kernels.attention import op as _attention  # noqa: F401
from focus_compile.kernels.block_selection import op as _selection  # noqa: F401
from focus_compile.kernels.sink_capture import op as _sinks  # noqa: F401
from focus_compile.kernels.sparse_attention import op as _sparse  # noqa: F401
from focus_compile.passes.graph_tools import fake_of, fake_result

__all__ = ["CACHE_STEP_INPUTS", "BuildCacheCheck", "BuildCacheStep"]

aten = torch.ops.aten
CACHE_STEP_INPUTS = ("candidates", "keep")
"""Inputs of the step after the model's own: per sequence the number of key blocks of the cache that
are filled, and of those that a sparse layer reads, int64 [batch]. One tensor of summaries for each
sparse layer follows."""
_NEVER = -3.0e38
"""Relevance of a block that the mask lets no token read."""


@dataclass(frozen=True)
class BuildCacheStep:
    """Needs: the canonical graph that the plan was made from. Does not change it."""

    name: ClassVar[str] = "build-cache-step"
    plan: EncoderCachePlan = field(repr=False)

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, CACHE_STEP_INPUTS, summaries) -> the model's outputs."""
        step = copy_graph_module(gm)
        for own, ours in _attended(step.graph, self.plan):
            ours.meta["stack_trace"] = own.meta.get("stack_trace")
            own.replace_all_uses_with(ours)
            step.graph.erase_node(own)
        return _cleaned(step)


@dataclass(frozen=True)
class BuildCacheCheck:
    """Needs: as BuildCacheStep."""

    name: ClassVar[str] = "build-cache-check"
    plan: EncoderCachePlan = field(repr=False)

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of the step's inputs -> for each layer of the plan the model's own attention, and
        the step's of the same query, keys and values; then the model's outputs."""
        check = copy_graph_module(gm)
        pairs = _attended(check.graph, self.plan)
        output = check.graph.output_node()
        results: Any = output.args[0]
        output.args = ((*(node for pair in pairs for node in pair), *results),)
        return _cleaned(check)


def _attended(graph: fx.Graph, plan: EncoderCachePlan) -> list[tuple[fx.Node, fx.Node]]:
    """The attention of each layer of the plan, and the step's form of it, which nothing reads."""
    builder = _Builder(graph, plan)
    sites, _ = whole_cache_sites(graph)
    pairs = []
    for site, layer in zip(sites, plan.layers, strict=True):
        with graph.inserting_before(site.output):
            pairs.append((site.output, builder.attend(site, layer.region)))
    return pairs


def _cleaned(gm: fx.GraphModule) -> fx.GraphModule:
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


class _Builder:
    def __init__(self, graph: fx.Graph, plan: EncoderCachePlan) -> None:
        self.graph, self.plan = graph, plan
        self.sinks: fx.Node | None = None
        self.summaries: list[fx.Node] = []
        sites, _ = whole_cache_sites(graph)
        cache: Any = fake_of(sites[0].key.cache)
        self.mode = cache.fake_mode
        blocks = cache.shape[2] // plan.key_block
        last = graph.find_nodes(op="placeholder")[-1]
        counts = cache.new_empty(cache.shape[0], dtype=torch.int64)
        self.candidates, self.keep = (
            last := self._input(last, name, counts) for name in CACHE_STEP_INPUTS
        )
        for layer in plan.of_region("sparse-suffix"):
            width = layer.head_dim * (2 if plan.block_summary == "bound" else 1)
            shape = (cache.shape[0], layer.kv_heads, blocks, width)
            name = f"summaries_{len(self.summaries)}"
            last = self._input(last, name, cache.new_empty(shape))
            self.summaries.append(last)
        self._next = iter(self.summaries)

    def _input(self, behind: fx.Node, name: str, value: Any) -> fx.Node:
        with self.graph.inserting_after(behind):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def attend(self, site: CachedSite, region: str) -> fx.Node:
        """The attention of one site, at the graph's insertion point."""
        mask = mask_of(self.graph, site)
        of_cache, of_own = self._masks(site.key, mask)
        query, scale = site.query, site.scale
        key, value = site.key.cache, site.value.cache
        if region == "sparse-suffix":
            assert self.sinks is not None
            read = self._call(
                torch.ops.focus_compile.sparse_attention_of_shard.default,
                query, key, value, self._blocks(query, of_cache), self.sinks, self.candidates,
                0, self.plan.key_block, of_cache, scale,
            )  # fmt: skip
        else:
            read = self._attention(query, key, value, of_cache, scale)
        own = self._attention(query, *map(self._own, (site.key, site.value)), of_own, scale)
        out, lse = self._joined(read, own)
        if region == "sink-capture":
            limit = self._call(aten.mul.Tensor, self.candidates, self.plan.key_block)
            self.sinks = self._call(
                torch.ops.focus_compile.capture_sinks.default,
                query, key, lse, self._all_rows(query), of_cache, limit,
                self.plan.sink_tokens, scale,
            )  # fmt: skip
        return out

    def _attention(self, *args: Any) -> fx.Node:
        return self._call(torch.ops.focus_compile.attention_with_lse.default, *args)

    def _blocks(self, query: fx.Node, mask: fx.Node | None) -> fx.Node:
        """The key blocks of the cache that the tokens read, of those that some may."""
        ops, summaries = torch.ops.focus_compile, next(self._next)
        weight = self._all_rows(query)
        if mask is None:
            return self._call(
                ops.select_blocks.default, query, weight, summaries, self.candidates, self.keep
            )
        relevance = self._call(ops.block_relevance.default, query, weight, summaries)
        unread = self._call(aten.logical_not.default, self._may_read(mask, summaries))
        relevance = self._call(aten.masked_fill.Scalar, relevance, unread, _NEVER)
        return self._call(ops.keep_blocks.default, relevance, self.candidates, self.keep)

    def _may_read(self, mask: fx.Node, summaries: fx.Node) -> fx.Node:
        """Whether some token and head may read some key of a block, bool [batch or 1, blocks]."""
        if fake_of(mask).dtype != torch.bool:
            mask = self._call(aten.gt.Scalar, mask, torch.finfo(fake_of(mask).dtype).min / 2)
        anyone = self._call(aten.any.dims, mask, [1, 2])
        blocks, width = self._size(summaries, 2), self.plan.key_block
        symbolic = not isinstance(blocks, int)
        whole = self._call(operator.mul, blocks, width) if symbolic else blocks * width
        anyone = self._call(aten.slice.Tensor, anyone, 1, 0, whole)
        by_block = self._call(aten.reshape.default, anyone, [-1, blocks, width])
        return self._call(aten.any.dim, by_block, 2)

    def _all_rows(self, query: fx.Node) -> fx.Node:
        """The weight of every token, 1: all are undecided, float32 [batch, tokens]."""
        one = self._call(aten.select.int, self._call(aten.select.int, query, 1, 0), 2, 0)
        ones = self._call(aten.ones_like.default, one)
        return self._call(aten.to.dtype, ones, torch.float32)

    def _own(self, joined: Joined) -> fx.Node:
        """The forward's own keys or values, and as many zeros where the model has some behind the
        cache."""
        if joined.places is None:
            return joined.own
        zeros = self._call(aten.zeros_like.default, joined.own)
        return self._call(aten.cat.default, [joined.own, zeros], 2)

    def _masks(self, key: Joined, mask: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
        """The mask over the cache, and over what `_own` returns."""
        held = self._size(key.cache, 2)
        if key.places is None:
            if mask is None:
                return None, None
            return self._columns(mask, 0, held), self._columns(mask, held, None)
        free = self._free(key)
        over_cache, behind = self._columns(free, 0, held), self._columns(free, held, None)
        if mask is None:
            taken = self._call(aten.ones_like.default, behind)
            return over_cache, self._call(aten.cat.default, [taken, behind], 3)
        own = self._call(aten.index_select.default, mask, 3, key.places)
        rest = self._only(self._columns(mask, held, None), behind)
        return (
            self._only(self._columns(mask, 0, held), over_cache),
            self._call(aten.cat.default, [own, rest], 3),
        )

    def _free(self, key: Joined) -> fx.Node:
        """Which places of the model's tensor its own keys were not copied to, bool
        [1, 1, 1, held + new]."""
        assert key.places is not None
        own = self._size(key.own, 2)
        total = self._sum(self._size(key.cache, 2), own)
        options = {"device": fake_of(key.cache).device}
        place = self._call(aten.arange.default, total, **options)
        first = self._call(aten.slice.Tensor, key.places, 0, 0, 1)
        before = self._call(aten.lt.Tensor, place, first)
        behind = self._call(aten.ge.Tensor, place, self._call(aten.add.Tensor, first, own))
        free = self._call(aten.logical_or.default, before, behind)
        return self._call(aten.reshape.default, free, [1, 1, 1, -1])

    def _only(self, mask: fx.Node, kept: fx.Node) -> fx.Node:
        if fake_of(mask).dtype == torch.bool:
            return self._call(aten.logical_and.default, mask, kept)
        dropped = self._call(aten.logical_not.default, kept)
        return self._call(aten.masked_fill.Scalar, mask, dropped, float("-inf"))

    def _columns(self, mask: fx.Node, first: Any, end: Any) -> fx.Node:
        end = torch.iinfo(torch.int64).max if end is None else end
        return self._call(aten.slice.Tensor, mask, 3, first, end)

    def _joined(self, one: fx.Node, other: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Attention over the keys of both (out, lse) pairs, and its log-sum-exp float32."""
        outs, lses = zip(*(self._parts(pair) for pair in (one, other)), strict=True)
        lse = self._call(aten.logaddexp.default, *lses)
        total = None
        for out, part in zip(outs, lses, strict=True):
            weight = self._call(aten.exp.default, self._call(aten.sub.Tensor, part, lse))
            weight = self._call(aten.nan_to_num.default, weight)  # of a row without any key
            weight = self._call(aten.unsqueeze.default, weight, -1)
            added = self._call(aten.mul.Tensor, out, weight)
            total = added if total is None else self._call(aten.add.Tensor, total, added)
        assert total is not None
        return self._call(aten.to.dtype, total, fake_of(outs[0]).dtype), lse

    def _parts(self, pair: fx.Node) -> tuple[fx.Node, fx.Node]:
        nodes = []
        for at in range(2):
            node = self.graph.call_function(operator.getitem, (pair, at))
            node.meta["val"] = pair.meta["val"][at]
            nodes.append(node)
        return nodes[0], nodes[1]

    def _size(self, node: fx.Node, axis: int) -> Any:
        """A size as an argument: a number, or a node where it was traced symbolically."""
        size = fake_of(node).shape[axis]
        return size if isinstance(size, int) else self._call(aten.sym_size.int, node, axis)

    def _sum(self, one: Any, other: Any) -> Any:
        if isinstance(one, int) and isinstance(other, int):
            return one + other
        return self._call(operator.add, one, other)

    def _call(self, target: Any, *args: Any, **options: Any) -> fx.Node:
        node = self.graph.call_function(target, args, options)
        with self.mode:
            node.meta["val"] = fake_result(target, args, options)
        return node
