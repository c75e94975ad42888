"""Collectives of a model that is split over ranks, in forms that rows pass through.

Cases: (1) tensors gathered along their first axis, split by rank and concatenated along another:
gathered along that axis; (2) numbers put where a mask says, as a table of embeddings that is split
by tokens does for those of other ranks: `where`; (3) a value overwritten by another, as by
`torch.distributed.all_reduce` in place: the other.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from focus_compile.distributed.agreement import group_named
from focus_compile.passes.graph_tools import (
    arg,
    fake_of,
    insert_call,
    op_name,
    position,
    shape_of,
    tensor_of,
)
from focus_compile.plan import Ranks, Refusal

__all__ = ["NormalizeCollectives", "insert_sum_over_ranks", "ranks_of"]

aten = torch.ops.aten
LIBRARY = "_c10d_functional."
WAIT = "_c10d_functional.wait_tensor.default"
GATHER = "_c10d_functional.all_gather_into_tensor.default"
REDUCE = "_c10d_functional.all_reduce.default"


def _collectives(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if op_name(n).startswith(LIBRARY) and op_name(n) != WAIT]


def ranks_of(graph: fx.Graph) -> Ranks | Refusal | None:
    """Over which ranks the graph's collectives go; None if it has none."""
    found = _collectives(graph)
    if not found:
        return None
    groups = {str(node.args[-1]) for node in found}
    if len(groups) > 1:
        return Refusal(
            f"the model's collectives go over {len(groups)} groups of ranks",
            remedy="Split it over one dimension of the mesh.",
        )
    (group,) = groups
    size = group_named(group).size()
    counts = Counter(op_name(n).removeprefix(LIBRARY).partition(".")[0] for n in found)
    return Ranks(group, size, tuple(sorted(counts.items())))


def insert_sum_over_ranks(graph: fx.Graph, values: fx.Node, group: str) -> fx.Node:
    """The sum over the group's ranks, the same on each, without a fake value."""
    ops = torch.ops._c10d_functional
    begun = graph.call_function(ops.all_reduce.default, (values, "sum", group))
    return graph.call_function(ops.wait_tensor.default, (begun,))


@dataclass(frozen=True)
class NormalizeCollectives:
    """Needs: canonical ATen. Keeps every value."""

    name: ClassVar[str] = "normalize-collectives"

    def apply(self, gm: fx.GraphModule) -> int:
        """Number of rewrites."""
        done = 0
        for node in list(gm.graph.nodes):
            if op_name(node) == "cat.default":
                done += _gather_along(gm.graph, node)
            elif op_name(node) == "index_put.default":
                done += _put_as_where(gm.graph, node)
            elif op_name(node) == "copy.default":
                done += _overwritten(node)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return done


def _gather_along(graph: fx.Graph, cat: fx.Node) -> bool:
    parts = list(arg(cat, 0))
    axis = position(int(cat.args[1]) if len(cat.args) > 1 else 0, len(shape_of(cat)))  # type: ignore[arg-type]
    gather = _gather_of(parts)
    if gather is None or axis == 0:
        return False
    source, *rest = gather.args
    with graph.inserting_before(cat):
        turned = insert_call(graph, aten.transpose.int, source, 0, axis)
        turned = insert_call(graph, aten.contiguous.default, turned)  # as torch 2.11 asks for
        whole = insert_call(graph, gather.target, turned, *rest)
        whole = insert_call(graph, torch.ops._c10d_functional.wait_tensor.default, whole)
        result = insert_call(graph, aten.transpose.int, whole, 0, axis)
        result = insert_call(graph, aten.clone.default, result)
    for made in (turned, whole, result):
        made.meta["stack_trace"] = cat.meta.get("stack_trace")
    cat.replace_all_uses_with(result)
    wait = arg(arg(parts[0], 0), 0)
    for gone in (cat, *parts, arg(parts[0], 0), wait, gather):  # a collective is never dead code
        if not gone.users:
            graph.erase_node(gone)
    return True


def _gather_of(parts: list[Any]) -> fx.Node | None:
    """The all-gather whose results of each rank, in order, are these."""
    split = parts[0].args[0] if parts and parts[0].target is operator.getitem else None
    for at, part in enumerate(parts):
        if part.target is not operator.getitem or part.args != (split, at):
            return None
    if not isinstance(split, fx.Node) or op_name(split) not in ("split.Tensor", "chunk.default"):
        return None
    if (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) != 0:
        return None
    wait = arg(split, 0)
    gather = wait.args[0] if op_name(wait) == WAIT else None
    if not isinstance(gather, fx.Node) or op_name(gather) != GATHER:
        return None
    first = shape_of(arg(gather, 0))[0]
    by_rank = len(parts) == arg(gather, 1) and shape_of(parts[0])[0] == first
    return gather if by_rank else None


def _overwritten(copy: fx.Node) -> bool:
    target, source = arg(copy, 0), arg(copy, 1)
    old, new = fake_of(target), tensor_of(source)
    if new is None or (old.dtype, old.device) != (new.dtype, new.device):
        return False
    if shape_of(target) != shape_of(source):
        return False
    copy.replace_all_uses_with(source)
    copy.graph.erase_node(copy)
    return True


def _put_as_where(graph: fx.Graph, put: fx.Node) -> bool:
    target, masks, value = (arg(put, at) for at in range(3))
    mask, *more = masks
    accumulates = put.args[3] if len(put.args) > 3 else put.kwargs.get("accumulate", False)
    if more or mask is None or accumulates or fake_of(mask).dtype != torch.bool:
        return False
    number = tensor_of(value)
    if number is None or number.dim() != 0:
        return False
    with graph.inserting_before(put):
        for axis in range(len(shape_of(mask)), len(shape_of(target))):
            mask = insert_call(graph, aten.unsqueeze.default, mask, axis)
        result = insert_call(graph, aten.where.self, mask, value, target)
    result.meta["stack_trace"] = put.meta.get("stack_trace")
    put.replace_all_uses_with(result)
    graph.erase_node(put)
    return True
