"""Nodes of a program whose keys and values are spread over ranks by position.

Rank r holds the keys of the positions [r * shard, (r + 1) * shard), a multiple of the key block,
and the last rank those up to the end of the sequence. Everything that is chosen is chosen by all
ranks from equal numbers.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from focus_compile.errors import PassError
from focus_compile.passes.collectives import insert_sum_over_ranks
from focus_compile.passes.graph_tools import fake_of, shape_of
from focus_compile.passes.row_values import RowValues
from focus_compile.plan import Operand, Plan, RowAxes, Shards

__all__ = ["ShardNodes"]

aten = torch.ops.aten


class ShardNodes:
    """Sizes, slices and collectives of this rank's shard, put at the end of a graph.

    first, own: its first position and how many it has; shard: positions that a rank's caches have
    room for.
    """

    def __init__(self, graph: fx.Graph, plan: Plan, cache: fx.Node, ids: fx.Node) -> None:
        """cache: some key cache, an input of the graph; ids: the ids [batch, length]."""
        assert plan.shards is not None
        self.graph, self.plan, self.shards = graph, plan, plan.shards
        self.is_last = self.shards.rank == self.shards.size - 1
        self.shard = self.call(aten.sym_size.int, cache, 2)
        self.length = self.call(aten.sym_size.int, ids, 1)
        self.first: Any = 0
        if self.shards.rank:
            self.first = self.call(operator.mul, self.shard, self.shards.rank)
        self.own: Any = self.shard
        if self.is_last:
            self.own = self.call(operator.sub, self.length, self.first)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def of_cache(self, cache: fx.Node) -> fx.Node:
        """The positions of a cache [batch, heads, shard, d] that the sequence has."""
        return self.call(aten.slice.Tensor, cache, 2, 0, self.own) if self.is_last else cache

    def fill_cache(self, cache: fx.Node, rows: fx.Node) -> fx.Node:
        """The cache, written with this rank's rows [batch, heads, own, d]; zeros behind them."""
        return self.call(aten.copy_.default, cache, self._padded(rows, 2, 4))

    def columns(self, mask: fx.Node | None, shape: list[sympy.Expr]) -> fx.Node | None:
        """A mask of `shape` over this rank's keys."""
        if mask is None or shape[-1] == 1:
            return mask
        end = self.call(operator.add, self.first, self.own)
        return self.call(aten.slice.Tensor, mask, -1, self.first, end)

    def of_all_keys(self, scores: fx.Node) -> fx.Node:
        """Scores [batch, own] of this rank's positions as those of all ranks' shards."""
        return self._gathered(self._padded(scores, 1, 2), 1)

    def of_all_blocks(self, scores: fx.Node) -> fx.Node:
        """Scores [batch, blocks] of this rank's key blocks as those of all ranks'."""
        return self._gathered(scores, 1)

    def whole_cache(self, cache: fx.Node) -> fx.Node:
        """The keys or values [batch, heads, length, d] of all positions."""
        return self.call(aten.slice.Tensor, self._gathered(cache, 2), 2, 0, self.length)

    def join(self, attended: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
        """Attention to all keys and its log-sum-exp, of each rank's (out, lse) to its own."""
        out, lse = (self.call(operator.getitem, attended, at) for at in (0, 1))
        packed = self.call(aten.cat.default, [out, self.call(aten.unsqueeze.default, lse, -1)], -1)
        parts = self._by_rank(packed)
        sums = self.call(aten.select.int, parts, -1, -1)
        outs = self.call(aten.slice.Tensor, parts, -1, 0, -1)
        whole = self.call(aten.logsumexp.default, sums, [0])
        nothing = self.call(aten.eq.Scalar, whole, -float("inf"))
        base = self.call(aten.masked_fill.Scalar, whole, nothing, 0.0)
        weights = self.call(aten.exp.default, self.call(aten.sub.Tensor, sums, base))
        weighted = self.call(aten.mul.Tensor, outs, self.call(aten.unsqueeze.default, weights, -1))
        joined = self.call(aten.sum.dim_IntList, weighted, [0])
        whole = self.call(aten.to.dtype, whole, torch.float32)
        return self.call(aten.to.dtype, joined, dtype), whole

    def rows_of_all(
        self, values: fx.Node, node: fx.Node, axes: RowAxes, rows: fx.Node, own_rows: fx.Node
    ) -> fx.Node:
        """A value of this rank's rows at `rows` int64 [batch, any] of any rank.

        node: the value in the canonical graph; own_rows int64 [batch, own].
        """
        if not fake_of(node).is_floating_point():
            raise PassError(f"{node.name} is no floating point number, which ranks cannot hand on")
        place = self.call(aten.sub.Tensor, rows, self.first)
        held = self._within(place)
        last = self.call(operator.sub, self.own, 1)
        place = self.call(aten.clamp.default, place, 0, last)
        place.meta["device"] = rows.meta["device"]
        selection = RowValues(self.graph, place, own_rows, self.plan.batch, self.plan.length)
        shape, token = shape_of(node), axes.token
        if axes.batch is None and shape[token.axis] != self.plan.length * token.inner:
            raise PassError(f"cannot hand on rows of {node.name} at {axes}")
        picked = selection.select(values, shape, Operand(node.name, "gather", axes, len(shape)))
        flags = _like_rows(self, held, len(shape), axes, node.name)
        picked = self.call(aten.where.ScalarOther, flags, picked, 0.0)
        return insert_sum_over_ranks(self.graph, picked, self.shards.group)

    def writes(self, rows: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Which of the rows int64 [batch, active] this rank's caches take, and where.

        Returns slots and places int64 [batch, active], and bool [batch]: whether there are any.
        Rows of other ranks stand for repetitions of the first that is this one's; where there is
        none, for the cache's first.
        """
        count = self.call(aten.sym_size.int, rows, 1)
        device = rows.meta["device"]
        slots = self.graph.call_function(aten.arange.default, (count,), {"device": device})
        place = self.call(aten.sub.Tensor, rows, self.first)
        held = self._within(place)
        at = self.call(aten.where.ScalarOther, held, slots, count)
        first = self.call(aten.amin.default, at, [1], True)
        some = self.call(aten.lt.Scalar, first, count)
        least = self.call(aten.clamp.default, first, None, self.call(operator.sub, count, 1))
        slots = self.call(aten.where.self, held, slots, least)
        place = self.call(aten.gather.default, place, 1, slots)
        place = self.call(aten.mul.Tensor, place, some)
        return slots, place, self.call(aten.squeeze.dim, some, 1)

    def _within(self, place: fx.Node) -> fx.Node:
        not_before = self.call(aten.ge.Scalar, place, 0)
        return self.call(
            aten.logical_and.default, not_before, self.call(aten.lt.Scalar, place, self.own)
        )

    def _padded(self, values: fx.Node, axis: int, rank: int) -> fx.Node:
        """The values with as many positions as every rank has room for."""
        if not self.is_last:
            return values
        missing = self.call(operator.sub, self.shard, self.own)
        pad = [0] * (2 * (rank - axis) - 1)
        return self.call(aten.constant_pad_nd.default, values, [*pad, missing], 0)

    def _by_rank(self, values: fx.Node) -> fx.Node:
        """Every rank's values, [ranks, ...]."""
        ops = torch.ops._c10d_functional
        whole = self.graph.call_function(
            aten.clone.default, (values,), {"memory_format": torch.contiguous_format}
        )
        begun = self.call(
            ops.all_gather_into_tensor.default, whole, self.shards.size, self.shards.group
        )
        done = self.call(ops.wait_tensor.default, begun)
        return self.call(aten.unflatten.int, done, 0, [self.shards.size, -1])

    def _gathered(self, values: fx.Node, axis: int) -> fx.Node:
        """The ranks' values one behind the other along an axis."""
        parts = self._by_rank(values)
        moved = self.call(aten.movedim.int, parts, 0, axis)
        return self.call(aten.flatten.using_ints, moved, axis, axis + 1)


def _like_rows(nodes: ShardNodes, flags: fx.Node, rank: int, axes: RowAxes, name: str) -> fx.Node:
    """Flags [batch, rows] in the form of a value of `rank` axes that has its rows at `axes`."""
    token, batch = axes.token, axes.batch
    call = nodes.call
    if batch is not None and batch.axis != token.axis:
        if token.inner != 1 or batch.inner != 1:
            raise PassError(f"cannot hand on rows of {name} at {axes}")
        if token.axis < batch.axis:
            flags = call(aten.transpose.int, flags, 0, 1)
        return _with_axes(nodes, flags, rank, {token.axis, batch.axis})
    if batch is None:
        flags = call(aten.select.int, flags, 0, 0)
    else:
        flags = call(aten.flatten.using_ints, flags, 0, 1)
    if token.inner != 1:
        if not token.inner.is_Integer:
            raise PassError(f"cannot hand on rows of {name} at {axes}")
        flags = call(aten.repeat_interleave.self_int, flags, int(token.inner))
    return _with_axes(nodes, flags, rank, {token.axis})


def _with_axes(nodes: ShardNodes, flags: fx.Node, rank: int, own: set[int]) -> fx.Node:
    """The flags with axes of size 1 wherever they have none of their `own`."""
    for axis in sorted(set(range(rank)) - own):
        flags = nodes.call(aten.unsqueeze.default, flags, axis)
    return flags


def shards_of(group: str) -> Shards:
    """The ranks of a process group of that name."""
    from focus_compile.distributed.agreement import group_named

    found = group_named(group)
    return Shards(found.group_name, int(found.size()), int(found.rank()))
