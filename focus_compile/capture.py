"""Capture: Dynamo's graph to one functional, pre-dispatch ATen form.

In that form eager, SDPA and flex attention differ only in a few nodes, views are reshapes, and
sizes are expressions of the ids' own batch and length.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module

from focus_compile.passes.einsum import einsum_as_matmul
from focus_compile.passes.flex_attention import NormalizeFlexAttention
from focus_compile.plan import Refusal

__all__ = ["Capture", "CaptureRefused", "InputInfo", "capture"]

aten = torch.ops.aten


class CaptureRefused(Exception):
    """The graph has no canonical form; carries the reason."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def _no_buffer() -> None:
    return None


@dataclass(frozen=True)
class InputInfo:
    """One placeholder of the graph: its name in the user's code, and whether it is a weight."""

    name: str
    is_weight: bool
    source: Any
    tensor_dict: dict[str, Any]
    buffer: Callable[[], torch.Tensor | None] = _no_buffer
    """The module's own tensor where this is a buffer, for as long as the module lives."""


@dataclass
class Capture:
    """The canonical graph, the graph as Dynamo gave it, and the inputs they share."""

    graph_module: fx.GraphModule
    original: fx.GraphModule
    inputs: tuple[InputInfo, ...]
    values: tuple[Any, ...]
    """Fake tensors and SymInts of the inputs, in order."""

    def buffers(self) -> dict[str, torch.Tensor]:
        """The buffers that still live, by the name of their placeholder."""
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")
        values = (
            (n.name, info.buffer()) for n, info in zip(placeholders, self.inputs, strict=True)
        )
        return {name: value for name, value in values if value is not None}


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Capture:
    """Export Dynamo's `gm` to the canonical form.

    Raises:
        CaptureRefused: what the graph does that has no functional form.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = tuple(
        _input_info(node, value) for node, value in zip(placeholders, example_inputs, strict=True)
    )
    original = copy_graph_module(gm)
    work = copy_graph_module(gm)
    NormalizeFlexAttention().apply(work)
    with _restored_functorch_stack():
        try:
            exported, signature = aot_export_module(
                work,
                list(example_inputs),
                trace_joint=False,
                pre_dispatch=True,
                decompositions={aten.einsum.default: einsum_as_matmul},
            )
        except Exception as error:  # any failure inside torch's tracer means: run exactly
            message = str(error).strip().splitlines()
            first = message[0] if message else type(error).__name__
            raise CaptureRefused(
                Refusal(f"the graph cannot be exported ({type(error).__name__}: {first})")
            ) from error
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        names = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise CaptureRefused(
            Refusal(
                f"the forward writes into its inputs or buffers ({', '.join(names[:3])})",
                remedy="Call the model without a cache (use_cache=False).",
            )
        )
    assert isinstance(exported, fx.GraphModule)
    values = tuple(n.meta.get("val") for n in exported.graph.find_nodes(op="placeholder"))
    return Capture(exported, original, inputs, values)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares parameters and constants but not the graph."""
    graph = fx.Graph()
    copied: Any = graph.graph_copy(gm.graph, {}, return_output_node=True)
    value, old = copied
    graph.output(value).meta.update(old.meta)
    twin = fx.GraphModule(gm, graph)
    twin.meta = dict(gm.meta)
    return twin


def _input_info(node: fx.Node, example: Any) -> InputInfo:
    source = getattr(node, "_dynamo_source", None)
    tensor_dict = dict(node.meta.get("tensor_dict") or {})
    value = node.meta.get("example_value")
    static = "_dynamo_static_input_type" in tensor_dict
    is_weight = static or isinstance(value, torch.nn.Parameter)
    name = _source_name(source) or node.name
    is_buffer = is_weight and type(example) is torch.Tensor
    buffer = weakref.ref(example) if is_buffer else _no_buffer
    return InputInfo(name, is_weight, source, tensor_dict, buffer)


def _source_name(source: Any) -> str:
    """A source's name as the user wrote it; `name` is a method before torch 2.12."""
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


@contextlib.contextmanager
def _restored_functorch_stack() -> Iterator[None]:
    """An exception inside vmap leaves functorch interpreters behind, which breaks Dynamo."""
    from torch._C._functorch import peek_interpreter_stack, pop_dynamic_layer_stack

    before = peek_interpreter_stack()
    depth = -1 if before is None else before.level()
    try:
        yield
    finally:
        while (top := peek_interpreter_stack()) is not None and top.level() > depth:
            pop_dynamic_layer_stack()
