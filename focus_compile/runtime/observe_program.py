"""`observe`, compiled: a handful of kernels where op by op there are a hundred.

Worth it where calls are CUDA graphs: between two of its kernels the device idles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from focus_compile.errors import CompileError
from focus_compile.lowering.program import InputSpec, Program
from focus_compile.runtime.observe import PER_SEQUENCE, Observed

__all__ = ["ObserveProgram"]

log = logging.getLogger(__name__)
BATCH, LENGTH = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "length"))


@dataclass
class ObserveProgram:
    """`work` of the tensors of an `Observed`, in their order, compiled by Inductor.

    One program serves all sizes that `work` does the same for. Where it cannot be traced or
    compiled, it runs as it is.
    """

    work: Callable[..., Tensor]
    _programs: list[tuple[Callable[[int, int], bool], Program]] = field(default_factory=list)
    _plain: bool = False

    def __call__(self, *tensors: Tensor) -> Tensor:
        if not self._plain:
            try:
                (flags,) = self._program_for(tensors)(*tensors)
                return flags
            except CompileError as error:
                log.info("calls are compared op by op: %s", error)
                self._plain = True
        return self.work(*tensors)

    @property
    def compilations(self) -> int:
        return sum(program.compilations for _, program in self._programs)

    @property
    def compile_seconds(self) -> float:
        return sum(program.compile_seconds for _, program in self._programs)

    def _program_for(self, tensors: Sequence[Tensor]) -> Program:
        batch, length = tensors[0].shape
        for serves, program in self._programs:
            if serves(batch, length):
                return program
        self._programs.append(_trace(self.work, tensors))
        return self._programs[-1][1]


def _trace(
    work: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> tuple[Callable[[int, int], bool], Program]:
    """The program for tensors like these, and of which [batch, length] it is the program."""
    batch, length = tensors[0].shape
    specs = [
        InputSpec(name, _shape(name, tensor, batch), static=True)
        for name, tensor in zip(Observed._fields, tensors, strict=True)
    ]
    environment = ShapeEnv()
    sizes = {LENGTH: length} if batch == 1 else {BATCH: batch, LENGTH: length}
    symbols = {symbol: _symbol(environment, symbol.name, size) for symbol, size in sizes.items()}
    with FakeTensorMode(shape_env=environment):
        fakes = [
            torch.empty(
                [symbols.get(size, size) if size in symbols else int(size) for size in spec.shape],
                dtype=tensor.dtype,
                device=tensor.device,
            )
            for spec, tensor in zip(specs, tensors, strict=True)
            if spec.shape is not None
        ]
    try:
        with torch.no_grad():
            graph = make_fx(lambda *given: (work(*given),), tracing_mode="symbolic")(*fakes)
    except Exception as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        raise CompileError(f"it cannot be traced ({type(error).__name__}: {message})") from error
    guard = None
    if environment.guards:
        guard = environment.produce_guards_expression(
            list(symbols.values()), guards=environment.guards
        )

    def serves(other_batch: int, other_length: int) -> bool:
        if (other_batch == 1) != (batch == 1) or other_length < 2:
            return False
        given = [other_length] if batch == 1 else [other_batch, other_length]
        return guard is None or bool(environment.evaluate_guards_expression(guard, given))

    return serves, Program("observe", graph, specs)


def _shape(name: str, tensor: Tensor, batch: int) -> tuple[sympy.Expr, ...]:
    several: Any = sympy.Integer(1) if batch == 1 else BATCH
    if tensor.dim() == 2:
        return several, LENGTH
    if name in PER_SEQUENCE:
        return (several,)
    return tuple(sympy.Integer(size) for size in tensor.shape)


def _symbol(environment: ShapeEnv, name: str, hint: int) -> Any:
    source = LocalSource(name)
    expression = environment.create_symbol(
        hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
    )
    return environment.create_symintnode(expression, hint=hint, source=source)
