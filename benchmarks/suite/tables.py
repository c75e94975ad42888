"""The tables of docs/performance.md, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.suite.cellbook import CellBook, Entry, headline
from benchmarks.suite.cells import ARMS, BEYOND
from benchmarks.suite.targets import verdicts

__all__ = ["document"]

PEERS = "abcdef"
OTHERS = "abcdg"


def document(result: dict[str, Any], images: dict[tuple[str, str], list[str]]) -> str:
    """docs/performance.md. images: links by (device, model)."""
    book = CellBook.of(result["rows"])
    parts = [_introduction(result)]
    for device, model, entries in book.parts():
        parts.append(f"## {model} on {device}\n")
        parts += [f"![{link}]({link})\n" for link in images.get((device, model), [])]
        parts += [_end_to_end(entries), _beyond(entries), _calls(entries)]
    parts += [_losing(book), _targets(book), _trouble(result), _provenance(result)]
    return "\n".join(part for part in parts if part)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; numbers to three digits, nothing as a dash."""
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_text(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _introduction(result: dict[str, Any]) -> str:
    arms = "\n".join(f"- **({letter})** {name}" for letter, name in ARMS.items())
    return (
        "# Performance\n\n"
        "Written by `python -m benchmarks.report` from `benchmarks/results/`; not to be edited.\n\n"
        f"{result['label']} All arms of a ratio ran in one process on the same weights, with one "
        "sampler and one schedule; a generation is composed from its measured refreshes, steps and "
        "sampler calls. Compilation is left out of all times but its own column.\n\n"
        f"{arms}\n"
    )


def _end_to_end(entries: list[Entry]) -> str:
    generated = next(
        (arms[a]["generated"] for e in entries for arms in e.runs.values() for a in arms), 256
    )
    header = ["context", "block", "tokens a call", "α", "(g) s"]
    header += [f"over ({letter})" for letter in PEERS]
    header += ["over (b) at 1 token", "over (a) at 1 token"]
    rows = [
        [entry.context, entry.block, entry.per_step, entry.alpha, ours["total_s"]]
        + [entry.ratio(letter) for letter in PEERS]
        + [entry.one_token_ratio(letter, generated) for letter in "ba"]
        for entry in entries
        if (ours := entry.arm("g")) is not None
    ]
    if not rows:
        return ""
    return f"### {generated} tokens, times faster than each peer\n\n" + table(header, rows)


def _beyond(entries: list[Entry]) -> str:
    """(h) and (i) beside the others, where they were measured."""
    header = ["context", "block", "tokens a call", "α", "arm", "s", "first refresh ms"]
    header += ["later, ms", "rows of these", "step ms", *(f"over ({a})" for a in OTHERS)]
    rows = [
        [entry.context, entry.block, entry.per_step, entry.alpha, f"({arm})", row["total_s"]]
        + [row["first_refresh_ms"], row["refresh_ms"], row["partial_rows"], row["step_ms"]]
        + [entry.ratio(letter, arm) for letter in OTHERS]
        for entry in entries
        for arm in BEYOND
        if (row := entry.arm(arm, arm)) is not None
    ]
    if not rows:
        return ""
    return (
        "### Beyond the papers, times faster than each\n\n"
        "How many rows a block entry must renew is measured on a model that answers "
        "([adaptive refresh](adaptive-refresh.md)), not with these random weights: here it is the "
        "share `refresh_rows`, without the gate.\n\n" + table(header, rows)
    )


def _calls(entries: list[Entry]) -> str:
    header = [
        "context",
        "block",
        "arm",
        "refresh ms",
        "of floor",
        "TFLOP/s",
        "step ms (p10–p90)",
        "of floor",
        "TB/s",
        "once s",
        "rows → padded",
        "launches (host)",
        "peak GiB",
        "compile s",
        "break-even tokens",
    ]
    rows = [
        _call_row(entry, letter, row)
        for entry in headline(entries)
        for letter in ARMS
        if (row := entry.arm(letter)) is not None
    ]
    first = headline(entries)[0]
    return (
        f"### Calls, at {first.per_step} a call and α={first.alpha:g}\n\n"
        "A vanilla call stands under *step*. *Of floor*: times the least that this run's copy "
        "bandwidth and GEMM speed allow. *Once*: what a new sequence's steps took beyond their "
        "median, such as captures; the totals include it. *Break-even*: against (a).\n\n"
        + table(header, rows)
    )


def _call_row(entry: Entry, letter: str, row: dict[str, Any]) -> list[Any]:
    step = (
        None
        if row.get("step_ms") is None
        else f"{row['step_ms']:.4g} ({row['step_ms_p10']:.4g}–{row['step_ms_p90']:.4g})"
    )
    launches = (
        None if row.get("launches") is None else f"{row['launches']:,} ({row['host_launches']:,})"
    )
    padded = None if row.get("rows") is None else f"{row['rows']:,.1f} → {row['bucket']:,.1f}"
    return [
        entry.context,
        entry.block,
        f"({letter})",
        row.get("refresh_ms"),
        row.get("refresh_over_floor"),
        row.get("refresh_tflop_s") or (row.get("step_tflop_s") if letter in "ab" else None),
        step,
        row.get("step_over_floor"),
        row.get("step_tb_s"),
        row.get("one_off_s"),
        padded,
        launches,
        row.get("peak_gib"),
        row.get("compile_s"),
        row.get("break_even_tokens"),
    ]


def _losing(book: CellBook) -> str:
    losing = book.losing()
    if not losing:
        return "## Where (g) loses\n\nIn none of the cells that were measured.\n"
    lines = [
        f"- {entry.title}, {entry.device}: ({letter}) {ARMS[letter]} is {times:.3g} times as fast"
        for entry, letter, times in losing
    ]
    return "## Where (g) loses\n\n" + "\n".join(lines) + "\n"


def _targets(book: CellBook) -> str:
    found = verdicts(book)
    if not found:
        return ""
    rows = [[v.device, v.aim, v.got, v.reached] for v in found]
    return "## Aims\n\n" + table(["device", "aim", "got", "reached"], rows)


def _trouble(result: dict[str, Any]) -> str:
    lines = [f"- refused to report {m}: {why}" for m, why in result["refused"].items()]
    lines += [
        f"- {row['model']} {row['context']:,}, block {row['block']}, arm ({row['arm']}): "
        f"{row['error'].splitlines()[0]}"
        for row in result["rows"]
        if row.get("error")
    ]
    return "## What failed\n\n" + "\n".join(dict.fromkeys(lines)) + "\n" if lines else ""


def _provenance(result: dict[str, Any]) -> str:
    rows = []
    for run, found in sorted(result["runs"].items()):
        where, top = found["environment"], found["ceilings"]
        rows.append(
            [
                run,
                where["device"],
                where["torch"],
                where.get("triton"),
                (where.get("commit") or where["source"])[:16],
                top["copy_tb_s"],
                top["gemm_tflop_s"],
                " – ".join(f"{load:.1f}" for load in found.get("load", [])),
                found.get("inductor_cache"),
                "share one" if found.get("dynamic") else "one each",
            ]
        )
    header = ["run", "device", "torch", "triton", "commit or source", "copy TB/s", "GEMM TFLOP/s"]
    header += ["load of the host", "Inductor's cache", "programs of the contexts"]
    text = "## Runs and their ceilings\n\n" + table(header, rows)
    checks = [
        [model, c["layers"], c["calls"], c["same_tokens"], c["worst_row_error"], _agreement(c)]
        for model, c in result["checks"].items()
    ]
    if checks:
        header = ["model", "layers", "calls", "with vanilla's tokens", "largest row error", "peers"]
        text += "\nα=1 with all rows active against vanilla, on a shallow model of the shape:\n\n"
        text += table(header, checks)
    return text + _composition(result.get("composition", []))


def _agreement(check: dict[str, Any]) -> str | None:
    """How far the peers' rows are from one another, in float32."""
    found = check.get("agreement", {}).items()
    return "; ".join(f"{pair}: {error:.1g}" for pair, error in found) or None


def _composition(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    rows = [
        [c["model"], c["context"], c["block"], c["arm"], c["composed_s"], c["whole_s"], share]
        for c in found
        for share in [f"{c['error']:+.2%}"]
    ]
    header = ["model", "context", "block", "arm", "composed s", "run whole s", "difference"]
    return "\nGenerations run whole, against the composed time:\n\n" + table(header, rows)
