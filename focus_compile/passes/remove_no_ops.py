"""Drop what changes nothing, and write every view as a reshape.

Cases: (1) metadata asserts, (2) alias, lift, detach and same-dtype casts, (3) dropout that is off,
(4) slices of a whole axis, expands to the same shape and identity permutes, (5) autocast regions
that are off, (6) view and _unsafe_view as reshape, since a rewritten producer may have other
strides than the traced one, (7) concatenations with nothing, as of keys with those of an empty
cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from focus_compile.passes.graph_tools import arg, fake_of, op_name, shape_of, tensor_of

__all__ = ["RemoveNoOps", "autocast_is_on"]

aten = torch.ops.aten
ASSERTS = {
    "_assert_tensor_metadata.default",
    "_assert_scalar.default",
    "sym_constrain_range_for_size.default",
}
AUTOCAST = ("_enter_autocast", "_exit_autocast")


@dataclass(frozen=True)
class RemoveNoOps:
    """Needs: functional pre-dispatch ATen. Keeps every value."""

    name: ClassVar[str] = "remove-no-ops"

    def apply(self, gm: fx.GraphModule) -> int:
        """Number of nodes removed or rewritten."""
        done = _drop_disabled_autocast(gm.graph)
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            name = op_name(node)
            if name in ASSERTS:
                gm.graph.erase_node(node)
            elif (same := _same_as_input(node, name)) is not None:
                node.replace_all_uses_with(same)
                gm.graph.erase_node(node)
            elif name in ("view.default", "_unsafe_view.default"):
                node.target = aten.reshape.default
            else:
                continue
            done += 1
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return done


def _same_as_input(node: fx.Node, name: str) -> fx.Node | None:
    if name == "cat.default":
        return _only_operand(node)
    rule = _IDENTITY.get(name)
    source = arg(node, 0) if node.args else None
    if rule is None or not isinstance(source, fx.Node):
        return None
    return source if rule(node, source) else None


def _always(node: fx.Node, source: fx.Node) -> bool:
    return True


def _dropout_is_off(node: fx.Node, source: fx.Node) -> bool:
    return bool(arg(node, 1) == 0 or not arg(node, 2))


def _same_dtype_and_device(node: fx.Node, source: fx.Node) -> bool:
    a, b = fake_of(node), fake_of(source)
    return a.dtype == b.dtype and a.device == b.device


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    return shape_of(node) == shape_of(source)


def _whole_slice(node: fx.Node, source: fx.Node) -> bool:
    start = arg(node, 2) if len(node.args) > 2 else 0
    step = arg(node, 4) if len(node.args) > 4 else 1
    end = arg(node, 3) if len(node.args) > 3 else None
    if start not in (0, None) or step != 1:
        return False
    return bool(end is None or end == sys.maxsize) or _same_shape(node, source)


def _only_operand(node: fx.Node) -> fx.Node | None:
    """The operand of a concatenation that is all of its result."""
    full = [operand for operand in arg(node, 0) if 0 not in shape_of(operand)]
    same = len(full) == 1 and fake_of(full[0]).dtype == fake_of(node).dtype
    return full[0] if same else None


def _permutes_nothing(node: fx.Node, source: fx.Node) -> bool:
    return list(arg(node, 1)) == list(range(len(shape_of(node))))


_IDENTITY: dict[str, Callable[[fx.Node, fx.Node], bool]] = {
    "alias.default": _always,
    "detach.default": _always,
    "lift_fresh_copy.default": _always,
    "dropout.default": _dropout_is_off,
    "feature_dropout.default": _dropout_is_off,
    "_to_copy.default": _same_dtype_and_device,
    "to.dtype": _same_dtype_and_device,
    "type_as.default": _same_dtype_and_device,
    "contiguous.default": _always,
    "permute.default": _permutes_nothing,
    "slice.Tensor": _whole_slice,
    "expand.default": _same_shape,
    "reshape.default": _same_shape,
    "view.default": _same_shape,
}


def _drop_disabled_autocast(graph: fx.Graph) -> int:
    """Autocast pairs that switch autocast off where it already is off."""
    nodes = [n for n in graph.nodes if any(word in str(n.target) for word in AUTOCAST)]
    enters = [n for n in nodes if "_enter" in str(n.target)]
    if any(_enabled(node) for node in enters):
        return 0
    for node in reversed(nodes):
        graph.erase_node(node)
    return len(nodes)


def autocast_is_on(graph: fx.Graph) -> bool:
    """Whether part of the graph, or the call that it was traced in, runs under autocast."""
    enters = [n for n in graph.nodes if "_enter_autocast" in str(n.target)]
    ambient = any(torch.is_autocast_enabled(device) for device in _devices(graph))
    return ambient or any(_enabled(node) for node in enters)


def _devices(graph: fx.Graph) -> set[str]:
    placeholders = graph.find_nodes(op="placeholder")
    tensors = [tensor for node in placeholders if (tensor := tensor_of(node)) is not None]
    return {tensor.device.type for tensor in tensors}


def _enabled(enter: fx.Node) -> bool:
    device, _, enabled = enter.args[:3]
    return bool(enabled) or torch.is_autocast_enabled(str(device))
