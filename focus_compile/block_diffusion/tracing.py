"""From a block-diffusion model to its captured graph, and the proof that it is block-causal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import reset_code

from focus_compile.capture import Capture
from focus_compile.config import FocusConfig
from focus_compile.errors import RefusalError
from focus_compile.passes.block_causality import block_causal_mask, why_not_block_causal
from focus_compile.pipeline import Pipeline
from focus_compile.plan import Plan, Refusal

__all__ = ["ModelCall", "TracedModel", "call_with_block_mask", "trace"]

ModelCall = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(model, ids [1, tokens], mask bool [1, 1, tokens, tokens], positions [1, tokens]) -> logits."""


def call_with_block_mask(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Logits [batch, tokens, vocabulary], as transformers' decoders are called."""
    known = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    wanted = {"position_ids": positions, "use_cache": False}
    named = {name: value for name, value in wanted.items() if anything or name in known}
    output = model(ids, attention_mask=mask, **named)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


@dataclass
class TracedModel:
    """One sequence of `max_length` tokens through the model.

    arguments: the graph's inputs in order; weights are the model's own, the others stand in for
    their shapes.
    """

    captured: Capture
    pipeline: Pipeline
    plan: Plan
    arguments: list[Any]
    block_length: int
    max_length: int

    @property
    def graph(self) -> fx.GraphModule:
        """The canonical graph."""
        return self.pipeline.gm


def trace(
    model: nn.Module,
    config: FocusConfig,
    max_length: int,
    call: ModelCall = call_with_block_mask,
) -> TracedModel:
    """Capture `call` on one sequence, and prove every layer block-causal.

    Nothing is computed: the graph is traced, and only its masks are evaluated.

    Args:
        model: a decoder that takes a block-causal mask.
        config: `block_length` is what the masks must have, `mask_token_id` must be known.
        max_length: tokens of the longest sequence, a multiple of the block length.
        call: how the model is called.

    Raises:
        RefusalError: what stands in the way, where, and what to do.
    """
    weights = next(model.parameters(), None)
    device = torch.device("cpu") if weights is None else weights.device
    ids = torch.zeros(1, max_length, dtype=torch.int64, device=device)
    mask = block_causal_mask(max_length, config.block_length, device)
    positions = torch.arange(max_length, device=device)[None]

    def forward() -> Tensor:
        return call(model, ids, mask, positions)

    try:
        with _grouped_experts(model):
            calls = _graphs_of(forward, config)
    finally:
        # Dynamo keeps what it compiled by the function's code, up to a limit; this is not called
        # again.
        reset_code(forward.__code__)
    if len(calls) != 1:
        raise _refused(
            Refusal(
                f"the model's forward was cut into {len(calls)} graphs",
                remedy="TORCH_LOGS=graph_breaks says where.",
            )
        )
    [(backend, arguments)] = calls
    if backend.refusals:
        raise _refused(backend.refusals[0])
    captured, pipeline, plan = backend.captured, backend.pipeline, backend.plan
    assert captured is not None and pipeline is not None and plan is not None  # noqa: PT018
    if captured.local is not None:
        raise _refused(_SPLIT)
    placeholders = pipeline.gm.graph.find_nodes(op="placeholder")
    given = {
        node.name: value.detach().cpu()
        for node, value, role in zip(placeholders, arguments, plan.inputs, strict=True)
        if role.role == "guarded" and isinstance(value, Tensor)
    }
    problem = why_not_block_causal(pipeline.gm, plan, given, config.block_length)
    if problem is not None:
        raise _refused(problem)
    arguments = [_light(value, mask) for value in arguments]
    return TracedModel(captured, pipeline, plan, arguments, config.block_length, max_length)


@contextmanager
def _grouped_experts(model: nn.Module) -> Iterator[None]:
    """transformers' experts in a loop over those hit, which Dynamo cuts, as grouped products
    while the model is traced: the same sums."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    loops = [c for c in configs.values() if getattr(c, "_experts_implementation", "") == "eager"]
    for config in loops:
        config._experts_implementation = "grouped_mm"
    try:
        yield
    finally:
        for config in loops:
            config._experts_implementation = "eager"


def _graphs_of(call: Callable[[], Tensor], config: FocusConfig) -> list[tuple[Any, list[Any]]]:
    """What Dynamo makes of a call: each graph's analysis, and its inputs. Nothing runs."""
    from focus_compile.backend import BackendCall

    calls: dict[Any, list[Any]] = {}

    def collect(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        backend = BackendCall(gm, inputs, config)
        calls[backend] = list(inputs)
        outputs: Any = gm.graph.output_node().args[0]
        shapes = [node.meta["example_value"] for node in outputs]

        def stand_in(*args: Any) -> list[Tensor]:
            calls[backend] = list(args)
            return [torch.zeros((), dtype=s.dtype, device=s.device).expand(s.shape) for s in shapes]

        return stand_in

    with torch.no_grad():
        torch.compile(call, backend=collect, dynamic=False)()
    return list(calls.items())


_SPLIT = Refusal(
    "the weights are DTensors, which BatchGenerator has no form for",
    remedy="Give each rank a whole model and its own requests, or call torch.compile(model, "
    'backend="focus", mode="focus-evict") in a loop of your own.',
)


def _light(value: Any, mask: Tensor) -> Any:
    """The mask is no longer read, only its shape."""
    if isinstance(value, Tensor) and value.shape == mask.shape and value.dtype == mask.dtype:
        return value.new_ones(()).expand(value.shape)
    return value


def _refused(refusal: Refusal) -> RefusalError:
    return RefusalError(f"focus_compile: no block-diffusion program: {refusal}")
