"""What must hold after every pass, whatever the pass promises.

Level 1 (default): the graph lints, its inputs are the same, every call is an operator overload,
and every value recomputed on fake tensors has the shape, dtype and device it is recorded with.
Level 2 also executes the graph before and after on random inputs. Level 0 checks nothing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from focus_compile.errors import PassError
from focus_compile.passes.graph_tools import concrete, fake_result, size_expression

__all__ = ["execute_on_random_inputs", "same_results", "verify"]

STATEFUL = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")


def verify(gm: fx.GraphModule, inputs: list[str], stage: str) -> None:
    """Raise PassError if `gm` breaks level 1; `inputs` are the placeholder names it must have."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise PassError(f"{stage}: the graph does not lint: {error}") from error
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    if names != inputs:
        raise PassError(f"{stage}: the inputs changed from {inputs} to {names}")
    for node in gm.graph.nodes:
        if node.op == "call_function":
            _check_call(node, stage)


def _check_call(node: fx.Node, stage: str) -> None:
    if any(word in str(node.target) for word in STATEFUL):
        return
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math", "torch")
    if not isinstance(node.target, torch._ops.OpOverload) and not arithmetic:
        raise PassError(f"{stage}: {node.name} calls {node.target}, which is no operator overload")
    if node.target is operator.getitem or "val" not in node.meta:
        return
    recomputed = fake_result(node.target, node.args, node.kwargs)
    _compare(node, node.meta["val"], recomputed, stage)


def _compare(node: fx.Node, recorded: Any, recomputed: Any, stage: str) -> None:
    if isinstance(recorded, (tuple, list)):
        for a, b in zip(recorded, recomputed, strict=True):
            _compare(node, a, b, stage)
        return
    if not isinstance(recorded, torch.Tensor):
        return
    a, b = _facts(recorded), _facts(recomputed)
    if a != b:
        raise PassError(f"{stage}: {node.name} is recorded as {a} but computes {b}")


def _facts(value: torch.Tensor) -> tuple[Any, ...]:
    return [size_expression(size) for size in value.shape], value.dtype, value.device


def execute_on_random_inputs(gm: fx.GraphModule, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Run the graph eagerly on random real inputs of its recorded shapes."""
    generator = torch.Generator().manual_seed(seed)
    values = [_real(node.meta["val"], generator) for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        outputs = fx.Interpreter(gm).run(*values)
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _real(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return concrete(value)
    shape = [concrete(size) for size in value.shape]
    if value.dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 0.1).to(value.dtype).to(value.device)
    return torch.randint(0, 2, shape, generator=generator).to(value.dtype).to(value.device)


def same_results(before: tuple[Any, ...], after: tuple[Any, ...], stage: str) -> None:
    """Raise PassError unless both runs returned the same values up to rounding."""
    for a, b in zip(before, after, strict=True):
        loose = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
        if not torch.allclose(a, b, rtol=loose, atol=loose, equal_nan=True):
            error = (a - b).abs().max().item()
            raise PassError(f"{stage}: the outputs changed by up to {error:g}")
