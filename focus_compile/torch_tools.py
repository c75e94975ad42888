"""What torch's own tools see: structured traces (TORCH_TRACE), profiler ranges, and the compilation
that a program compiled later belongs to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import CompileContext, CompileId, compile_context
from torch._logging._internal import trace_structured
from torch.autograd import profiler

__all__ = [
    "belonging_to",
    "call_attention",
    "current_compilation",
    "layers",
    "span",
    "trace_artifact",
]

_OFF = contextlib.nullcontext()
_running = threading.local()


def trace_artifact(name: str, payload: Callable[[], Any]) -> None:
    """Adds `focus_<name>` to the trace that TORCH_TRACE writes, which tlparse shows by
    compilation. payload: what it holds, a text or JSON types; called only if there is a trace."""
    held: list[Any] = []

    def metadata() -> dict[str, Any]:
        held.append(payload())
        kind = "string" if isinstance(held[0], str) else "json"
        return {"name": f"focus_{name}", "encoding": kind}

    def text() -> str:
        return held[0] if isinstance(held[0], str) else json.dumps(held[0], indent=2)

    trace_structured("artifact", metadata, payload_fn=text, expect_trace_id=False)


def current_compilation() -> CompileId | None:
    """The compilation of Dynamo's that runs now."""
    return CompileContext.current_compile_id()


@contextlib.contextmanager
def belonging_to(compilation: CompileId | None) -> Iterator[None]:
    """What is traced inside stands under that compilation, unless another runs."""
    if compilation is None or current_compilation() is not None:
        yield
        return
    with compile_context(CompileContext(compilation)):
        yield


def span(*name: Any) -> contextlib.AbstractContextManager[Any]:
    """A range `focus_compile: name` in torch.profiler; nothing where that is off.

    name: words, numbers, tuples of them, and None for no word.
    """
    if not profiler._is_profiler_enabled:
        return _OFF
    return torch.profiler.record_function(f"focus_compile: {' '.join(_words(name))}")


def _words(name: Any) -> Iterator[str]:
    if isinstance(name, tuple):
        for part in name:
            yield from _words(part)
    elif name is not None:
        yield str(name)


@contextlib.contextmanager
def layers(labels: Sequence[str]) -> Iterator[None]:
    """Attention ops that run inside are ranges with these labels, in order."""
    before = getattr(_running, "labels", None)
    _running.labels = iter(labels)
    try:
        yield
    finally:
        _running.labels = before


def call_attention(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, in a range of its layer where torch.profiler is on."""

    def ranged(*arguments: Any) -> Any:
        if not profiler._is_profiler_enabled:
            return call(*arguments)
        label = next(getattr(_running, "labels", None) or iter(()), "attention")
        with span(label):
            return call(*arguments)

    return ranged
