"""`with focus_compile.recording("run.json"):` writes down every call of a focus-compiled model."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus_compile.records.document import Record, ranges_of
from focus_compile.runtime.inspection import CallInspection, Source, hash_of, inspecting
from focus_compile.runtime.record import StepRecord

__all__ = ["Recording", "recording"]

SAMPLED = 4096
"""Elements of each weight that its fingerprint reads."""


class Recording:
    """A run that is being recorded; `record` holds what was seen so far."""

    def __init__(self) -> None:
        self.record = Record()
        self._sources: dict[int, tuple[int, Source]] = {}
        self._begun: float | None = None
        self._ids: Tensor | None = None

    def note(self, **settings: Any) -> None:
        """Settings of the run that only the caller knows, as JSON types."""
        self.record.settings |= settings

    def output(self, ids: Tensor, text: str | Sequence[str] | None = None) -> None:
        """What came out: ids int64 [batch, length], and their text."""
        texts = [text] if isinstance(text, str) else text
        self.record.output = {"ids": ids.tolist(), "text": None if texts is None else list(texts)}

    def arm(self, name: str, **figures: Any) -> None:
        """Figures of a way to run the same, such as dense; see docs/report.md for their names."""
        self.record.arms[name] = figures

    def take(self, step: StepRecord, seen: CallInspection) -> None:
        """A call is over."""
        if self._begun is None:
            self._begun = seen.started
        call: dict[str, Any] = {
            "graph": self._graph(seen.source),
            "started": round(seen.started - self._begun, 6),
            "guard_milliseconds": round(seen.guard_milliseconds, 4),
            "held_bytes": seen.held_bytes,
            "step": {name: value for name, value in asdict(step).items() if value is not None},
            "ids_name": seen.ids_name,
            "ids": self._changes(seen.ids),
            "inputs": {name: self._keep(value) for name, value in seen.inputs.items()},
            "rows": ranges_of(seen.rows),
        }
        if seen.submitted is not None:
            call["submitted"] = [dict(request) for request in seen.submitted]
        for name in ("focus", "kept"):
            flags = getattr(seen, name)
            if flags is not None:
                call[name] = ranges_of(flags)
        call["blocks"] = {str(site): _lists(value) for site, value in seen.blocks.items()}
        call["top"] = {str(site): _lists(value) for site, value in seen.top.items()}
        if seen.sinks is not None:
            call["sinks"] = _lists(seen.sinks)
        if seen.confidence is not None and seen.token is not None:
            call["confidence"] = [round(value, 6) for value in seen.confidence.tolist()]
            call["token"] = seen.token.tolist()
        call["logits"] = seen.logits
        if seen.values is not None:
            call["values"] = self._keep(seen.values)
        self.record.calls.append(call)

    def _graph(self, source: Source) -> int:
        """The number of the graph that a call ran."""
        key = id(source.plan) if source.plan is not None else hash(source.why)
        known = self._sources.get(key)
        if known is not None:
            graph = self.record.graphs[known[0]]
            graph["why"], graph["memory"] = source.why, dict(source.memory)
            return known[0]
        number = len(self._sources)
        self._sources[key] = number, source  # keeps the plan, so that its id stays its own
        plan = None if source.plan is None else source.plan.to_dict()
        graph = {
            "plan": plan,
            "options": source.config.to_dict(),
            "why": source.why,
            "memory": dict(source.memory),
        }
        if source.generator is not None:
            graph["generator"] = dict(source.generator)
        self.record.graphs.append(graph)
        if source.weights and "weights" not in self.record.model:
            self.record.model |= _weights(source.weights)
        return number

    def _changes(self, ids: Tensor) -> dict[str, Any]:
        """The ids, or where they differ from those of the call before."""
        before, self._ids = self._ids, ids
        if before is not None and before.shape == ids.shape:
            places = (before != ids).nonzero()
            if 4 * places.shape[0] < ids.numel():
                return {"changed": [[b, p, int(ids[b, p])] for b, p in places.tolist()]}
        return {"length": ids.shape[1], "tokens": ids.tolist()}

    def _keep(self, value: Tensor) -> str:
        key = hash_of(value)
        self.record.tensors[key] = value
        return key


@contextlib.contextmanager
def recording(
    path: str | Path | None = None,
    *,
    keys: bool = True,
    attention: bool = False,
    logits: bool = False,
) -> Iterator[Recording]:
    """Record every call of focus-compiled models in this context, and write the record at its end,
    also where an exception ends it.

    What is looked at is looked at after a call or beside its clock: milliseconds are those of a
    call that nobody looks at, save on a GPU with `keys`.

    Args:
        path: the file; None writes none.
        keys: the kept key blocks of every layer, and the sinks. On a GPU a step then launches its
            kernels one by one instead of as a CUDA graph.
        attention: at each refresh, the prompt positions that draw most attention in every layer;
            costs about as much as that attention.
        logits: keep the logits of all undecided rows, beside their hash: [masks, vocabulary] of
            numbers a call.

    Raises:
        RecordError: the file cannot be written.
    """
    run = Recording()
    try:
        with inspecting(run.take, keys=keys, attention=attention, values=logits):
            yield run
    finally:
        run.record.made = _made()
        if path is not None:
            run.record.save(Path(path))


def _lists(values: Tensor) -> list[list[int]]:
    """The entries of each row that are no padding."""
    return [[entry for entry in row if entry >= 0] for row in values.tolist()]


def _weights(weights: Sequence[Tensor]) -> dict[str, Any]:
    """Size and fingerprint of the weights, whatever their order."""
    digests = sorted(hash_of(_sample(weight.detach())) for weight in weights)
    return {
        "weights": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "weight_bytes": sum(weight.nbytes for weight in weights),
        "device": str(weights[0].device),
    }


def _sample(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)]


def _made() -> dict[str, Any]:
    from focus_compile.demo.environment import describe

    try:
        own = version("focus-compile")
    except PackageNotFoundError:
        own = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"focus_compile": own, **describe(), "device": device, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int | None:
    """The most memory that was allocated: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
