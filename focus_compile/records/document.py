"""A record of a run: what its file holds, and how it is written and read.

JSON, one call a line; tensors, where a call has others than its ids, lie beside it in a
`.safetensors` file by the same name. Nothing in either is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from focus_compile.errors import RecordError

__all__ = ["FORMAT", "VERSION", "Record", "flags_of", "ranges_of"]

FORMAT, VERSION = "focus_compile record", 1
_LISTS, _OBJECTS = ("graphs", "calls"), ("made", "settings", "model", "arms")
_CALL = ("graph", "step", "started", "ids", "rows", "inputs")


@dataclass
class Record:
    """One run.

    made: versions and machine; settings: what the caller noted; model: class, parameters, and a
    fingerprint of the weights. graphs: plan and options of each graph that ran, or the reason why
    it has no plan. calls: one entry each, see docs/report.md; output: the ids and the text that
    came out, where the caller noted them. arms: figures of other ways to run the same, by name.
    tensors: inputs and logits, by their hash.
    """

    made: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    graphs: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    output: dict[str, Any] | None = None
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def ids(self) -> list[Tensor]:
        """The ids of every call, int64 [batch, length]."""
        found: list[Tensor] = []
        for call in self.calls:
            given = call["ids"]
            if "tokens" in given:
                # No view: a replay gives Dynamo what it may guard on.
                found.append(torch.tensor(given["tokens"], dtype=torch.int64))
                continue
            ids = found[-1].clone()
            for sequence, position, token in given["changed"]:
                ids[sequence, position] = token
            found.append(ids)
        return found

    def decided(self) -> list[Tensor]:
        """Of every call, the masked positions that the caller decided before the next one, or
        before the noted output; bool [batch, length]."""
        ids = self.ids()
        after: list[Tensor | None] = [*ids[1:], None]
        if self.output is not None and self.output.get("ids"):
            after[-1] = torch.tensor(self.output["ids"], dtype=torch.int64)
        found = []
        for call, was, now in zip(self.calls, ids, after, strict=True):
            mask = self.graphs[call["graph"]]["options"].get("mask_token_id")
            if now is None or mask is None or now.shape[0] != was.shape[0]:
                found.append(torch.zeros_like(was, dtype=torch.bool))
                continue
            width = min(now.shape[1], was.shape[1])
            masked = was[:, :width].eq(mask)
            decided = masked & now[:, :width].ne(mask)
            found.append(torch.nn.functional.pad(decided, (0, was.shape[1] - width)))
        return found

    def save(self, path: Path) -> None:
        """Write the record, and its tensors beside it where it has some.

        Raises:
            RecordError: the file cannot be written.
        """
        known = {name: getattr(self, name) for name in (*_OBJECTS, "graphs", "output")}
        head = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(value)}" for name, value in known.items()
        )
        calls = ",\n".join(json.dumps(call) for call in self.calls)
        first = f'"format": {json.dumps(FORMAT)},\n"version": {VERSION}'
        try:
            path.write_text(f'{{{first},\n{head},\n"calls": [\n{calls}\n]}}\n', encoding="utf-8")
            if self.tensors:
                kept = {key: value.contiguous() for key, value in self.tensors.items()}
                save_file(kept, tensors_file(path))
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror}; expected a file to write") from None

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            RecordError: no such file, or not a record of this version.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror}; expected a record of a run") from None
        except ValueError:
            raise _no_record(path, "not JSON") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise _no_record(path, "another kind of JSON file")
        if found.get("version") != VERSION:
            raise RecordError(
                f"{path}: a record of version {found.get('version')}; this focus_compile reads "
                f"version {VERSION}. Record the run again, or use the version that wrote it."
            )
        _check(path, found)
        beside = tensors_file(path)
        tensors = {}
        if beside.exists():
            try:
                tensors = load_file(beside)
            except SafetensorError as error:
                raise RecordError(f"{beside}: not a safetensors file ({error})") from None
        fields = {name: found[name] for name in (*_OBJECTS, *_LISTS)}
        return cls(**fields, output=found.get("output"), tensors=tensors)


def tensors_file(path: Path) -> Path:
    """Where the tensors of a record lie."""
    return path.with_suffix(".safetensors")


def _no_record(path: Path, what: str) -> RecordError:
    return RecordError(
        f"{path}: {what}; expected what `focus-compile record` or focus_compile.recording wrote"
    )


def _check(path: Path, found: dict[str, Any]) -> None:
    """Raise RecordError where parts are missing or of another type."""
    for names, kind in ((_LISTS, list), (_OBJECTS, dict)):
        for name in names:
            if not isinstance(found.get(name), kind):
                raise _no_record(path, f"the record has no {name}")
    for at, call in enumerate(found["calls"]):
        missing = [name for name in _CALL if not isinstance(call, dict) or name not in call]
        if missing:
            raise _no_record(path, f"call {at} has no {missing[0]}")
        if not 0 <= call["graph"] < len(found["graphs"]):
            raise _no_record(path, f"call {at} names graph {call['graph']}, which there is not")
    if found["calls"] and "tokens" not in found["calls"][0]["ids"]:
        raise _no_record(path, "the first call has no ids")


def ranges_of(flags: Tensor) -> list[list[list[int]]]:
    """The True positions of every row of bool [batch, length], as [start, stop) ranges."""
    found = []
    for row in flags:
        edges = torch.nn.functional.pad(row.to(torch.int8), (1, 1)).diff().nonzero()[:, 0]
        found.append(edges.view(-1, 2).tolist())
    return found


def flags_of(ranges: Sequence[Sequence[Sequence[int]]], length: int) -> Tensor:
    """The inverse of `ranges_of`, bool [batch, length]."""
    flags = torch.zeros((len(ranges), length), dtype=torch.bool)
    for row, pairs in zip(flags, ranges, strict=True):
        for start, stop in pairs:
            row[start:stop] = True
    return flags
