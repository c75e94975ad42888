"""A program: one graph compiled by Inductor, reused for every size it was proven for.

A deep graph is compiled as a chain of segments (see `layer_chain`).

Sizes that may change (the active rows, and what Dynamo traced symbolically) are symbols of a shape
environment of the program's own. Whatever Inductor assumes of them becomes a guard that is checked
before an artifact is reused; a size outside every guard compiles one more artifact.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.source import LocalSource
from torch._guards import CompileId, TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from focus_compile.capture import copy_graph_module
from focus_compile.errors import CompileError
from focus_compile.lowering.layer_chain import chain_of
from focus_compile.torch_tools import (
    belonging_to,
    current_compilation,
    layers,
    span,
    trace_artifact,
)

__all__ = ["InputSpec", "Program"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputSpec:
    """What a program's input looks like: its sizes as numbers or expressions of symbols.

    shape None: a number, `size`. static: lives at the same address in every call (weights, state).
    """

    name: str
    shape: tuple[sympy.Expr, ...] | None
    size: sympy.Expr | None = None
    static: bool = False
    source: Any = None
    tensor_dict: dict[str, Any] | None = None


@dataclass
class _Artifact:
    run: Callable[..., Any]
    guard: str | None
    environment: ShapeEnv
    fixed: dict[int, int] = field(default_factory=dict)
    """Sizes of 0 or 1, which torch takes for constants without a guard."""


@dataclass
class Program:
    """`graph` with `inputs`, compiled lazily; call it with the inputs in order."""

    name: str
    graph: fx.GraphModule
    inputs: Sequence[InputSpec]
    lowering: str = "inductor"
    inductor_options: Mapping[str, Any] = field(default_factory=dict)
    """Over Inductor's configuration, such as those of a mode of torch.compile."""
    compilations: int = 0
    compile_seconds: float = 0.0
    labels: Sequence[str] = ()
    """Of the attention ops in order, for torch.profiler."""
    segments: tuple[int, ...] = (0,)
    """Of the artifact compiled last: which of its compiled graphs runs first, second and so on (see
    `chain_of`)."""
    compilation: CompileId | None = field(default_factory=current_compilation)
    """Of Dynamo's, that the program was made in."""
    _artifacts: list[_Artifact] = field(default_factory=list)
    _by_sizes: dict[tuple[int, ...], _Artifact] = field(default_factory=dict)
    _symbols: list[tuple[sympy.Symbol, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        seen: set[sympy.Symbol] = set()
        for at, spec in enumerate(self.inputs):
            sizes = [spec.size] if spec.shape is None else list(spec.shape)
            for axis, size in enumerate(sizes):
                if isinstance(size, sympy.Symbol) and size not in seen:
                    seen.add(size)
                    self._symbols.append((size, at, -1 if spec.shape is None else axis))

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        run = self._artifact_for(args).run
        with span("program", self.name) as profiled:
            if profiled is None:
                return tuple(run(*args))
            with layers(self.labels):
                return tuple(run(*args))

    def prepare(self, *args: Any) -> None:
        """Compile for the sizes of `args`, whose tensors may be fake; nothing runs."""
        self._artifact_for(args)

    def _artifact_for(self, args: Sequence[Any]) -> _Artifact:
        sizes = self._sizes_of(args)
        artifact = self._by_sizes.get(sizes)
        if artifact is None:
            with compile_lock:  # Dynamo's own: neither it nor Inductor compiles in two threads
                artifact = self._find(sizes) or self._compile(sizes, args)
                self._by_sizes[sizes] = artifact
        return artifact

    def _sizes_of(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(
            args[at] if axis < 0 else args[at].shape[axis] for _, at, axis in self._symbols
        )

    def _find(self, sizes: tuple[int, ...]) -> _Artifact | None:
        for artifact in self._artifacts:
            guard = artifact.guard
            if any(sizes[at] != size for at, size in artifact.fixed.items()):
                continue
            if guard is None or artifact.environment.evaluate_guards_expression(guard, sizes):
                return artifact
        return None

    def _compile(self, sizes: tuple[int, ...], args: Sequence[Any]) -> _Artifact:
        started = time.perf_counter()
        if self.lowering == "eager":
            run = copy_graph_module(self.graph)
            artifact = _Artifact(run, None, ShapeEnv())
        else:
            artifact = self._compile_or_say(sizes, args)
        self._artifacts.append(artifact)
        self.compilations += 1
        self.compile_seconds += time.perf_counter() - started
        seconds = time.perf_counter() - started
        log.info("%s: compiled for %s in %.1f s", self.name, sizes, seconds)
        facts: dict[str, Any] = {"sizes": [int(size) for size in sizes], "lowering": self.lowering}
        facts["segments"] = list(self.segments)
        with belonging_to(self.compilation):
            trace_artifact(f"compiled_{self.name}", lambda: facts | {"seconds": seconds})
        return artifact

    def _compile_or_say(self, sizes: tuple[int, ...], args: Sequence[Any]) -> _Artifact:
        """Raise CompileError where Inductor fails; of the exact program its own error, and of
        memory that ran out torch's, which says nothing of the program."""
        try:
            return self._compile_with_inductor(sizes, args)
        except Exception as error:
            if self.name == "exact":
                raise
            cause = getattr(error, "inner_exception", error)  # what Inductor wraps
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            log.debug("%s: Inductor failed", self.name, exc_info=True)
            message = (str(error).strip() or "no message").splitlines()[0]
            raise CompileError(
                f"Inductor failed on the {self.name} program ({type(error).__name__}: {message}). "
                'TORCH_LOGS=+focus_compile shows where; lowering="eager" does without it.'
            ) from None

    def _compile_with_inductor(self, sizes: tuple[int, ...], args: Sequence[Any]) -> _Artifact:
        environment = ShapeEnv()
        mode = FakeTensorMode(shape_env=environment, static_shapes=False)
        symbols = self._fresh_symbols(environment, sizes)
        with mode:
            fakes = [_fake(spec, arg, symbols) for spec, arg in zip(self.inputs, args, strict=True)]
        graph = self._stamped(fakes)
        with belonging_to(self.compilation), torch.no_grad():
            run = self._run_of(graph, fakes, list(symbols.values()), mode)
        guard = None
        if environment.guards:
            guard = environment.produce_guards_expression(
                list(symbols.values()), guards=environment.guards
            )
        fixed = {at: size for at, size in enumerate(sizes) if size < 2}
        return _Artifact(run, guard, environment, fixed)

    def _run_of(
        self, graph: Any, fakes: list[Any], symbols: Sequence[Any], mode: FakeTensorMode
    ) -> Callable[..., Any]:
        """The graph compiled: as a chain of segments if it is deep, else whole."""

        def compiled(graph: Any, fakes: list[Any]) -> Any:
            graph._param_name_to_source = {}
            graph.meta.setdefault("dynamo_compile_id", None)  # else the marks are not looked at
            with tracing(TracingContext(mode)):
                return compile_fx(graph, fakes, config_patches=dict(self.inductor_options))

        captured = self.inductor_options.get("triton.cudagraphs", False)  # by one graph's addresses
        chain = None if captured else chain_of(graph, fakes, symbols, mode)
        self.segments = (0,) if chain is None else chain.kinds
        if chain is None:
            return compiled(graph, fakes)
        log.info("%s: %d segments of %d kinds", self.name, len(chain.links), len(chain.segments))
        run = chain.runner([compiled(segment.graph, segment.inputs) for segment in chain.segments])
        return lambda *args: run(args, self._sizes_of(args))

    def _fresh_symbols(
        self, environment: ShapeEnv, sizes: tuple[int, ...]
    ) -> dict[sympy.Symbol, Any]:
        fresh: dict[sympy.Symbol, Any] = {}
        for number, ((symbol, _, _), hint) in enumerate(zip(self._symbols, sizes, strict=True)):
            source = LocalSource(f"t{number}")
            expression = environment.create_symbol(
                hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            fresh[symbol] = environment.create_symintnode(expression, hint=hint, source=source)
        return fresh

    def _stamped(self, fakes: list[Any]) -> Any:
        """A copy that Inductor may change, with its inputs marked as Dynamo marks them."""
        graph: Any = copy_graph_module(self.graph)
        placeholders = graph.graph.find_nodes(op="placeholder")
        for node, spec, fake in zip(placeholders, self.inputs, fakes, strict=True):
            marks = dict(spec.tensor_dict or {})
            if spec.static:
                marks.setdefault("_dynamo_static_input_type", "unguarded")
            node.meta = {"tensor_dict": marks, "example_value": fake}
            node._dynamo_source = spec.source
        return graph


def _fake(spec: InputSpec, value: Any, symbols: dict[sympy.Symbol, Any]) -> Any:
    """A fake tensor (or size) of the program's own shape environment."""
    if spec.shape is None:
        assert spec.size is not None
        return _evaluate(spec.size, symbols)
    sizes = [_evaluate(size, symbols) for size in spec.shape]
    if value.is_contiguous():
        return torch.empty(sizes, dtype=value.dtype, device=value.device)
    return torch.empty_strided(sizes, value.stride(), dtype=value.dtype, device=value.device)


def _evaluate(size: sympy.Expr, symbols: dict[sympy.Symbol, Any]) -> Any:
    if size.is_Integer:
        return int(size)
    if isinstance(size, sympy.Symbol):
        return symbols[size]
    return sympy_interp(PythonReferenceAnalysis, symbols, size)
