"""Dynamo-level pass: the flex_attention higher-order op becomes SDPA with a dense mask.

Assumes the identity score_mod and an unused log-sum-exp; other uses stay, and capture refuses them.
The block mask's builder (vmap nodes) goes with it: only its mask_mod is kept, applied to aranges.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

__all__ = ["NormalizeFlexAttention", "flex_calls"]

MASK_MOD = -1
"""The block mask tuple has 13 entries on torch 2.11 and 17 on 2.13; mask_mod is always last."""


@dataclass(frozen=True)
class NormalizeFlexAttention:
    """Replace `flex_attention(q, k, v, identity, block_mask)` by SDPA with a dense mask."""

    name: ClassVar[str] = "normalize-flex-attention"

    def apply(self, gm: fx.GraphModule) -> int:
        """Number of attention calls rewritten."""
        done = sum(_rewrite(gm, node) for node in flex_calls(gm))
        if done:
            _erase_dead(gm.graph)
            gm.graph.lint()
            gm.recompile()
        return done


def flex_calls(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of the higher-order op."""
    flex = torch.ops.higher_order.flex_attention
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is flex]


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> int:
    arguments: tuple[Any, ...] = node.args
    query, key, value, score_mod, block_mask, scale = arguments[:6]
    mask_buffers = arguments[8] if len(arguments) > 8 else ()
    _erase_unread(gm.graph, [user for user in node.users if user.args[1:] != (0,)])
    if not _is_identity(getattr(gm, score_mod.target)) or _uses_logsumexp(node):
        return 0
    mask_mod = getattr(gm, block_mask[MASK_MOD].target)
    grouped = _heads(query) != _heads(key)
    graph = gm.graph
    with graph.inserting_before(node):
        mask = _dense_mask(graph, mask_mod, query, key, mask_buffers)
        attention = graph.call_function(
            torch.nn.functional.scaled_dot_product_attention,
            (query, key, value),
            {"attn_mask": mask, "scale": scale, "enable_gqa": grouped},
        )
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(attention)
        graph.erase_node(user)
    graph.erase_node(node)
    return 1


def _heads(node: Any) -> int:
    return int(node.meta["example_value"].shape[1])


def _is_identity(module: fx.GraphModule) -> bool:
    output = module.graph.output_node().args[0]
    return output is next(iter(module.graph.find_nodes(op="placeholder")))


def _erase_unread(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase what is made of the nodes and read by nothing, as the log-sum-exp that a caller casts
    and drops; then the nodes themselves, if nothing is left."""
    made = dict.fromkeys(nodes)
    for node in graph.nodes:
        if any(source in made for source in node.all_input_nodes):
            made[node] = None
    for node in reversed(list(graph.nodes)):
        writes = node.op == "call_method" and str(node.target).endswith("_")
        if node in made and not node.users and not writes and not node.is_impure():
            graph.erase_node(node)


def _uses_logsumexp(node: fx.Node) -> bool:
    for user in node.users:
        if user.target is not operator.getitem:
            return True
        if user.args[1] != 0 and user.users:
            return True
    return False


def _dense_mask(
    graph: fx.Graph, mask_mod: fx.GraphModule, query: Any, key: Any, buffers: Any
) -> fx.Node:
    """mask_mod over broadcast aranges: [batch, 1, queries, keys] bool."""
    device = query.meta["example_value"].device
    sizes: list[Any] = [graph.call_method("size", (query, 0)), 1]
    sizes += [graph.call_method("size", (query, 2)), graph.call_method("size", (key, 2))]
    indices = []
    for axis, size in enumerate(sizes):
        arange = graph.call_function(torch.arange, (size,), {"device": device})
        shape = [-1 if other == axis else 1 for other in range(4)]
        indices.append(graph.call_method("view", (arange, *shape)))
    environment: dict[fx.Node, Any] = {}
    placeholders = mask_mod.graph.find_nodes(op="placeholder")
    for placeholder, value in zip(placeholders, [*indices, *buffers], strict=True):
        environment[placeholder] = value
    for inner in mask_mod.graph.nodes:
        if inner.op == "call_function" or inner.op == "call_method":
            environment[inner] = graph.node_copy(inner, environment.__getitem__)
    output: Any = mask_mod.graph.output_node().args[0]
    result = environment[output]
    return graph.call_function(torch.broadcast_to, (result, tuple(sizes)))


STATEFUL = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")


def _erase_dead(graph: fx.Graph) -> None:
    """Dead-code elimination that also drops `setitem` on, and vmap regions of, dead values."""
    live: set[fx.Node] = set()
    _mark(live, [node for node in graph.nodes if _is_root(node)])
    grown = -1
    while grown != len(live):
        grown = len(live)
        _mark(live, [node for node in graph.nodes if _writes_into(node, live)])
    if any(_is_vmap(node) for node in live):
        _mark(live, [node for node in graph.nodes if _is_vmap(node)])
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)


def _mark(live: set[fx.Node], pending: list[fx.Node]) -> None:
    """Add nodes and all that they read."""
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(node.all_input_nodes)


def _is_root(node: fx.Node) -> bool:
    return node.op in ("output", "placeholder") or any(w in str(node.target) for w in STATEFUL)


def _is_vmap(node: fx.Node) -> bool:
    return "predispatch" in str(node.target)


def _writes_into(node: fx.Node, live: set[fx.Node]) -> bool:
    method = node.op == "call_method" and str(node.target).endswith("_")
    writes = node.target is operator.setitem or (method and not str(node.target).endswith("__"))
    return writes and node.args[0] in live
