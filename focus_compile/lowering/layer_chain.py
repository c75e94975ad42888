"""A deep program as a chain of segments, of which those that are alike are compiled once.

The layers of a model are the same code over other weights. One graph of them all costs Inductor
minutes at 32 layers; a segment a layer, compiled once for each kind of layer, costs seconds. (torch
calls this regional compilation; there a user names the module that repeats, here the graph shows
it.) A segment ends behind a matrix product, whose output is a buffer of its own in one graph too,
so that everything else fuses as it would there.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from focus_compile.kernels.library import ATTENTION

__all__ = ["FEWEST_LAYERS", "Chain", "Link", "Segment", "chain_of"]

FEWEST_LAYERS = 8
"""Layers from which a program is cut: below, a call of each costs more than compiling saves."""
_PRODUCTS: frozenset[Any] = frozenset(
    (
        torch.nn.functional.linear,
        torch._C._nn.linear,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        operator.matmul,
        torch.ops.aten.linear.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
    )
)
_PRODUCT_METHODS = frozenset(("matmul", "mm", "bmm", "__matmul__"))
_NUMBERS = (int, float, bool)
_SCOPES = ("_enter_", "_exit_", "_set_grad_enabled", "_saved_tensors_hooks")


@dataclass(frozen=True)
class Segment:
    """A graph to compile, and what its placeholders hold: sizes, then fake tensors."""

    graph: fx.GraphModule
    inputs: list[Any]


@dataclass(frozen=True)
class Link:
    """One call: of which segment, on which values, making which. Values are numbers: the program's
    inputs in order, its symbols, then what was made. `drop`: of no use from here on."""

    segment: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    drop: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Segments, and their calls in order. values: how many numbers stand for one; results: of what
    the program returns."""

    segments: list[Segment]
    links: list[Link]
    values: int
    results: tuple[int, ...]

    @property
    def kinds(self) -> tuple[int, ...]:
        """Which segment each link calls."""
        return tuple(link.segment for link in self.links)

    def runner(self, compiled: Sequence[Callable[..., Any]]) -> Callable[..., tuple[Any, ...]]:
        """run(inputs, symbols), of one callable for each segment."""
        links = [(compiled[link.segment], link) for link in self.links]
        count, results = self.values, self.results

        def run(inputs: Sequence[Any], symbols: Sequence[int]) -> tuple[Any, ...]:
            values = [*inputs, *symbols]
            values += [None] * (count - len(values))
            for call, link in links:
                made = call(*[values[at] for at in link.inputs])
                for number, at in enumerate(link.outputs):
                    values[at] = made[number]
                del made
                for at in link.drop:
                    values[at] = None
            return tuple(values[at] for at in results)

        return run


def chain_of(
    gm: fx.GraphModule, fakes: Sequence[Any], symbols: Sequence[Any], mode: FakeTensorMode
) -> Chain | None:
    """The program as a chain, or None where it is shallow or cannot be cut.

    fakes: what its placeholders hold, in `mode`. symbols: the sizes that they are made of, SymInts
    or numbers; of the placeholders' meta a segment keeps `tensor_dict`.
    """
    nodes = list(gm.graph.nodes)
    layers = [at for at, node in enumerate(nodes) if _is_attention(node)]
    if len(layers) < FEWEST_LAYERS or not all(_can_be_cut(node) for node in nodes):
        return None
    seen = _Seen(gm)
    # C++ composites of torch 2.11 (linear) ask symbolic tensors for plain sizes without it.
    with mode, torch.no_grad(), enable_python_dispatcher():
        seen.run(*fakes)
    cuts = _cuts(nodes, layers, seen.held)
    if cuts is None:
        return None
    sizes = {
        str(size) if isinstance(size, torch.SymInt) else f"constant {at}": size
        for at, size in enumerate(symbols)
    }
    return _Cutter(gm, seen.held, sizes).chain(cuts)


