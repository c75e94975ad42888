"""A record's inputs, run again."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from focus_compile.errors import RecordError
from focus_compile.frontend import compile as focus_compiled
from focus_compile.records.document import Record
from focus_compile.records.recorder import recording

__all__ = ["replay"]

_POSITIONAL = re.compile(r"L\['args'\]\[(\d+)\]")
_NAMED = re.compile(r"L\['(?:kwargs'\]\[')?(\w+)'\]")


@torch.no_grad()
def replay(
    record: Record,
    model: Any,
    *,
    fixed: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Record:
    """Call `model` with the inputs of every recorded call, and return the record of that.

    The loop of the recorded run is not needed: its ids are given. Of a `BatchGenerator`, the
    requests are given to another one, which takes as many steps. Compare the two with `compare`.
    In a process that compiled the model before, begin with `torch.compiler.reset()`: a new length
    that Dynamo traces anew starts a new trajectory.

    Args:
        model: what was recorded, not compiled. It is compiled with the options of the record.
        fixed: further arguments of every call, such as `{"use_cache": False}`: only tensors are
            recorded.
        progress: given the calls done and all of them, after every call.
        options: of FocusConfig, instead of the recorded ones; or arguments of `BatchGenerator`.

    Raises:
        RecordError: a record without calls, of several models, or with inputs that are not known.
    """
    if any("generator" in graph for graph in record.graphs):
        return _replay_generator(record, model, options, progress)
    compiled = focus_compiled(model, **(_options(record) | options))
    device = next(iter(model.parameters())).device
    with recording(
        None,
        attention=any(call.get("top") for call in record.calls),
        logits=any("values" in call for call in record.calls),
    ) as run:
        for at, (call, ids) in enumerate(zip(record.calls, record.ids(), strict=True)):
            given = {name: _tensor(record, key) for name, key in call["inputs"].items()}
            positional, named = _arguments({call["ids_name"]: ids} | given)
            compiled(
                *(value.to(device) for value in positional),
                **{name: value.to(device) for name, value in named.items()},
                **(fixed or {}),
            )
            if progress is not None:
                progress(at + 1, len(record.calls))
    return _as_before(run.record, record)


def _replay_generator(
    record: Record,
    model: Any,
    options: Mapping[str, Any],
    progress: Callable[[int, int], object] | None,
) -> Record:
    """Give a `BatchGenerator` the recorded requests, each before the step that it came before."""
    from focus_compile.block_diffusion.batch_generator import BatchGenerator

    _options(record)
    settings = dict(record.graphs[0]["generator"])
    counts = settings.pop("decode_counts")
    settings["alpha"] = math.inf if settings["alpha"] is None else settings["alpha"]
    started = [each["request"] for each in record.calls[0]["submitted"] if each["steps"]]
    if started:
        raise RecordError(
            f"replay: request {started[0]} was decoding when the recording began; record from "
            "before it was submitted"
        )
    generator = BatchGenerator(model, **{**settings, **options})
    if counts is not None:
        generator.decode_counts = generator.state.begin.new_tensor(counts)
    with recording(None, logits=any("values" in call for call in record.calls)) as run:
        for at, call in enumerate(record.calls):
            for request in call["submitted"]:
                generator.submit(request["prompt"], request["max_new_tokens"], request["stop"])
            generator.step()
            if progress is not None:
                progress(at + 1, len(record.calls))
    return _as_before(run.record, record)


def _as_before(after: Record, before: Record) -> Record:
    """What only the caller of the recorded run knew."""
    after.settings = dict(before.settings)
    named = {name: before.model.get(name) for name in ("name", "dtype")}
    after.model |= {name: value for name, value in named.items() if value}
    return after


def _options(record: Record) -> dict[str, Any]:
    """The options of all graphs."""
    if not record.calls:
        raise RecordError("replay: the record holds no calls")
    first, *others = [graph["options"] for graph in record.graphs]
    if any(options != first for options in others):
        raise RecordError(
            "replay: the record holds calls of models compiled with different options; record one "
            "model at a time"
        )
    return first


def _tensor(record: Record, key: str) -> Tensor:
    if key not in record.tensors:
        raise RecordError(
            f"replay: the tensor {key[:12]} of an input is missing; the .safetensors file belongs "
            "beside the record"
        )
    return record.tensors[key]


def _arguments(given: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional and named arguments, by what Dynamo calls the inputs."""
    positional: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, value in given.items():
        place, keyword = _POSITIONAL.fullmatch(name), _NAMED.fullmatch(name)
        if place is not None:
            positional[int(place.group(1))] = value
        elif keyword is not None:
            named[keyword.group(1)] = value
        else:
            raise RecordError(
                f"replay: the input {name} is no argument of its own; pass ids and masks as tensors"
            )
    if sorted(positional) != list(range(len(positional))):
        raise RecordError("replay: an argument between others was no tensor; pass it by its name")
    return [positional[at] for at in sorted(positional)], named
