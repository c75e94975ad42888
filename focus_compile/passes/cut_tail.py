"""Cut what follows the model off its graph: a sampler in one function with the model.

A loop compiled whole (`torch.compile(denoise_step)`) has ops behind the logits. Those that are
token-wise stay with the model and run at the active rows: softmax, argmax, a token's probability.
From the first on that mixes rows (top-k over the tokens, a scatter into the ids), and for all that
follows it, the ops are a graph of their own, the *tail*, which runs in full, in every call, on the
latest values of all rows. It reads the smallest tensors there are: where a row's token and its
probability are enough, logits of all rows are never kept.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import fx

from focus_compile.kernels.confidence import op as _confidence  # noqa: F401
from focus_compile.passes.graph_tools import insert_call, shape_of, tensor_of
from focus_compile.passes.token_axis import NotTokenWise, graph_outputs, hidden_values, prove_rows
from focus_compile.plan import Tail

__all__ = ["CutTail"]


@dataclass(frozen=True)
class CutTail:
    """Needs: the canonical graph with its sites. Changes its outputs to the values that the tail
    reads, and behind them, where none of these are logits, every row's confidence and its token.

    ids: the placeholder of the token ids; weights: placeholders of parameters and buffers;
    vocabulary: width of the logits.
    """

    name: ClassVar[str] = "cut-tail"
    ids: fx.Node
    weights: set[fx.Node]
    vocabulary: int

    def apply(self, gm: fx.GraphModule) -> Tail:
        """Cut; returns what was cut off.

        Raises:
            NotTokenWise: what mixes rows is a part of the model, or nothing has logits' form. The
                graph is as it was.
        """
        model = _ancestors(_sites(gm.graph))
        hidden = hidden_values(gm.graph, self.ids, self.weights)
        behind = [n for n in gm.graph.nodes if n.op == "call_function" and n not in model]
        weights = self._of_weights(gm.graph)
        logits = self._logits([node for node in behind if node in hidden], weights)
        tail = self._tail(gm, hidden, behind, logits, weights)
        if logits in tail:
            raise NotTokenWise.of("the logits are made from what mixes tokens")
        frontier = _frontier(gm.graph, tail, hidden)
        if not frontier:
            raise NotTokenWise.of("no output depends on the ids")
        made = self._tail_graph(gm, frontier)
        outputs = list(frontier)
        if logits not in frontier:
            with gm.graph.inserting_before(gm.graph.output_node()):
                both = insert_call(gm.graph, torch.ops.focus_compile.confidence.default, logits)
                outputs += [insert_call(gm.graph, operator.getitem, both, i) for i in range(2)]
        gm.graph.output_node().args = (tuple(outputs),)
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
        return made

    def _tail(
        self,
        gm: fx.GraphModule,
        hidden: set[fx.Node],
        behind: list[fx.Node],
        logits: fx.Node,
        weights: set[fx.Node],
    ) -> set[fx.Node]:
        """The nodes behind the model that mix rows, or read an input (what is kept of a row knows
        no later ids), or are made from what does; and, for the tail to compute as well, those that
        it reads and that are no smaller than what they are made from, without weights."""
        within, tail = set(behind), set[fx.Node]()
        known = self._of_inputs(gm.graph) - hidden
        for node in behind:
            if any(source in known for source in node.all_input_nodes):
                tail |= _descendants(node)
        while True:
            frontier = _frontier(gm.graph, tail, hidden)
            try:
                prove_rows(gm, self.ids, self.weights, outputs=frontier, within=within)
            except NotTokenWise as stuck:
                if stuck.node is None or stuck.node not in within:
                    raise
                tail |= _descendants(stuck.node)
                continue
            # Hidden states may be smaller than logits, but it is dear to make these of them.
            made = [
                node
                for node in frontier
                if node in within and node is not logits and not weights & {*node.all_input_nodes}
            ]
            larger = next((n for n in made if self._shrinks(n, frontier)), None)
            if larger is None:
                return tail
            tail.add(larger)

    def _of_weights(self, graph: fx.Graph) -> set[fx.Node]:
        """The weights, and what is computed from them alone."""
        found = set(self.weights)
        for node in graph.nodes:
            if node.all_input_nodes and all(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _of_inputs(self, graph: fx.Graph) -> set[fx.Node]:
        """Tensors that depend on inputs other than weights."""
        found: set[fx.Node] = set()
        for node in graph.nodes:
            given = node.op == "placeholder" and node not in self.weights
            if given or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return {node for node in found if tensor_of(node) is not None}

    def _logits(self, rows: Sequence[fx.Node], weights: set[fx.Node]) -> fx.Node:
        """The first value behind the model that is as wide as the vocabulary, from the last op with
        weights on: hidden states may be as wide."""
        made = [at for at, node in enumerate(rows) if weights & {*node.all_input_nodes}]
        for node in rows[max(made, default=0) :]:
            if self._may_be_logits(node):
                return node
        raise NotTokenWise.of(
            f"nothing behind the model is logits over the {self.vocabulary} embeddings",
            remedy="Compile the whole model, head included.",
        )

    def _may_be_logits(self, node: fx.Node) -> bool:
        tensor = tensor_of(node)
        wanted = [*shape_of(self.ids), sympy.Integer(self.vocabulary)]
        return tensor is not None and tensor.is_floating_point() and shape_of(node) == wanted

    def _shrinks(self, node: fx.Node, frontier: Sequence[fx.Node]) -> bool:
        """Whether no more is kept of every row where the tail computes this value itself."""
        sources = [source for source in node.all_input_nodes if source not in frontier]
        return sum(map(self._row_bytes, sources)) <= self._row_bytes(node)

    def _row_bytes(self, node: fx.Node) -> float:
        """Bytes of a token's share of a value; infinite where that is no number."""
        tensor = tensor_of(node)
        if tensor is None:
            return math.inf
        tokens = sympy.Mul(*shape_of(self.ids))
        width = sympy.cancel(sympy.Mul(*shape_of(node)) / tokens)
        return float(width) * tensor.itemsize if width.is_number else math.inf

    def _tail_graph(self, gm: fx.GraphModule, frontier: Sequence[fx.Node]) -> Tail:
        """Everything between the frontier and the outputs, with what it reads of the inputs."""
        results = graph_outputs(gm.graph)
        if len(results) != len(gm.graph.output_node().args[0]):  # type: ignore[arg-type]
            raise NotTokenWise.of("the graph returns something that is no tensor")
        needed = _ancestors(results, stop=set(frontier))
        placeholders = gm.graph.find_nodes(op="placeholder")
        inputs = [at for at, node in enumerate(placeholders) if node in needed]
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node in [*(placeholders[at] for at in inputs), *frontier]:
            new[node] = graph.placeholder(node.name)
            new[node].meta = dict(node.meta)
        copied = [n for n in gm.graph.nodes if n in needed and n not in new]
        for node in copied:
            new[node] = graph.node_copy(node, lambda n: new[n])
        graph.output(tuple(new[node] for node in results))
        graph.lint()
        operations = sum(node.op == "call_function" for node in copied)
        names = tuple(node.name for node in frontier)
        return Tail(fx.GraphModule(gm, graph), tuple(inputs), names, operations)


def _frontier(graph: fx.Graph, tail: set[fx.Node], hidden: set[fx.Node]) -> list[fx.Node]:
    """Values of rows that the tail or the caller reads, in graph order."""
    read = {n for node in tail for n in node.all_input_nodes} | set(graph_outputs(graph))
    return [n for n in graph.nodes if n in read and n in hidden and n not in tail]


def _sites(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=torch.ops.focus_compile.attention.default)


def _ancestors(nodes: Iterable[fx.Node], stop: set[fx.Node] | None = None) -> set[fx.Node]:
    """The nodes and all that they are computed from; not past `stop`."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if stop is None or node not in stop:
                pending.extend(node.all_input_nodes)
    return found


def _descendants(node: fx.Node) -> set[fx.Node]:
    """The node and all that is computed from it."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found and node.op == "call_function":
            found.add(node)
            pending.extend(node.users)
    return found
