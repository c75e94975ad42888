"""Which input of a graph holds the token ids, and which output the logits."""

from __future__ import annotations

from typing import Any

from torch import fx

from focus_compile.graph_breaks import uncut
from focus_compile.passes.graph_tools import arg, op_name, shape_of, size_expression, tensor_of
from focus_compile.passes.token_axis import NotTokenWise
from focus_compile.plan import Plan, Refusal

__all__ = ["find_ids", "logits_index", "output_values", "output_widths"]


def find_ids(
    graph: fx.Graph, weights: set[fx.Node], lengths: dict[fx.Node, int], widths: list[int]
) -> tuple[fx.Node, int] | None:
    """The input that indexes the embedding table, and the table's rows.

    Of several tables (positions, segments) it is one with as many rows as some output is wide,
    else the largest. lengths: rows of tables of which this rank may hold a part; ids of other ranks
    are then masked before they are looked up.
    """
    best: tuple[fx.Node, int] | None = None
    for node in graph.nodes:
        if op_name(node) != "embedding.default":
            continue
        table, index = arg(node, 0), arg(node, 1)
        rows = _behind_reshape(table)
        if rows in lengths:
            index = _masked_ids(index)
        if index.op != "placeholder" or index in weights or len(shape_of(index)) != 2:
            continue
        size = lengths.get(rows, int(shape_of(table)[0]))
        if best is None or (size in widths, size) > (best[1] in widths, best[1]):
            best = (index, size)
    return best


def _behind_reshape(node: fx.Node) -> fx.Node:
    while op_name(node) in ("reshape.default", "clone.default"):
        node = arg(node, 0)
    return node


def _masked_ids(index: fx.Node) -> fx.Node:
    """The only input that the look-ups of a table's part are made from, or the index itself."""
    found: set[fx.Node] = set()
    pending = [index]
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            found.add(node)
        pending.extend(node.all_input_nodes)
    return found.pop() if len(found) == 1 else index


def output_values(graph: fx.Graph) -> list[Any]:
    output = graph.output_node().args[0]
    return list(output) if isinstance(output, (tuple, list)) else [output]


def output_widths(graph: fx.Graph) -> list[int]:
    """The width of each output of the form of logits, [batch, tokens, width] in floating point; 0
    for others, and where it is symbolic."""
    tensors = [tensor_of(value) for value in output_values(graph)]
    sizes = [
        [size_expression(size) for size in tensor.shape[2:]]
        if tensor is not None and tensor.dim() == 3 and tensor.is_floating_point()
        else []
        for tensor in tensors
    ]
    return [int(size[0]) if size and size[0].is_Integer else 0 for size in sizes]


def logits_index(graph: fx.Graph, plan: Plan) -> int | None:
    """The output whose last axis is the vocabulary; None where a cut left none of them."""
    vocabulary = plan.vocabulary
    if not all(isinstance(value, fx.Node) for value in output_values(graph)):
        raise NotTokenWise(Refusal("the graph returns something that is no tensor"))
    widths = output_widths(graph)
    if plan.tail is not None and vocabulary not in widths:
        return None
    if vocabulary not in widths:
        reason = f"no output is logits over the {vocabulary} embeddings (widths {widths})"
        remedy = uncut("Compile the whole model, head included.", graph)
        raise NotTokenWise(Refusal(reason, remedy=remedy))
    return widths.index(vocabulary)
