"""Capture: Dynamo's graph to one functional, pre-dispatch ATen form.

In that form eager, SDPA and flex attention differ only in a few nodes, views are reshapes, and
sizes are expressions of the ids' own batch and length.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from focus_compile.distributed.local_graph import LocalGraph, NotLocal, is_split, local_graph
from focus_compile.passes.einsum import einsum_as_matmul
from focus_compile.passes.flex_attention import NormalizeFlexAttention, flex_calls
from focus_compile.passes.graph_tools import user_line
from focus_compile.plan import Refusal

__all__ = ["Capture", "CaptureRefused", "InputInfo", "capture", "inputs_of"]

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
    length: int | None = None
    """The first axis of the whole weight, where this rank may hold a part of it."""


@dataclass
class Capture:
    """The canonical graph, the graph as Dynamo gave it, and the inputs they share."""

    graph_module: fx.GraphModule
    original: fx.GraphModule
    inputs: tuple[InputInfo, ...]
    values: tuple[Any, ...]
    """Fake tensors and SymInts of the inputs, in order."""
    writes: tuple[tuple[int, int], ...] = ()
    """Inputs that the graph writes in place: (its output that holds the new value, input)."""
    local: LocalGraph | None = None
    """Where weights are DTensors: how a call's inputs become those of these graphs."""

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
    local = None
    if is_split(example_inputs):
        local = _local_graph(gm, example_inputs)
        gm, example_inputs = local.gm, local.inputs
    _require_plain(example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = inputs_of(gm, example_inputs)
    if local is not None:
        lengths = local.lengths
        inputs = tuple(replace(info, length=lengths.get(at)) for at, info in enumerate(inputs))
    original = copy_graph_module(gm)
    work = copy_graph_module(gm)
    NormalizeFlexAttention().apply(work)
    _require_no_flex(work)
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
    assert isinstance(exported, fx.GraphModule)
    _require_functional(exported)
    given = exported.graph.find_nodes(op="placeholder")
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    at = {node.name: position for position, node in enumerate(given)}
    writes = tuple(enumerate(at[name] for name in written))
    if any(not _is_ids(given[target]) or inputs[target].is_weight for _, target in writes):
        first, *others = (inputs[target].name for _, target in writes)
        more = f" and {len(others)} more" if others else ""
        raise CaptureRefused(
            Refusal(
                f"the forward writes into its inputs or buffers ({first}{more})",
                remedy="Call the model without a cache (use_cache=False).",
            )
        )
    if writes:
        _require_no_views(gm, [placeholders[target] for _, target in writes])
    values = tuple(n.meta.get("val") for n in given)
    return Capture(exported, original, inputs, values, writes, local)


def _local_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> LocalGraph:
    try:
        return local_graph(gm, example_inputs)
    except NotLocal as stuck:
        raise CaptureRefused(stuck.refusal) from stuck


def _require_functional(exported: fx.GraphModule) -> None:
    """Custom ops that write into their arguments have no rows that could be chosen."""
    higher_order = torch.ops.higher_order
    wrappers = (higher_order.auto_functionalized, higher_order.auto_functionalized_v2)
    for node in exported.graph.nodes:
        if node.op == "call_function" and node.target in wrappers:
            raise CaptureRefused(
                Refusal(
                    f"the op {node.args[0]} writes into its arguments",
                    user_line(node),
                    "Give the op a form that returns its result. vLLM's attention is such an op: "
                    "decode with focus_compile.decode.BatchGenerator, or serve with SGLang.",
                )
            )


def _require_no_views(gm: fx.GraphModule, written: Sequence[fx.Node]) -> None:
    """No output may share the memory of an input that is written: it is computed, not a view."""
    memory = {_storage(node) for node in written}
    results = [n for n in gm.graph.output_node().all_input_nodes if n not in written]
    if any(_storage(node) in memory for node in results):
        raise CaptureRefused(
            Refusal(
                "the forward returns a view of an input that it writes into",
                remedy="Return the input itself, or a clone.",
            )
        )


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _is_ids(node: fx.Node) -> bool:
    """Whether an input has the form of token ids, which a loop may write its tokens into."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.dim() == 2


def _require_plain(example_inputs: Sequence[Any]) -> None:
    wrapped = {type(x).__name__ for x in example_inputs if is_traceable_wrapper_subclass(x)}
    if wrapped:
        raise CaptureRefused(
            Refusal(
                f"weights or inputs are tensor subclasses ({', '.join(sorted(wrapped))})",
                remedy="torchao.utils.unwrap_tensor_subclass(model) makes weights plain tensors.",
            )
        )


def _require_no_flex(gm: fx.GraphModule) -> None:
    left = flex_calls(gm)
    if left:
        raise CaptureRefused(
            Refusal(
                "flex attention with a score_mod, or whose log-sum-exp is used",
                user_line(left[0]),
                "Give a mask as a BlockMask (create_block_mask), not as a tensor; or use sdpa.",
            )
        )


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares parameters and constants but not the graph."""
    graph = fx.Graph()
    copied: Any = graph.graph_copy(gm.graph, {}, return_output_node=True)
    value, old = copied
    graph.output(value).meta.update(old.meta)
    twin = fx.GraphModule(gm, graph)
    twin.meta = dict(gm.meta)
    return twin


def inputs_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[InputInfo, ...]:
    """Names and roles of the inputs of a graph that Dynamo made."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return tuple(
        _input_info(node, value) for node, value in zip(placeholders, example_inputs, strict=True)
    )


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
