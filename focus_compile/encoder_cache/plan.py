"""The plan of a forward that reads a cache: which layers leave out keys of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from focus_compile.capture import Capture
from focus_compile.config import FocusConfig
from focus_compile.encoder_cache.sites import CachedSite, cached_sites
from focus_compile.key_costs import KeyCosts, KeyShape, key_costs
from focus_compile.passes.graph_tools import concrete, fake_of, shape_of
from focus_compile.passes.sites import regions_of
from focus_compile.plan import Refusal

__all__ = ["CacheLayer", "EncoderCachePlan", "NoSuchPlan", "plan_over_cache", "whole_cache_sites"]


class NoSuchPlan(Exception):
    """Why a forward that reads a cache has no plan."""


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """A layer that reads the whole cache: positions of its inputs in the graph, and its region.

    length: of the input that says how much of the cache is filled; None: all is.
    """

    key: int
    value: int
    length: int | None
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    spelling: str
    where: str
    region: str


@dataclass(frozen=True)
class EncoderCachePlan:
    """What the step program of such a forward does, and what is compared before it runs.

    layers: those that read the whole cache, in graph order; exact: how many others attend to a
    cache, which stay as they are; weight: position of the input that tells one model from another.
    """

    layers: tuple[CacheLayer, ...]
    exact: int
    weight: int
    held: str
    own: str
    key_block: int
    block_summary: str
    sink_tokens: int
    key_costs: KeyCosts | None = None
    refusals: tuple[Refusal, ...] = ()
    inputs: tuple[str, ...] = field(default=(), repr=False)

    def of_region(self, region: str) -> tuple[CacheLayer, ...]:
        return tuple(layer for layer in self.layers if layer.region == region)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return {
            "accepted": not self.refusals,
            "refusals": [refusal.to_dict() for refusal in self.refusals],
            "reads_cache": True,
            "cache_keys": self.held,
            "own_tokens": self.own,
            "key_block": self.key_block,
            "block_summary": self.block_summary,
            "sink_tokens": self.sink_tokens,
            "exact_layers": self.exact,
            "key_costs": None if self.key_costs is None else self.key_costs.to_dict(),
            "sites": [
                {
                    "index": index, "region": layer.region, "heads": layer.heads,
                    "kv_heads": layer.kv_heads, "head_dim": layer.head_dim, "dtype": layer.dtype,
                    "spelling": layer.spelling, "where": layer.where,
                }
                for index, layer in enumerate(self.layers)
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"plan: all {self.own} tokens in every call, over a cache of {self.held} keys that is "
            "read only",
            f"  {len(self.layers)} layers read the whole of it, {self.exact} a part, exactly",
        ]
        for index, layer in enumerate(self.layers):
            shape = f"{layer.heads}/{layer.kv_heads} heads of {layer.head_dim}"
            lines.append(f"  layer {index:>2} {layer.region:<13} {layer.spelling}, {shape}")
        if self.key_costs is not None:
            lines.append(f"  keys: {self.key_costs}")
        lines.append("  guard: the cache's tensors, a key of every block, how much is filled")
        return "\n".join(lines)


def whole_cache_sites(graph: fx.Graph) -> tuple[list[CachedSite], int]:
    """The sites over the longest cache, which is the whole of it where others have a sliding
    window, and the number of the others."""
    sites = cached_sites(graph)
    longest = max((site.key.held for site in sites), default=0)
    whole = [site for site in sites if site.key.held == longest]
    return whole, len(sites) - len(whole)


def plan_over_cache(captured: Capture, gm: fx.GraphModule, config: FocusConfig) -> EncoderCachePlan:
    """The plan of the canonical graph `gm`.

    Raises:
        NoSuchPlan: nothing of the cache can be left out, and why.
    """
    _require_options(config)
    sites, others = whole_cache_sites(gm.graph)
    if not sites:
        raise NoSuchPlan("its keys are no cache of the call's inputs followed by those of its ids")
    regions = regions_of(len(sites), config)
    if "sparse-suffix" not in regions:
        raise NoSuchPlan(
            f"{len(sites)} of its layers read the whole cache, and dense_layers, the sink capture "
            "and dense_tail_layers leave none to read a part"
        )
    if sites[0].key.held < config.key_block:
        raise NoSuchPlan(f"its {sites[0].key.held} keys fill no block of {config.key_block}")
    places = {node: at for at, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    layers = tuple(
        _layer(site, region, places) for site, region in zip(sites, regions, strict=True)
    )
    first = sites[0].key
    read = {places[node] for site in sites for node in (site.key.cache, site.value.cache)}
    read |= {layer.length for layer in layers if layer.length is not None}
    weights = [at for at, info in enumerate(captured.inputs) if info.is_weight and at not in read]
    if not weights:
        raise NoSuchPlan("the graph has no parameters, which tell one model's calls from another's")
    plan = EncoderCachePlan(
        layers, others, weights[0], str(shape_of(first.cache)[2]), str(shape_of(first.own)[2]),
        config.key_block, config.block_summary, config.sink_tokens, _costs(sites, regions, config),
        inputs=tuple(info.name for info in captured.inputs),
    )  # fmt: skip
    if plan.key_costs is not None and plan.key_costs.dense_wins:
        raise NoSuchPlan(f"choosing keys would save nothing ({plan.key_costs})")
    return plan


def _require_options(config: FocusConfig) -> None:
    if config.policy != "focus-dllm":
        raise NoSuchPlan(f'policy="{config.policy}" chooses no keys of it')
    if config.context_parallel is not None:
        raise NoSuchPlan("context_parallel has no form for it")
    if config.guard > 0:
        raise NoSuchPlan("guard has no form for it")
    if config.list_reuse > 1:
        raise NoSuchPlan("list_reuse has no form for it")


def _layer(site: CachedSite, region: str, places: dict[fx.Node, int]) -> CacheLayer:
    query, key = shape_of(site.query), shape_of(site.key.cache)
    length = site.key.length
    return CacheLayer(
        places[site.key.cache], places[site.value.cache],
        None if length is None else places[length], int(query[1]), int(key[1]),
        int(key[3]), str(fake_of(site.key.cache).dtype).removeprefix("torch."),
        site.spelling, site.where, region,
    )  # fmt: skip


def _costs(sites: list[CachedSite], regions: list[str], config: FocusConfig) -> KeyCosts | None:
    """What choosing keys and reading all would cost on this device, where that is asked for."""
    cache, query = fake_of(sites[0].key.cache), fake_of(sites[0].query)
    if not (cache.is_cuda if config.dense_if_faster is None else config.dense_if_faster):
        return None
    batch, kv_heads, held, width = (concrete(size) for size in cache.shape)
    blocks = held // config.key_block
    return key_costs(
        KeyShape(
            batch=batch, heads=concrete(query.shape[1]), kv_heads=kv_heads, head_dim=width,
            length=held, rows=concrete(query.shape[2]), key_block=config.key_block,
            kept=math.ceil(blocks * config.keep_ratio), sinks=config.sink_tokens,
            block_summary=config.block_summary, sparse=regions.count("sparse-suffix"),
            dtype=cache.dtype, device=torch.device(cache.device),
        )
    )  # fmt: skip