class _Seen(fx.Interpreter):
    """Runs a graph on fakes and keeps what every node held."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.held: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.held[n] = super().run_node(n)
        return self.held[n]


def _can_be_cut(node: fx.Node) -> bool:
    """False of what reaches over other nodes (a context), or is no plain call."""
    if node.op in ("get_attr", "call_module"):
        return False
    return not (
        node.op == "call_function"
        and getattr(node.target, "__name__", str(node.target)).startswith(_SCOPES)
    )


def _cuts(
    nodes: Sequence[fx.Node], layers: Sequence[int], values: Mapping[fx.Node, Any]
) -> list[fx.Node] | None:
    """The last node of each segment but the last: one cut between two attentions, at the last
    matrix product where (almost) the fewest values are alive."""
    places: list[list[tuple[fx.Node, int]]] = [[] for _ in layers]
    for at, (node, alive) in enumerate(_alive_behind(nodes)):
        layer = bisect.bisect_right(layers, at) - 1
        if layer >= 0 and all(_may_cross(values[value]) for value in alive):
            places[layer].append((node, len(alive)))
    cuts = []
    for between in places[:-1]:
        if not between:
            return None
        fewest = min(count for _, count in between)
        behind = [node for node, count in between if count <= fewest + 1 and _is_product(node)]
        slimmest = [node for node, count in between if count == fewest]
        cuts.append((behind or slimmest)[-1])
    return cuts


def _alive_behind(nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, Collection[fx.Node]]]:
    """Each node with what was computed up to it and is used after it."""
    users: dict[fx.Node, int] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            if used in users:
                users[used] -= 1
                if not users[used]:
                    del users[used]
        if node.users and node.op != "placeholder":
            users[node] = len(node.users)
        yield node, users.keys()


def _may_cross(value: Any) -> bool:
    return value is None or isinstance(value, (Tensor, torch.SymInt, *_NUMBERS))


def _is_attention(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, OpOverload) or op.namespace != "focus_compile":
        return False
    return op._schema.name.partition("::")[2] in ATTENTION


def _is_product(node: fx.Node) -> bool:
    return node.target in (_PRODUCT_METHODS if node.op == "call_method" else _PRODUCTS)


@dataclass
class _Cutter:
    """Makes the segments of one program and counts its values."""

    gm: fx.GraphModule
    held: Mapping[fx.Node, Any]
    """What each node holds."""
    symbols: Mapping[str, Any]
    """Sizes by name."""

    def chain(self, cuts: Sequence[fx.Node]) -> Chain | None:
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        (result,) = self.gm.graph.find_nodes(op="output")
        if not all(isinstance(node, fx.Node) for node in result.args[0]):
            return None
        if any(self._is_number(node) for node in result.args[0]):
            return None
        parts = self._parts(cuts)
        part_of = {node: number for number, part in enumerate(parts) for node in part}
        numbers: dict[Any, int] = {
            value: at for at, value in enumerate([*placeholders, *self.symbols])
        }
        segments: list[Segment] = []
        kinds: dict[Any, int] = {}
        links: list[Link] = []
        for number, part in enumerate(parts):
            inside = [node for node in part if not self._is_number(node)]
            given = dict.fromkeys(
                node
                for own in inside
                for node in own.all_input_nodes
                if part_of.get(node) != number and not self._is_number(node)
            )
            made = [n for n in inside if any(part_of.get(user) != number for user in n.users)]
            sizes = self._sizes_in([*given, *inside])
            key = self._key(sizes, list(given), inside, made)
            if key not in kinds:
                kinds[key] = len(segments)
                segments.append(self._segment(sizes, list(given), inside, made))
            for node in made:
                numbers[node] = len(numbers)
            used = tuple(numbers[value] for value in [*sizes, *given])
            links.append(Link(kinds[key], used, tuple(numbers[node] for node in made)))
        results = tuple(numbers[node] for node in result.args[0])
        kept = len(placeholders) + len(self.symbols)
        return Chain(segments, _with_drops(links, results, kept), len(numbers), results)

    def _parts(self, cuts: Sequence[fx.Node]) -> list[list[fx.Node]]:
        ends, parts = set(cuts), [[]]  # type: tuple[set[fx.Node], list[list[fx.Node]]]
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            parts[-1].append(node)
            if node in ends:
                parts.append([])
        return parts

    def _is_number(self, node: fx.Node) -> bool:
        """Whether it is the same number in every call, and stands in the segments as such."""
        return type(self.held[node]) in _NUMBERS

    def _sizes_in(self, nodes: Sequence[fx.Node]) -> list[str]:
        """The symbols that the values of these nodes are made of."""
        found: set[str] = set()
        for node in nodes:
            found.update(*(_symbols_of(value) for value in pytree.tree_leaves(self.held[node])))
        return [name for name in self.symbols if name in found]

    def _key(
        self,
        sizes: Sequence[str],
        given: Sequence[fx.Node],
        inside: Sequence[fx.Node],
        made: Sequence[fx.Node],
    ) -> Any:
        """Equal for segments that one compiled graph can stand for."""
        names = {node: _Name(f"given_{at}") for at, node in enumerate(given)}
        names |= {node: _Name(f"own_{at}") for at, node in enumerate(inside)}

        def name(node: fx.Node) -> Any:
            return self.held[node] if self._is_number(node) else names[node]

        storages: dict[int, int] = {}
        inputs = [
            (_described(self.held[node], storages), str(node.meta.get("tensor_dict")))
            for node in given
        ]
        calls = [(n.op, n.target, repr(map_arg((n.args, n.kwargs), name))) for n in inside]
        return (*sizes, *inputs, *calls, *(str(names[node]) for node in made))

    def _segment(
        self,
        sizes: Sequence[str],
        given: Sequence[fx.Node],
        inside: Sequence[fx.Node],
        made: Sequence[fx.Node],
    ) -> Segment:
        graph = fx.Graph()
        fakes = [self.symbols[name] for name in sizes] + [self.held[node] for node in given]
        twins: dict[fx.Node, Any] = {}
        for at, fake in enumerate(fakes):
            twin: Any = graph.placeholder(f"given_{at}")
            outer = None if at < len(sizes) else given[at - len(sizes)]
            marks = {} if outer is None else outer.meta.get("tensor_dict", {})
            twin.meta = {"tensor_dict": marks, "example_value": fake}
            twin._dynamo_source = getattr(outer, "_dynamo_source", None)
            if outer is not None:
                twins[outer] = twin

        def twin_of(node: fx.Node) -> Any:
            return self.held[node] if self._is_number(node) else twins[node]

        for node in inside:
            args, kwargs = map_arg((node.args, node.kwargs), twin_of)
            twins[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
            twins[node].meta = dict(node.meta)
        graph.output(tuple(twins[node] for node in made))
        return Segment(fx.GraphModule({}, graph), fakes)


class _Name(str):
    """A string whose repr is itself."""

    __slots__ = ()
    __repr__ = str.__str__


def _described(value: Any, storages: dict[int, int]) -> Any:
    """Of an input: all that a compiled graph may rely on. storages: in order of appearance."""
    if not isinstance(value, FakeTensor):
        return str(value)
    storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
    sizes = (str(tuple(value.shape)), str(value.stride()), str(value.storage_offset()))
    return (value.dtype, value.device, *sizes, storage)


def _symbols_of(value: Any) -> set[str]:
    sizes: list[Any] = [value]
    if isinstance(value, Tensor):
        sizes = [*value.shape, *value.stride(), value.storage_offset()]
    return {
        str(symbol)
        for size in sizes
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }


def _with_drops(links: Sequence[Link], results: Sequence[int], kept: int) -> list[Link]:
    """The links, each dropping what none after it reads."""
    needed, reversed_links = set(results), []
    for link in reversed(links):
        mentioned = dict.fromkeys((*link.inputs, *link.outputs))
        drop = tuple(at for at in mentioned if at >= kept and at not in needed)
        reversed_links.append(replace(link, drop=drop))
        needed.update(link.inputs)
    return reversed_links[::-1]
