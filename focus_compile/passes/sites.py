"""The attention sites of a canonical graph, in layer order, and the region of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from focus_compile.config import COMBINED, FocusConfig
from focus_compile.passes.graph_tools import shape_of, tensor_of, user_line
from focus_compile.plan import Site

__all__ = ["regions_of", "sites_of"]


def sites_of(graph: fx.Graph, config: FocusConfig) -> tuple[Site, ...]:
    nodes = graph.find_nodes(op="call_function", target=torch.ops.focus_compile.attention.default)
    regions = regions_of(len(nodes), config)
    return tuple(
        _site(index, node, region)
        for index, (node, region) in enumerate(zip(nodes, regions, strict=True))
    )


def _site(index: int, node: fx.Node, region: str) -> Site:
    arguments: tuple[Any, ...] = node.args
    query, key, value, mask = arguments[:4]
    tensor = tensor_of(key)
    assert tensor is not None
    return Site(
        index=index,
        node=node.name,
        key=key.name,
        value=value.name,
        heads=int(shape_of(query)[1]),
        kv_heads=int(shape_of(key)[1]),
        head_dim=int(shape_of(key)[3]),
        value_dim=int(shape_of(value)[3]),
        dtype=str(tensor.dtype).removeprefix("torch."),
        masked=mask is not None,
        spelling=node.meta["spelling"],
        where=user_line(node),
        region=region,
    )


def regions_of(layers: int, config: FocusConfig) -> list[str]:
    """dense-prefix x l, sink-capture, sparse-suffix, dense-tail; all dense if nothing is sparse.

    Where the sinks are the first positions, no layer captures them.
    """
    dense = config.dense_layers_for(layers)
    captures = int(config.policy != COMBINED)
    tail_at = max(0, layers - config.dense_tail_layers)
    sparse = tail_at - dense - captures
    if config.policy not in ("focus-dllm", COMBINED) or sparse <= 0:
        return ["dense-prefix"] * layers
    tail = layers - tail_at
    return (
        ["dense-prefix"] * dense
        + ["sink-capture"] * captures
        + ["sparse-suffix"] * sparse
        + ["dense-tail"] * tail
    )
