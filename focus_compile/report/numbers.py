"""What a report says of a record, as plain numbers: no drawing here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from focus_compile.errors import RecordError
from focus_compile.records.document import Record, flags_of

__all__ = ["COMPUTED", "DECIDED", "FOCUS", "WAITING", "Curves", "RunNumbers"]

WAITING, COMPUTED, FOCUS, DECIDED = range(4)
"""States of a position in a call, each above the one before: not computed, computed, expected to
decode next, decided after the call."""
MARGIN = 16
"""Positions before the response that the timeline shows."""
_PARTS = {"refresh": "refresh", "partial": "refresh", "step": "step", "exact": "exact program"}
PROGRAMS = ("refresh", "partial", "step", "exact")


@dataclass(frozen=True)
class Curves:
    """By call: mean confidence of the undecided positions of sequence 0 and of those decided after
    the call; share of the positions decided before it that its step had expected, and the same of
    all so far. None where there is no such number."""

    undecided: list[float | None]
    decided: list[float | None]
    recall: list[float | None]
    recall_so_far: list[float | None]


class RunNumbers:
    """Raises RecordError of a record without calls."""

    def __init__(self, record: Record) -> None:
        if not record.calls:
            raise RecordError("report: the record holds no calls, so there is nothing to draw")
        self.record = record
        self.calls = record.calls
        self.ids = record.ids()
        self.decided = record.decided()
        self.steps: list[dict[str, Any]] = [call["step"] for call in record.calls]

    @cached_property
    def graph(self) -> dict[str, Any]:
        """The graph that most calls ran."""
        most = Counter(call["graph"] for call in self.calls).most_common(1)[0][0]
        found: dict[str, Any] = self.record.graphs[most]
        return found

    @property
    def plan(self) -> dict[str, Any] | None:
        plan: dict[str, Any] | None = self.graph["plan"]
        return plan

    @cached_property
    def response_start(self) -> int:
        """First position of sequence 0 that was ever undecided."""
        mask = self.graph["options"].get("mask_token_id")
        starts = [int(row.argmax()) for ids in self.ids if (row := ids[0].eq(mask).int()).any()]
        return min(starts, default=self.ids[0].shape[1])

    @property
    def length(self) -> int:
        return max(ids.shape[1] for ids in self.ids)

    @property
    def sequences(self) -> int:
        return int(self.ids[0].shape[0])

    def programs(self) -> dict[str, int]:
        """Calls by program."""
        counts = Counter(step["program"] for step in self.steps)
        return {name: counts[name] for name in PROGRAMS if counts[name]}

    def timeline(self) -> tuple[Tensor, int]:
        """The state of every position of sequence 0 in every call, int64 [calls, positions], from
        the position returned on."""
        first = max(0, self.response_start - MARGIN)
        states = torch.zeros((len(self.calls), self.length - first), dtype=torch.int64)
        for at, (call, decided) in enumerate(zip(self.calls, self.decided, strict=True)):
            width = decided.shape[1]
            state = states[at, : width - first]
            state[flags_of(call["rows"], width)[0, first:]] = COMPUTED
            if "focus" in call:
                state[flags_of(call["focus"], width)[0, first:]] = FOCUS
            state[decided[0, first:]] = DECIDED
        return states, first

    def rows(self) -> list[int]:
        """Rows that each call computed."""
        return [step["rows"] for step in self.steps]

    def dense_rows(self) -> int:
        """Rows that the same calls would compute without a cache."""
        return sum(ids.numel() for ids in self.ids)

    def kept_keys(self) -> tuple[list[int], Tensor] | None:
        """Sparse layers, and the share of steps in which each of them kept each key block of
        sequence 0, [layers, blocks]; None where no keys were chosen, or not noted."""
        chosen = [call for call in self.calls if call.get("blocks")]
        if not chosen or self.plan is None:
            return None
        layers = sorted({int(layer) for call in chosen for layer in call["blocks"]})
        blocks = max(1, self.response_start // self.plan["key_block"])
        share = torch.zeros((len(layers), blocks))
        for call in chosen:
            for at, layer in enumerate(layers):
                kept = [b for b in call["blocks"].get(str(layer), [[]])[0] if b < blocks]
                share[at, kept] += 1
        return layers, share / len(chosen)

    def sinks(self) -> Tensor | None:
        """Share of steps in which each prompt position of sequence 0 was a sink, [positions]."""
        found = [call["sinks"][0] for call in self.calls if call.get("sinks")]
        if not found:
            return None
        last = max((max(sinks, default=0) for sinks in found), default=0)
        share = torch.zeros(max(self.response_start, last + 1))
        for sinks in found:
            share[sinks] += 1
        return share / len(found)

    def sink_consistency(self) -> Tensor | None:
        """Share of the positions of highest attention that two layers have in common, [layers,
        layers], over all refreshes and sequences; None where attention was not noted."""
        noted = [call["top"] for call in self.calls if call.get("top")]
        if not noted:
            return None
        layers = sorted(noted[0], key=int)
        total, count = torch.zeros((len(layers), len(layers))), 0
        for tops in noted:
            for sequence in range(len(tops[layers[0]])):
                sets = [set(tops[layer][sequence]) for layer in layers]
                total += torch.tensor([[_common(a, b) for b in sets] for a in sets])
                count += 1
        return total / max(count, 1)

    def curves(self) -> Curves:
        """Confidence and recall."""
        undecided: list[float | None] = []
        chosen: list[float | None] = []
        mask = self.graph["options"].get("mask_token_id")
        for call, ids, decided in zip(self.calls, self.ids, self.decided, strict=True):
            confidence = torch.tensor(call.get("confidence") or [])
            masked = ids.eq(mask) if mask is not None else torch.zeros_like(ids, dtype=torch.bool)
            if confidence.shape[0] != int(masked.sum()):
                undecided.append(None)
                chosen.append(None)
                continue
            own = confidence[: int(masked[0].sum())]
            took = decided[0][masked[0]]
            undecided.append(_mean(own[~took]))
            chosen.append(_mean(own[took]))
        recall = [step.get("recall") for step in self.steps]
        return Curves(undecided, chosen, recall, self._recall_so_far(recall))

    def _recall_so_far(self, recall: Sequence[float | None]) -> list[float | None]:
        found, hits, total = [], 0.0, 0
        counts = [0, *(int(decided.sum()) for decided in self.decided[:-1])]
        for share, count in zip(recall, counts, strict=True):
            if share is not None:
                hits, total = hits + share * count, total + count
            found.append(hits / total if total else None)
        return found

    def milliseconds(self) -> list[float]:
        """Of each call, without compilation."""
        return [step["milliseconds"] - 1e3 * step["compile_seconds"] for step in self.steps]

    def time_split(self) -> dict[str, float]:
        """Seconds by what they went into; compilation and what looked at the run left out."""
        split: dict[str, float] = dict.fromkeys(("refresh", "step", "exact program", "guard"), 0.0)
        for call, spent in zip(self.calls, self.milliseconds(), strict=True):
            guard = call["guard_milliseconds"]
            split[_PARTS[call["step"]["program"]]] += (spent - guard) / 1e3
            split["guard"] += guard / 1e3
        between = 0.0
        for call, after in zip(self.calls, self.calls[1:], strict=False):
            end = call["started"] + call["step"]["milliseconds"] / 1e3
            between += max(0.0, after["started"] - end)
        split["sampler"] = between
        return {name: value for name, value in split.items() if value > 0}

    def memory(self) -> dict[str, int]:
        """Bytes: the weights, a trajectory by what it holds, what was held at most, the peak."""
        model, made = self.record.model, self.record.made
        held = [call["held_bytes"] for call in self.calls if call.get("held_bytes")]
        parts: dict[str, int | None] = {"weights": model.get("weight_bytes")}
        names = {"kv": "keys and values", "weights": "merged weights"}
        for name, size in self.graph.get("memory", {}).items():
            parts[f"trajectory: {names.get(name, name)}"] = size or None
        parts["trajectory: held at most"] = max(held, default=None)
        parts["peak of the process or GPU"] = made.get("peak_bytes")
        return {name: size for name, size in parts.items() if size is not None}


def _common(a: set[int], b: set[int]) -> float:
    return len(a & b) / max(len(a), len(b), 1)


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None
