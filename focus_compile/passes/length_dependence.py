"""What rows read beside the tokens: whether it stays as it is when the sequence grows.

Rows of finished blocks never change under a block-causal mask, provided that nothing else changes
with the length. Dynamic RoPE scaling does: its angles depend on how long the sequence is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from focus_compile.passes.constant_masks import MASK, evaluate
from focus_compile.passes.graph_tools import user_line
from focus_compile.plan import Plan, Refusal

__all__ = ["LengthTables"]

aten = torch.ops.aten
ATTENTION = torch.ops.focus_compile.attention.default
SIZE_TAKERS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.expand, aten.repeat, aten.slice,
    aten.narrow, aten.unflatten, aten.split, aten.split_with_sizes, aten.chunk, aten.new_zeros,
    aten.new_ones, aten.new_empty, aten.sym_size,
}  # fmt: skip
"""Ops of which numbers are sizes and places, never values."""
TOLERANCE = 1e-5
"""Absolute, for tables of numbers about one. Two lengths may be computed in another order."""


class LengthTables:
    """Values of a graph that depend on sizes and other inputs but on no token, as far as the
    tokens' rows read them: position tables, and numbers made of the length."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        self.gm = gm
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._names = [node.name for node in placeholders]
        ids = placeholders[plan.ids.position]
        changing = {placeholders[at] for role in ("size", "guarded") for at in plan.positions(role)}
        of_tokens: set[fx.Node] = {ids}
        for node in gm.graph.nodes:
            if _is_size(node):
                changing.add(node)
            elif any(source in of_tokens for source in node.all_input_nodes):
                of_tokens.add(node)
            elif any(source in changing for source in node.all_input_nodes):
                changing.add(node)
        self._sizes = [n for n in changing if _is_size(n) and n.args[0] is ids]
        self.nodes = [
            node
            for node in gm.graph.nodes
            if node in changing
            and node not in self._sizes
            and any(_reads_value(node, user) for user in node.users if user in of_tokens)
        ]
        self._order = self._ancestors()

    def _ancestors(self) -> list[fx.Node]:
        seen: set[fx.Node] = set()
        pending = list(self.nodes)
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending.extend(() if node in self._sizes else node.all_input_nodes)
        return [node for node in self.gm.graph.nodes if node in seen]

    def values(self, args: Sequence[Any], ids: Tensor) -> list[Any]:
        """Of `nodes`, at a call with these inputs of the graph."""
        given: Mapping[str, Any] = dict(zip(self._names, args, strict=True))
        known = {n: given[n.name] for n in self._order if n.op == "placeholder"}
        known |= {n: ids.shape[int(n.args[1])] for n in self._sizes}
        with torch.no_grad():
            found = evaluate(self.gm, self._order, known, ids.device)
        return [found[node] for node in self.nodes]

    def why_changed(self, before: Sequence[Any], after: Sequence[Any]) -> Refusal | None:
        """None if rows that both calls have read the same, else what they read."""
        for node, old, new in zip(self.nodes, before, after, strict=True):
            if not _same_rows(old, new):
                return Refusal(
                    f"{node.name} depends on how long the sequence is",
                    user_line(node),
                    "Every block is computed with all before it. RoPE scaled for one length (any "
                    "but dynamic) lets finished blocks stay.",
                )
        return None


def _is_size(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is aten.sym_size


def _reads_value(node: fx.Node, user: fx.Node) -> bool:
    """Whether a node's user computes with it, and doesn't only take sizes or a site's mask."""
    if user.op != "call_function":
        return True
    if user.target is ATTENTION and user.args[MASK] is node:
        return sum(argument is node for argument in user.args) > 1
    packet = getattr(user.target, "overloadpacket", None)
    is_number = not isinstance(node.meta.get("val"), Tensor)
    return not (is_number and packet in SIZE_TAKERS)


def _same_rows(old: Any, new: Any) -> bool:
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return bool(old == new)
    if old.dim() != new.dim():
        return False
    shared = tuple(slice(min(pair)) for pair in zip(old.shape, new.shape, strict=True))
    old, new = old[shared], new[shared]
    if not (old.is_floating_point() or old.is_complex()):
        return torch.equal(old, new)
    return torch.allclose(old, new, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
