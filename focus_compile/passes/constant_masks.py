"""Masks that are known before any call: all-True ones are dropped, causal ones are refused.

A mask is known where nothing but sizes and constants leads to it; masks that also read integer or
bool inputs (padding: with ones) or buffers are evaluated to recognise causality only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from focus_compile.passes.graph_tools import concrete, fake_of, user_line
from focus_compile.passes.value_ranges import range_of
from focus_compile.patterns.match import NEGLIGIBLE
from focus_compile.plan import Refusal

__all__ = ["MASK", "FoldConstantMasks", "ancestors_of", "evaluate", "evaluate_mask", "negligible"]

MASK = 3
LARGEST = 1 << 27
"""Masks of more elements than this are judged by their ranges of values only."""


@dataclass(frozen=True)
class FoldConstantMasks:
    """Needs: canonical attention sites."""

    name: ClassVar[str] = "fold-constant-masks"
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Values of buffers by the name of their placeholder, as far as they are known."""
    causal: list[Refusal] = field(default_factory=list)

    def apply(self, gm: fx.GraphModule) -> int:
        """Number of masks dropped."""
        dropped = 0
        known: dict[fx.Node, tuple[bool, bool]] = {}
        for site in gm.graph.find_nodes(
            op="call_function", target=torch.ops.focus_compile.attention.default
        ):
            mask = site.args[MASK]
            if not isinstance(mask, fx.Node):
                continue
            if mask not in known:
                known[mask] = _judge(gm, mask, self.buffers)
            trivial, causal = known[mask]
            if causal:
                where = f"{site.name}, {user_line(site)}"
                self.causal.append(Refusal("causal attention (explicit mask)", where))
            if trivial:
                site.update_arg(MASK, None)
                dropped += 1
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return dropped


def _judge(
    gm: fx.GraphModule, mask: fx.Node, buffers: Mapping[str, torch.Tensor]
) -> tuple[bool, bool]:
    """(keeps everything at every call, hides every later key from every query)."""
    if _hides_nothing(mask):
        return True, False
    order = ancestors_of(mask)
    inputs = [n for n in order if n.op == "placeholder"]
    fake = fake_of(mask)
    elements = 1
    for size in fake.shape:
        elements *= concrete(size)
    known = {n: _stands_in(n) if n.name not in buffers else buffers[n.name].cpu() for n in inputs}
    if any(value is None for value in known.values()) or elements > LARGEST:
        return False, False
    value = evaluate_mask(gm, order, mask, known)
    constant = not inputs and not any(isinstance(s, torch.SymInt) for s in fake.shape)
    keeps = value if value.dtype == torch.bool else value > negligible(value.dtype)
    if value.dtype != torch.bool and constant:
        return bool((value == 0).all()), _is_causal(keeps)
    return constant and bool(keeps.all()), _is_causal(keeps)


def _hides_nothing(mask: fx.Node) -> bool:
    """Whether all elements are True, or add zero, whatever the sizes."""
    values = range_of(mask)
    if values is None or not values.is_singleton():
        return False
    if fake_of(mask).dtype == torch.bool:
        return values.lower == sympy.true
    return float(values.lower) == 0


def negligible(dtype: torch.dtype) -> float:
    """An added value at or below this hides a key from any score."""
    return max(NEGLIGIBLE, torch.finfo(dtype).min / 4)


def _is_causal(keeps: torch.Tensor) -> bool:
    if keeps.dim() < 2 or keeps.shape[-1] != keeps.shape[-2] or keeps.shape[-1] < 2:
        return False
    return not bool(keeps.triu(1).any()) and bool(keeps.any())


def ancestors_of(node: fx.Node) -> list[fx.Node]:
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return [n for n in node.graph.nodes if n in seen]


def _stands_in(node: fx.Node) -> Any:
    """A value to evaluate with: the hint of a size, ones for an integer or bool input."""
    value = node.meta.get("val")
    if isinstance(value, (int, torch.SymInt)):
        return concrete(value)
    if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
        return torch.ones([concrete(size) for size in value.shape], dtype=value.dtype)
    return None


def evaluate_mask(
    gm: fx.GraphModule, order: list[fx.Node], mask: fx.Node, known: Mapping[fx.Node, Any]
) -> torch.Tensor:
    return evaluate(gm, order, known, torch.device("cpu"))[mask]


def evaluate(
    gm: fx.GraphModule, order: list[fx.Node], known: Mapping[fx.Node, Any], device: torch.device
) -> dict[fx.Node, Any]:
    """Values on `device` of the nodes `order`, each after what it reads; those of `known` are on it
    already."""
    environment = dict(known)
    for node in order:
        if node.op == "placeholder" or node in environment:
            continue
        if node.op == "get_attr":
            environment[node] = getattr(gm, str(node.target)).to(device)
        else:
            args = fx.map_arg(node.args, environment.__getitem__)
            kwargs = dict(fx.map_arg(node.kwargs, environment.__getitem__))
            if "device" in kwargs:
                kwargs["device"] = device
            target: Any = node.target
            environment[node] = target(*args, **kwargs)
    return environment
