"""What `torch.compile(model, backend="focus")` calls.

Loading this module is what selecting the backend costs: the compiler, not Triton or transformers.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._dynamo.callback import callback_handler

from focus_compile.block_diffusion.dispatch import BlockDispatcher
from focus_compile.capture import (
    Capture,
    CaptureRefused,
    capture,
    copy_graph_module,
    inputs_of,
)
from focus_compile.config import BLOCK_POLICIES, TORCH_MODES, FocusConfig
from focus_compile.distributed.agreement import group_named, group_of, require_same, why_lost
from focus_compile.distributed.local_graph import is_split
from focus_compile.encoder_cache.dispatch import CacheDispatcher
from focus_compile.encoder_cache.plan import EncoderCachePlan, NoSuchPlan, plan_over_cache
from focus_compile.encoder_cache.step import BuildCacheCheck, BuildCacheStep
from focus_compile.errors import FocusError, PassError, RanksError
from focus_compile.fallback import forget, refuse
from focus_compile.pipeline import Pipeline, plan_graph
from focus_compile.plan import FRAGMENT, Plan, Refusal
from focus_compile.program_graphs import ProgramGraphs, build_programs
from focus_compile.runtime.dispatch import Dispatcher
from focus_compile.runtime.exact import ExactOnly
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.store import STORE
from focus_compile.settings_file import settings_in
from focus_compile.torch_tools import trace_artifact

__all__ = ["BackendCall", "compile_graph", "focus", "trace_past_logging"]

log = logging.getLogger(__name__)


def _ignore_logging(*_: object) -> None:
    """Let Dynamo trace past calls in transformers' forwards that would break the graph and change
    nothing in it, where its own metrics can cope with that.

    torch 2.11 writes its whole config as JSON with every compilation, and fails on functions.
    """
    ignored = torch._dynamo.config.ignore_logging_functions
    warning_once = getattr(logging.Logger, "warning_once", warnings.warn)
    added = {warnings.warn, warning_once} - ignored
    if not added:
        return
    ignored |= added
    try:
        torch._dynamo.utils._get_dynamo_config_for_logging()
    except (AttributeError, TypeError):
        ignored -= added


def trace_past_logging() -> None:
    """Ignore logging now and whenever a compilation starts: transformers adds `warning_once` to
    loggers, perhaps after this module is imported. `torch.compiler.reset()` forgets callbacks."""
    _ignore_logging()
    if _ignore_logging not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_ignore_logging)


trace_past_logging()


class BackendCall:
    """One graph that Dynamo handed over: its plan, or the reason why there is none."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], config: FocusConfig):
        self.config = config
        self.captured: Capture | None = None
        self.pipeline: Pipeline | None = None
        self.plan: Plan | None = None
        self.graphs: ProgramGraphs | None = None
        self.cache_plan: EncoderCachePlan | None = None
        """Instead of `plan`, where the forward reads a cache that it was given."""
        self.refusals: tuple[Refusal, ...] = ()
        started = time.perf_counter()
        try:
            self._analyse(gm, example_inputs)
        except Exception as error:  # a bug of ours must not stop the user's program
            log.debug("the analysis failed", exc_info=True)
            self.refusals = (_failed(error),)
        log.info("capture and analysis took %.2f s", time.perf_counter() - started)
        self._tell()

    def _tell(self) -> None:
        """What was planned, to torch's log and trace."""
        log.info("%s", self)
        refusals = [refusal.to_dict() for refusal in self.refusals]
        said = {"accepted": not refusals, "refusals": refusals}
        plan = self.plan or self.cache_plan
        trace_artifact("plan", lambda: ({} if plan is None else plan.to_dict()) | said)
        misses = () if self.plan is None else self.plan.misses
        if refusals or misses:
            lines = [f"refused: {refusal}" for refusal in self.refusals]
            lines += [f"near miss: {miss}" for miss in misses]
            trace_artifact("misses", lambda: "\n".join(lines))

    def __str__(self) -> str:
        plan = self.plan or self.cache_plan
        if plan is not None:
            return str(plan)
        return "\n".join(f"plan: exact program: {refusal}" for refusal in self.refusals)

    def _analyse(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        reason = _why_no_plan(gm, example_inputs)
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
        if self.plan.reads_cache:
            self._plan_over_cache()
            return
        if not self.refusals and not self.plan.positions("weight"):
            self.refusals = (_NO_WEIGHTS,)
        if not self.refusals and self.config.mask_token_id is None:
            self.refusals = (_NO_MASK,)
            self.plan = replace(self.plan, refusals=self.refusals)
        if not self.refusals:
            self.graphs = build_programs(self.pipeline, self.plan)

    def _plan_over_cache(self) -> None:
        """The plan of a forward whose attention reads a cache, or one reason more why not."""
        assert self.captured is not None
        assert self.pipeline is not None
        assert self.plan is not None
        try:
            self.cache_plan = plan_over_cache(self.captured, self.pipeline.gm, self.config)
        except NoSuchPlan as error:
            (refusal,) = self.refusals
            self.refusals = (replace(refusal, reason=f"{refusal.reason}; {error}"),)
            self.plan = replace(self.plan, refusals=self.refusals)
            return
        self.plan, self.refusals = None, ()


_NO_WEIGHTS = Refusal(
    "the graph has no parameters or buffers, which tell one model's calls from another's",
    remedy="Compile a module, or a function that calls one.",
)

_NO_MASK = Refusal(
    "no mask_token_id is known",
    remedy='Pass options={"mask_token_id": ...}, or use focus_compile.compile(model).',
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


def _why_no_plan(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Refusal | None:
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
    ):
        return Refusal("gradients are enabled", remedy="Decode under torch.no_grad().")
    if _takes_floats(gm):
        return Refusal(
            "a float of the forward became an input, as dynamic=True or a change of it has it",
            remedy="Leave dynamic unset (sizes become dynamic when they change), or pass a tensor.",
        )
    return None


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: FocusConfig,
    inductor_mode: str = "default",
) -> Callable[..., Any]:
    """The callable that replaces `gm`: a dispatcher, or plain Inductor with a reported reason."""
    trace_past_logging()
    infos = inputs_of(gm, example_inputs)
    names = [None if info.is_weight else info.name for info in infos]
    if config.policy == "exact" and not config.dryrun:
        return _plain(gm, example_inputs, config, 'policy="exact"', inductor_mode, names)
    original = copy_graph_module(gm)

    def plain(why: str) -> ExactOnly:
        return _plain(original, example_inputs, config, why, inductor_mode, names)

    call = BackendCall(gm, example_inputs, config)
    _require_ranks_agree(call, example_inputs)
    if config.dryrun:
        print(call)
        return plain("dryrun=True")
    if call.refusals and call.refusals[0] == FRAGMENT:
        return plain(FRAGMENT.reason)
    if call.cache_plan is not None:
        over = _over_cache(call, call.cache_plan, config, inductor_mode)
        return plain(refuse(over, strict=config.strict)) if isinstance(over, str) else over
    if call.refusals or call.plan is None or call.captured is None or call.graphs is None:
        return plain(refuse(str(call.refusals[0]), strict=config.strict))
    programs = Programs.build(call.captured, call.graphs, call.plan, config)
    if config.policy not in BLOCK_POLICIES:
        return _over_ranks(call.captured, Dispatcher(call.captured, call.plan, programs, config))
    made = _over_blocks(call, programs, config)
    return plain(refuse(made, strict=config.strict)) if isinstance(made, str) else made


def _over_blocks(
    call: BackendCall, programs: Programs, config: FocusConfig
) -> Callable[..., Any] | str:
    """The dispatcher of a policy of block diffusion, or why there is none."""
    assert call.captured is not None
    assert call.pipeline is not None
    assert call.plan is not None
    try:
        dispatcher = BlockDispatcher(call.captured, call.pipeline, call.plan, programs, config)
        return _over_ranks(call.captured, dispatcher)
    except PassError as error:
        return str(error)
    except FocusError:
        raise
    except Exception as error:  # a bug of ours must not stop the user's program
        log.debug("the programs of a block could not be built", exc_info=True)
        return str(_failed(error))


def _over_cache(
    call: BackendCall, plan: EncoderCachePlan, config: FocusConfig, inductor_mode: str
) -> CacheDispatcher | str:
    """The dispatcher of a forward that reads a cache, or why there is none."""
    assert call.captured is not None
    assert call.pipeline is not None
    try:
        step = BuildCacheStep(plan).apply(call.pipeline.gm)
        call.pipeline.dump(BuildCacheStep.name, step)
        check = BuildCacheCheck(plan).apply(call.pipeline.gm)
    except FocusError:
        raise
    except Exception as error:  # a bug of ours must not stop the user's program
        log.debug("the step over a cache could not be built", exc_info=True)
        return str(_failed(error))
    return CacheDispatcher(call.captured, step, check, plan, config, inductor_mode)


def _require_ranks_agree(call: BackendCall, example_inputs: Sequence[Any]) -> None:
    """Raise RanksError, on all ranks, where what they would run differs."""
    group = group_of(example_inputs) if is_split(example_inputs) else None
    if group is None and call.config.context_parallel is not None:
        group = group_named(call.config.context_parallel)
    if group is not None:
        require_same(group, _facts(call))


def _facts(call: BackendCall) -> dict[str, Any]:
    """What must be the same on every rank that a model is split over."""
    facts: dict[str, Any] = {"torch version": torch.__version__, "options": call.config.to_dict()}
    facts["reasons to run exactly"] = [refusal.reason for refusal in call.refusals]
    if call.captured is not None:
        tensors = [x for x in call.captured.values if isinstance(x, torch.Tensor)]
        facts["device"] = sorted({x.device.type for x in tensors})
        facts["dtypes of weights and inputs"] = sorted({str(x.dtype) for x in tensors})
    if call.plan is not None:
        known = call.plan.to_dict()
        facts["shape of the ids"] = [known["batch"], known["length"]]
        facts["layers"] = [
            {name: site[name] for name in ("heads", "kv_heads", "head_dim", "dtype", "region")}
            for site in known["sites"]
        ]
        facts["collectives"] = [known["ranks"], known["shards"]]
    return facts


def _over_ranks(captured: Capture, dispatcher: Dispatcher) -> Callable[..., Any]:
    """The dispatcher, given what this rank holds of each DTensor, and saying so where another rank
    is gone."""
    local = captured.local
    if local is None and dispatcher.agreement is None:
        return dispatcher

    def call(*args: Any) -> Any:
        try:
            return dispatcher(*(args if local is None else local.local(args)))
        except RuntimeError as error:
            lost = why_lost(error)
            if lost is None or isinstance(error, FocusError):
                raise
            raise RanksError(lost) from error

    return call


def _plain(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: FocusConfig,
    why: str,
    inductor_mode: str,
    names: Sequence[str | None],
) -> ExactOnly:
    """The user's graph through Inductor, as `torch.compile(model)` would have it."""
    if config.lowering == "eager":
        return ExactOnly(gm.forward, why, config, names)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(inductor_mode)
    run: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return ExactOnly(run, why, config, names)


def focus(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend `"focus"`: entry point of the group `torch_dynamo_backends`.

    Args:
        options: fields of FocusConfig, as in `torch.compile(model, backend="focus", options={})`,
            and `settings`, a file that `focus-compile tune` wrote.
        mode: a policy name, as in `torch.compile(model, backend="focus", mode="dual-cache")`, or
            one of torch's own, for graphs that always run exactly.

    Raises:
        OptionError: an unknown or invalid option.
        RefusalError: with `strict=True`, where the exact program would run.
    """
    config = FocusConfig.from_options(options, mode=mode)
    settings = settings_in(options or {})
    if settings is not None:
        settings.check_weights(*_weights_of(gm))
    inductor_mode = mode if mode is not None and mode in TORCH_MODES else "default"
    dispatch = compile_graph(gm, example_inputs, config, inductor_mode)

    def compiled(*args: Any) -> Any:  # tools such as depyf read the code of what a backend returns
        return dispatch(*args)

    return compiled


def _weights_of(gm: fx.GraphModule) -> tuple[list[tuple[int, ...]], str]:
    """The shapes of the graph's parameters, and the class of its outermost module."""
    inputs = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    shapes = [tuple(x.shape) for x in inputs if isinstance(x, torch.nn.Parameter)]
    stacks = (node.meta.get("nn_module_stack") for node in gm.graph.nodes)
    for stack in filter(None, stacks):
        _, kind = next(iter(stack.values()))
        return shapes, str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    return shapes, "module"


def _reset() -> None:
    """Called by `torch.compiler.reset()`: frees all state."""
    STORE.clear()
    forget()


focus.reset = _reset  # type: ignore[attr-defined]
