"""A graph over DTensors as one over the tensors that this rank holds.

Dynamo keeps DTensors in its graph as they are. AOTAutograd takes them apart into local tensors and
collectives, yet its export, which the canonical form is made with, takes no tensor subclass. So
they are taken apart before it: each chain of ops from plain tensors through DTensors back to plain
ones is traced by itself, and the ops it is made of take its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from focus_compile.plan import Refusal

__all__ = ["LocalGraph", "NotLocal", "is_split", "local_graph"]

aten = torch.ops.aten


class NotLocal(Exception):
    """The graph has no form over local tensors; carries the reason."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


@dataclass(frozen=True)
class LocalGraph:
    """gm of `inputs`, tensors of this rank; `kept`: the positions of these among the original's.

    lengths: the whole first axis of weights that are DTensors, by position among `kept`.
    """

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    kept: tuple[int, ...]
    lengths: dict[int, int]

    def local(self, args: Sequence[Any]) -> list[Any]:
        """What this rank holds of a call's inputs, of those that are kept."""
        return [getattr(args[at], "_local_tensor", args[at]) for at in self.kept]


def is_split(example_inputs: Sequence[Any]) -> bool:
    """Whether some input is a DTensor, or a mesh of ranks."""
    return any(_is_dtensor(value) or _is_mesh(value) for value in example_inputs)


def _is_dtensor(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "_local_tensor")


def _is_mesh(value: Any) -> bool:
    return type(value).__name__ == "DeviceMesh"


def local_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> LocalGraph:
    """`gm`, as Dynamo made it, over what this rank holds of its inputs.

    Raises:
        NotLocal: inputs other than weights, or outputs, are DTensors.
    """
    builder = _Builder(gm)
    kept: list[int] = []
    inputs: list[Any] = []
    lengths: dict[int, int] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for at, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if _is_mesh(value):
            builder.constants[node] = value
            continue
        if _is_dtensor(value):
            _require_weight(node, value)
            lengths[len(kept)] = int(value.shape[0]) if value.dim() else 1
            value = value._local_tensor
        builder.add_input(node)
        kept.append(at)
        inputs.append(value)
    with torch.no_grad():
        made = builder.build()
    return LocalGraph(made, tuple(inputs), tuple(kept), lengths)


def _require_weight(node: fx.Node, value: Any) -> None:
    marked = "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    if not marked and not isinstance(value, torch.nn.Parameter):
        raise NotLocal(
            Refusal(
                f"the input {node.name} is a DTensor",
                remedy="Give every rank the whole ids, as a plain tensor.",
            )
        )


