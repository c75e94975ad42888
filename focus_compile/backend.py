"""What `torch.compile(model, backend="focus")` calls.

Loading this module is what selecting the backend costs: the compiler, not Triton or transformers.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from focus_compile.block_diffusion.dispatch import BlockDispatcher
from focus_compile.capture import Capture, CaptureRefused, capture, copy_graph_module
from focus_compile.config import BLOCK_POLICIES, FocusConfig
from focus_compile.errors import PassError
from focus_compile.fallback import forget, refuse
from focus_compile.pipeline import Pipeline, ProgramGraphs, build_programs, plan_graph
from focus_compile.plan import Plan, Refusal
from focus_compile.runtime.dispatch import Dispatcher
from focus_compile.runtime.exact import ExactOnly
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.store import STORE

__all__ = ["BackendCall", "compile_graph", "focus"]

log = logging.getLogger(__name__)

IGNORED_LOGGING = (warnings.warn, getattr(logging.Logger, "warning_once", warnings.warn))
"""Calls in transformers' forwards that would break the graph and change nothing in it."""


def _ignore_logging() -> None:
    """Let Dynamo trace past `IGNORED_LOGGING`, where its own metrics can cope with that.

    torch 2.11 writes its whole config as JSON with every compilation, and fails on functions.
    """
    ignored = torch._dynamo.config.ignore_logging_functions
    added = set(IGNORED_LOGGING) - ignored
    ignored |= added
    try:
        torch._dynamo.utils._get_dynamo_config_for_logging()
    except (AttributeError, TypeError):
        ignored -= added


_ignore_logging()


class BackendCall:
    """One graph that Dynamo handed over: its plan, or the reason why there is none."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], config: FocusConfig):
        self.config = config
        self.captured: Capture | None = None
        self.pipeline: Pipeline | None = None
        self.plan: Plan | None = None
        self.graphs: ProgramGraphs | None = None
        self.refusals: tuple[Refusal, ...] = ()
        started = time.perf_counter()
        try:
            self._analyse(gm, example_inputs)
        except Exception as error:  # a bug of ours must not stop the user's program
            log.debug("the analysis failed", exc_info=True)
            self.refusals = (_failed(error),)
        log.info("capture and analysis took %.2f s", time.perf_counter() - started)

    def _analyse(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        reason = _why_no_plan(gm, example_inputs, self.config)
        if reason is not None:
            self.refusals = (reason,)
            return
        try:
            self.captured = capture(gm, example_inputs)
        except CaptureRefused as refused:
            self.refusals = (refused.refusal,)
            return
        self.pipeline, self.plan = plan_graph(self.captured, self.config)
        self.refusals = self.plan.refusals
        if not self.refusals and not self.plan.positions("weight"):
            self.refusals = (_NO_WEIGHTS,)
        if not self.refusals:
            self.graphs = build_programs(self.pipeline, self.plan)


_NO_WEIGHTS = Refusal(
    "the graph has no parameters or buffers, which tell one model's calls from another's",
    remedy="Compile a module, or a function that calls one.",
)


def _failed(error: Exception) -> Refusal:
    message = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
    return Refusal(
        f"the analysis of the graph failed ({what})",
        remedy="Please report it; FOCUS_COMPILE_DUMP=folder writes down what was seen.",
    )


def _takes_floats(gm: fx.GraphModule) -> bool:
    """Whether Dynamo passes Python floats as tensors whose `item()` the graph then asks for."""
    return any(
        getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        and any(user.target == "item" for user in node.users)
        for node in gm.graph.find_nodes(op="placeholder")
    )


def _why_no_plan(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: FocusConfig
) -> Refusal | None:
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
    ):
        return Refusal("gradients are enabled", remedy="Decode under torch.no_grad().")
    if config.mask_token_id is None and config.policy != "exact":
        return Refusal(
            "no mask_token_id is known",
            remedy='Pass options={"mask_token_id": ...}, or use focus_compile.compile(model).',
        )
    if _takes_floats(gm):
        return Refusal(
            "a float of the forward became an input, as dynamic=True or a change of it has it",
            remedy="Leave dynamic unset (sizes become dynamic when they change), or pass a tensor.",
        )
    return None


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: FocusConfig
) -> Callable[..., Any]:
    """The callable that replaces `gm`: a dispatcher, or plain Inductor with a reported reason."""
    if config.policy == "exact" and not config.dryrun:
        return _plain(gm, example_inputs, config, 'policy="exact"')
    original = copy_graph_module(gm)
    call = BackendCall(gm, example_inputs, config)
    if config.dryrun:
        print(call.plan or "\n".join(f"plan: exact program: {r}" for r in call.refusals))
        return _plain(original, example_inputs, config, "dryrun=True")
    if call.refusals or call.plan is None or call.captured is None or call.graphs is None:
        reason = refuse(str(call.refusals[0]), strict=config.strict)
        return _plain(original, example_inputs, config, reason)
    programs = Programs.build(call.captured, call.graphs, call.plan, config)
    if config.policy not in BLOCK_POLICIES:
        return Dispatcher(call.captured, call.plan, programs, config)
    assert call.pipeline is not None
    try:
        return BlockDispatcher(call.captured, call.pipeline, call.plan, programs, config)
    except PassError as error:
        reason = refuse(str(error), strict=config.strict)
        return _plain(original, example_inputs, config, reason)


def _plain(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: FocusConfig, why: str
) -> ExactOnly:
    """The user's graph through Inductor, as `torch.compile(model)` would have it."""
    if config.lowering == "eager":
        return ExactOnly(gm.forward, why)
    from torch._inductor.compile_fx import compile_fx

    run: Any = compile_fx(gm, list(example_inputs))
    return ExactOnly(run, why)


def focus(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend `"focus"`: entry point of the group `torch_dynamo_backends`.

    Args:
        options: fields of FocusConfig, as in `torch.compile(model, backend="focus", options={})`.
        mode: a policy name, as in `torch.compile(model, backend="focus", mode="dual-cache")`.

    Raises:
        OptionError: an unknown or invalid option.
        RefusalError: with `strict=True`, where the exact program would run.
    """
    return compile_graph(gm, example_inputs, FocusConfig.from_options(options, mode=mode))


def _reset() -> None:
    """Called by `torch.compiler.reset()`: frees all state."""
    STORE.clear()
    forget()


focus.reset = _reset  # type: ignore[attr-defined]
