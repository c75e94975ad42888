"""The page of a report: sections of figures, each with its numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from focus_compile.config import FocusConfig
from focus_compile.errors import OptionError
from focus_compile.records.document import Record
from focus_compile.report import figures
from focus_compile.report.numbers import COMPUTED, DECIDED, FOCUS, RunNumbers
from focus_compile.runtime.memory_plan import readable

__all__ = ["html", "write"]

ROWS = 512
"""Rows of a table at most; the record holds all of them."""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first of each row is its heading."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]

    @property
    def shown(self) -> Sequence[Sequence[object]]:
        return self.rows[:ROWS]

    @property
    def left_out(self) -> int:
        return max(0, len(self.rows) - ROWS)


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and either a figure with its table, a table, or why there is none."""

    name: str
    title: str
    text: str
    table: Table | None = None
    svg: str = ""
    absent: str = ""
    notes: tuple[str, ...] = ()


def write(record: Record, path: str | Path) -> None:
    """Write the report of a run.

    Raises:
        RecordError: the record holds no calls.
        OptionError: matplotlib or Jinja2 is missing, or the file cannot be written.
    """
    text = html(record)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}; expected a file to write") from None


def html(record: Record) -> str:
    """The report of a run as one HTML document that loads nothing.

    Raises: as `write`.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise figures.missing("Jinja2") from None
    run = RunNumbers(record)
    environment = Environment(
        loader=PackageLoader("focus_compile.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    style = (files("focus_compile.report") / "style.css").read_text(encoding="utf-8")
    return environment.get_template("template.html").render(
        title=_title(record),
        style=style,
        figures=_tiles(run),
        output=_output(record),
        sections=[make(run) for make in _SECTIONS],
    )


def _title(record: Record) -> str:
    name = record.model.get("name") or record.model.get("class") or "a model"
    policy = record.graphs[0]["options"]["policy"] if record.graphs else ""
    return f"{name}, {policy}"


def _tiles(run: RunNumbers) -> list[tuple[str, str]]:
    """The figures that are read first."""
    calls = ", ".join(f"{count} {name}" for name, count in run.programs().items())
    tiles = [
        ("calls", f"{len(run.calls)} ({calls})"),
        ("tokens", f"{run.sequences} × {run.length}"),
        ("rows computed", f"{sum(run.rows()) / max(1, run.dense_rows()):.1%} of all"),
    ]
    total = sum(run.time_split().values())
    tiles.append(("seconds", f"{total:.2f}"))
    so_far = [value for value in run.curves().recall_so_far if value is not None]
    if so_far:
        tiles.append(("recall", f"{so_far[-1]:.1%}"))
    arms = run.record.arms
    if {"dense", "focus"} <= arms.keys() and arms["focus"].get("seconds"):
        speedup = arms["dense"]["seconds"] / arms["focus"]["seconds"]
        tiles.append(("dense / focus time", f"{speedup:.1f}×"))
    return tiles


def _output(record: Record) -> list[str]:
    return list((record.output or {}).get("text") or [])


def _plan(run: RunNumbers) -> Section:
    plan = run.plan
    text = "What the compiler found in the model's graph by layer, and the keys that a step reads."
    if plan is None:
        why = run.graph["why"] or "the model was not analysed"
        return Section("plan", "Plan", text, absent=f"Every call ran the model itself: {why}.")
    keys: dict[str, int] = next(
        (s["keys"] for s in run.steps if s["program"] == "step" and s.get("keys")), {}
    )
    rows = [
        (
            site["index"], site["region"], site["spelling"],
            f"{site['heads']}/{site['kv_heads']} of {site['head_dim']}",
            "yes" if site["masked"] else "no", keys.get(site["region"], "–"),
        )
        for site in plan["sites"]
    ]  # fmt: skip
    columns = ("layer", "region", "attention", "heads/kv heads", "mask", "keys in a step")
    notes = [f"refused: {_refusal(item)}" for item in plan["refusals"]]
    notes += [f"near miss: {_refusal(item)}" for item in plan["misses"]]
    notes += [f"calls ran exactly: {run.graph['why']}"] if run.graph["why"] else []
    others = sum(call["graph"] != run.record.graphs.index(run.graph) for call in run.calls)
    notes += [f"{others} calls ran another graph than this one"] if others else []
    notes += [] if notes else ["no refusals and no near misses"]
    return Section("plan", "Plan", text, Table(columns, rows), notes=tuple(notes))


def _refusal(item: dict[str, str]) -> str:
    where = f" [{item['where']}]" if item["where"] else ""
    return f"{item['reason']}{where}. {item['remedy']}".strip()


def _timeline(run: RunNumbers) -> Section:
    states, first = run.timeline()
    marks = (COMPUTED, FOCUS, DECIDED)
    rows = [
        (
            at, step["program"], step["why"], step["rows"], step.get("bucket", "–"),
            *(_positions(states[at] == mark, first) for mark in marks[1:]),
        )
        for at, step in enumerate(run.steps)
    ]  # fmt: skip
    columns = ("call", "program", "why", "rows", "bucket", "expected", "decided")
    return Section(
        "timeline",
        "Active rows",
        "Which positions of the response each call computed, expected to decode next, and had "
        "decided. A refresh computes all rows, the prompt's too."
        + (" Sequence 0 of the batch." if run.sequences > 1 else ""),
        Table(columns, rows),
        figures.timeline(states, first, "timeline"),
    )


def _positions(flags: Any, first: int) -> str:
    return ", ".join(str(first + int(at)) for at in flags.nonzero()[:, 0]) or "–"


def _kept_keys(run: RunNumbers) -> Section:
    text = (
        "How often each sparse layer kept each key block of the prompt, and which positions every "
        "sparse layer read because they draw attention (triangles; larger: in more steps)."
    )
    found = run.kept_keys()
    if found is None:
        absent = "No step chose keys: the policy reads all of them, or they were not recorded."
        return Section("keys", "Kept keys", text, absent=absent)
    layers, share = found
    sinks = run.sinks()
    rows = [
        (layer, *(f"{value:.0%}" for value in values.tolist()))
        for layer, values in zip(layers, share, strict=True)
    ]
    notes = []
    if sinks is not None and sinks.any():
        order = sinks.argsort(descending=True, stable=True)[: int((sinks > 0).sum())]
        listed = ", ".join(f"{int(at)} ({sinks[at]:.0%})" for at in order[:32])
        notes.append(f"sinks, by share of steps: {listed}{' …' if len(order) > 32 else ''}")
    columns = ("layer", *(f"block {block}" for block in range(share.shape[1])))
    svg = figures.kept_keys(layers, share, sinks, "keys")
    return Section("keys", "Kept keys", text, Table(columns, rows), svg, notes=tuple(notes))


def _consistency(run: RunNumbers) -> Section:
    text = (
        "The prompt positions that draw the most dense attention in each layer, at every refresh: "
        "the share of them that two layers have in common. Where later layers agree with the one "
        "that captures the sinks, its choice serves them all."
    )
    share = run.sink_consistency()
    title = "Sink consistency across layers"
    if share is None:
        absent = "Attention was not recorded; record with attention=True, or --attention."
        return Section("sinks", title, text, absent=absent)
    layers = range(share.shape[0])
    rows = [(layer, *(f"{value:.2f}" for value in share[layer].tolist())) for layer in layers]
    columns = ("layer", *map(str, layers))
    capture = (run.plan or {}).get("regions", {}).get("sink-capture", [])
    notes = tuple(f"layer {layer} captures the sinks of a step" for layer in capture)
    svg = figures.consistency(share, "sinks")
    return Section("sinks", title, text, Table(columns, rows), svg, notes=notes)


def _confidence(run: RunNumbers) -> Section:
    curves = run.curves()
    text = (
        "Mean of the highest probability of the positions that were decided after a call, and of "
        "those left undecided."
    )
    if not any(value is not None for value in (*curves.decided, *curves.undecided)):
        absent = "The model's logits were not seen: a compiled sampler returned something else."
        return Section("confidence", "Confidence", text, absent=absent)
    rows = [
        (at, _share(taken), _share(left))
        for at, (taken, left) in enumerate(zip(curves.decided, curves.undecided, strict=True))
    ]
    table = Table(("call", "decided", "undecided"), rows)
    svg = figures.confidence(curves, "confidence")
    return Section("confidence", "Confidence", text, table, svg)


def _recall(run: RunNumbers) -> Section:
    curves = run.curves()
    text = (
        "Of the positions decided since the call before, the share that its step had expected to "
        "decode. A refresh computes all rows and expects nothing."
    )
    if not any(value is not None for value in curves.recall):
        return Section("recall", "Recall", text, absent="No step was followed by a decision.")
    rows = [
        (at, _share(one), _share(sofar))
        for at, (one, sofar) in enumerate(zip(curves.recall, curves.recall_so_far, strict=True))
    ]
    table = Table(("call", "recall", "so far"), rows)
    return Section("recall", "Recall", text, table, figures.recall(curves, "recall"))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _time(run: RunNumbers) -> Section:
    split = run.time_split()
    total = sum(split.values())
    rows = [(part, f"{value:.3f}", f"{value / total:.0%}") for part, value in split.items()]
    compiling = sum(step["compile_seconds"] for step in run.steps)
    notes = (
        f"compilation in these calls: {compiling:.2f} s, left out; so is what looking took",
        "sampler: all between two calls, torch.compile's own guards included",
    )
    svg = figures.time_split(split, "time")
    table = Table(("part", "seconds", "share"), rows)
    return Section("time", "Time", "Where the time of the run went.", table, svg, notes=notes)


def _call_times(run: RunNumbers) -> Section:
    values = [max(value, 1e-3) for value in run.milliseconds()]
    programs = [step["program"] for step in run.steps]
    rows = [
        (at, program, f"{value:.2f}", f"{call['guard_milliseconds']:.2f}")
        for at, (program, value, call) in enumerate(zip(programs, values, run.calls, strict=True))
    ]
    return Section(
        "calls",
        "Time of each call",
        "Host time by program, without compilation.",
        Table(("call", "program", "milliseconds", "guard"), rows),
        figures.milliseconds(values, programs, "calls"),
    )


def _memory(run: RunNumbers) -> Section:
    rows = [(name, readable(size), f"{size:,}") for name, size in run.memory().items()]
    text = "What the run held, beside what a forward needs for itself."
    table = Table(("what", "size", "bytes"), rows)
    return Section("memory", "Memory", text, table, absent="" if rows else "Not recorded.")


def _arms(run: RunNumbers) -> Section:
    text = "The same question, timed without being recorded."
    arms = run.record.arms
    if not arms:
        absent = "Nothing was compared; `focus-compile record --dense` and `demo --report` do."
        return Section("dense", "Comparison with dense", text, absent=absent)
    rows = [(label, *(_cell(arms[arm], name) for arm in arms)) for name, label in _FIGURES.items()]
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    tokens = [arm.get("tokens") for arm in arms.values()]
    if len(arms) == 2 and None not in tokens:
        rows.append(("tokens as dense has them", "", _agreement(*tokens)))
    return Section("dense", "Comparison with dense", text, Table(("", *arms), rows))


_FIGURES = {
    "right": "answers right",
    "asked": "answers asked for",
    "model_calls": "model calls",
    "rows": "rows computed",
    "seconds": "seconds",
    "compile_seconds": "compile seconds",
    "first_seconds": "seconds of the first decode, which compiles",
    "text": "text",
}


def _cell(arm: dict[str, Any], name: str) -> str:
    value = arm.get(name)
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _agreement(dense: Any, ours: Any) -> str:
    flat = [[token for row in ids for token in row] for ids in (dense, ours)]
    same = sum(a == b for a, b in zip(*flat, strict=False))
    return f"{same} of {len(flat[0])}"


def _settings(run: RunNumbers) -> Section:
    defaults = FocusConfig().to_dict()
    options = run.graph["options"]
    changed = {name: value for name, value in options.items() if value != defaults.get(name)}
    rows: list[tuple[object, ...]] = [("option", *item) for item in changed.items()]
    rows += [("setting", *item) for item in run.record.settings.items()]
    rows += [("model", *item) for item in run.record.model.items()]
    rows += [("made with", *item) for item in run.record.made.items() if item[0] != "peak_bytes"]
    rows = [(kind, name, "–" if value is None else value) for kind, name, value in rows]
    text = "Options that are not at their defaults, and what the run was made with."
    return Section("settings", "Settings and versions", text, Table(("", "name", "value"), rows))


_SECTIONS: tuple[Callable[[RunNumbers], Section], ...] = (
    _arms, _plan, _timeline, _kept_keys, _consistency, _confidence, _recall, _time, _call_times,
    _memory, _settings,
)  # fmt: skip