@dataclass(eq=False)
class _Builder:
    """Copies a graph; `copied`: the new node of every value that is plain, and of the local tensor
    of those DTensors that are known by it."""

    gm: fx.GraphModule
    graph: fx.Graph = field(default_factory=fx.Graph)
    copied: dict[fx.Node, fx.Node] = field(default_factory=dict)
    constants: dict[fx.Node, Any] = field(default_factory=dict)

    def add_input(self, node: fx.Node) -> None:
        new = self.graph.node_copy(node)
        value: Any = node.meta.get("example_value")
        if _is_dtensor(value):
            new.meta = {**node.meta, "example_value": value._local_tensor}
        self.copied[node] = new

    def build(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                self._require_plain(node)
                self.graph.node_copy(node, self.copied.__getitem__)
            elif not self._touches_dtensors(node):
                self.copied[node] = self.graph.node_copy(node, self.copied.__getitem__)
            elif not _is_dtensor(node.meta.get("example_value")) or len(node.users) > 1:
                self._take_apart(node)
        self.graph.lint()
        return fx.GraphModule(self.gm, self.graph)

    def _require_plain(self, output: fx.Node) -> None:
        if any(_is_dtensor(node.meta.get("example_value")) for node in output.all_input_nodes):
            raise NotLocal(
                Refusal(
                    "the forward returns a DTensor",
                    remedy="Have the head return whole, plain logits: "
                    "ColwiseParallel(output_layouts=Replicate()).",
                )
            )

    def _touches_dtensors(self, node: fx.Node) -> bool:
        values = [node, *node.all_input_nodes]
        return any(n in self.constants or _is_dtensor(n.meta.get("example_value")) for n in values)

    def _take_apart(self, node: fx.Node) -> None:
        """Put the ops on local tensors that `node` is made of into the graph."""
        chain, sources = self._chain(node)

        def run(*given: Tensor) -> Any:
            values = dict(zip(sources, map(_whole, sources, given), strict=True))
            for link in chain:
                values[link] = _call(link, values, self.constants)
            return pytree.tree_map(lambda x: x._local_tensor if _is_dtensor(x) else x, values[node])

        examples = [_local(source.meta["example_value"]) for source in sources]
        try:
            # Without Python's dispatcher, torch 2.11 asks symbolic sizes for numbers.
            with _fake_mode_of(examples), enable_python_dispatcher():
                traced = make_fx(run)(*examples)
        except Exception as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NotLocal(
                Refusal(f"{node.name} of DTensors cannot be traced ({message})")
            ) from error
        _restore_linear(traced.graph)
        new: dict[fx.Node, fx.Node] = {}
        inputs = traced.graph.find_nodes(op="placeholder")
        new.update(zip(inputs, (self.copied[source] for source in sources), strict=True))
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                new[inner] = self.graph.node_copy(inner, new.__getitem__)
                new[inner].meta = {"stack_trace": node.meta.get("stack_trace")}
            elif inner.op == "get_attr":
                new[inner] = self._number(node, getattr(traced, str(inner.target)))
        (result,) = traced.graph.output_node().args
        if not isinstance(result, fx.Node):
            raise NotLocal(Refusal(f"{node.name} makes several plain tensors of DTensors"))
        self.copied[node] = new[result]
        new[result].meta["example_value"] = _local(node.meta.get("example_value"))

    def _number(self, node: fx.Node, constant: Any) -> fx.Node:
        """A constant of one element, made where it is used."""
        if not isinstance(constant, Tensor) or constant.numel() != 1:
            raise NotLocal(Refusal(f"{node.name} of DTensors holds a constant tensor"))
        kind: Any = {"dtype": constant.dtype, "device": constant.device}
        return self.graph.call_function(
            aten.full.default, (list(constant.shape), constant.item()), kind
        )

    def _chain(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The ops that `node` takes, in order, from values whose local tensors are known."""
        chain: dict[fx.Node, None] = {}
        sources: dict[fx.Node, None] = {}

        def visit(value: fx.Node) -> None:
            if value in chain or value in sources or value in self.constants:
                return
            if value in self.copied:
                sources[value] = None
                return
            for source in value.all_input_nodes:
                visit(source)
            chain[value] = None

        visit(node)
        return list(chain), list(sources)


def _fake_mode_of(examples: Sequence[Any]) -> Any:
    """The mode of Dynamo's own fake tensors, which is not the one of the backend's inputs."""
    modes = (getattr(value, "fake_mode", None) for value in examples)
    return next((mode for mode in modes if mode is not None), contextlib.nullcontext())


def _local(value: Any) -> Any:
    return value._local_tensor if _is_dtensor(value) else value


def _whole(source: fx.Node, local: Any) -> Any:
    """The DTensor that `source` is, of its local tensor."""
    from torch.distributed.tensor import DTensor

    value = source.meta["example_value"]
    if not _is_dtensor(value):
        return local
    spec = value._spec
    return DTensor.from_local(
        local, spec.mesh, spec.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def _call(node: fx.Node, values: dict[fx.Node, Any], constants: dict[fx.Node, Any]) -> Any:
    known = {**constants, **values}
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _restore_linear(graph: fx.Graph) -> None:
    """x.view([n, k]) @ w.t() viewed back, which a DTensor's linear layer is, as a linear layer."""
    for node in graph.nodes:
        if node.target not in (aten.mm.default, aten.addmm.default) or len(node.users) != 1:
            continue
        *bias, rows, turned = node.args
        (last,) = node.users
        if rows.target is not aten.view.default or turned.target is not aten.t.default:
            continue
        if last.target not in (aten._unsafe_view.default, aten.view.default):
            continue
        source, weight = rows.args[0], turned.args[0]
        if list(source.meta["val"].shape[:-1]) != list(last.meta["val"].shape[:-1]):
            continue
        with graph.inserting_before(last):
            linear = graph.call_function(aten.linear.default, (source, weight, *bias))
        linear.meta = dict(last.meta)
        last.replace_all_uses_with(linear)
        graph.erase_node(last)
    graph.eliminate_dead_code()
