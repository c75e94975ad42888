"""A run: models, groups of cells and arms, in order of importance, written down as they end."""

from __future__ import annotations

import gc
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.suite import results
from benchmarks.suite.arms import POLICIES, ArmOptions, make_arm
from benchmarks.suite.ceilings import Ceilings
from benchmarks.suite.cells import Cell, Group, groups_of, key_of
from benchmarks.suite.checks import (
    Refused,
    check_everything_active,
    check_measurement,
    peers_agreement,
)
from benchmarks.suite.loop import Arm
from benchmarks.suite.measure import GIB, Bench, Measurement
from benchmarks.suite.rows import RowMaker
from benchmarks.suite.shapes import SHAPES, Shape, build
from focus_compile.runtime.store import STORE

__all__ = ["Runner", "Workload"]

ORDER = "bghiadcef"
"""The arms that matter most first."""
COMPOSITION_CONTEXT = 8192
COMPOSITION_ERROR = 0.02
console = Console(width=150)


@dataclass
class Workload:
    """What the command line asked for."""

    suite: str
    models: list[str]
    contexts: list[int]
    blocks: list[int]
    per_step: list[int]
    alphas: list[float]
    arms: dict[str, int | None]
    """By letter, with the only block length of one or None."""
    generated: int
    rounds: int
    count_launches: bool
    verify_composition: bool
    check_peers: bool


@dataclass
class Runner:
    """One run on one device, writing into one results file."""

    device: torch.device
    work: Workload
    options: ArmOptions
    file: Path
    deadline: float
    result: dict[str, Any]
    run: str
    ceilings: Ceilings
    failed: bool = False
    measured: dict[tuple[Any, ...], Measurement | str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def model(self, name: str) -> None:
        """Check and measure one model; drop its rows of this run if a check is red."""
        self.result["refused"].pop(name, None)
        try:
            shape = SHAPES[name]
            self._check(shape)
            self._measure(shape)
        except Refused as refusal:
            self.failed = True
            self.result["refused"][name] = str(refusal)
            self.result["rows"] = [
                row for row in self.result["rows"] if (row["model"], row["run"]) != (name, self.run)
            ]
            console.print(f"[red]refused to report {name}:[/red] {refusal}")
        self.write()

    def write(self) -> None:
        mine = [row for row in self.result["rows"] if row["run"] == self.run]
        results.add_break_even(mine, self.work.generated)
        results.write(self.file, self.result)

    def _check(self, shape: Shape) -> None:
        if shape.name in self.result["checks"] or "g" not in self.work.arms:
            return
        started = time.perf_counter()
        options = self.options.compiled(shape)
        del options["mask_token_id"], options["strict"]
        block = min(self.work.blocks)
        try:
            found = check_everything_active(shape, self.device, self.dtype, block, **options)
        except Refused:
            raise
        except Exception as error:  # whatever it is, nothing may be reported
            console.print_exception(max_frames=4)
            raise Refused(f"alpha=1 with all rows active: {failure(error)}") from None
        found["source"] = self.result["environment"]["source"]
        if self.work.check_peers:
            found["agreement"] = peers_agreement(shape, self.device, block, self.options)
        found["seconds"] = time.perf_counter() - started
        self.result["checks"][shape.name] = found
        console.print(f"{shape.name}: alpha=1 with all rows active: {found}")
        free()
        self.write()

    def _measure(self, shape: Shape) -> None:
        model = build(shape, self.device, self.dtype)
        weights = sum(w.numel() * w.element_size() for w in model.parameters())
        bench = Bench(
            shape,
            self.device,
            self.work.generated,
            rounds=self.work.rounds,
            count_launches=self.work.count_launches,
            least_per_step=min(self.work.per_step),
            dynamic=self.options.dynamic,
            weights_bytes=weights,
        )
        maker = RowMaker(
            self.work.suite,
            self.run,
            self.result["environment"]["device"],
            shape,
            self.ceilings,
            self.options,
            self.work.generated,
            width=torch.finfo(self.dtype).bits // 8,
        )
        work = self.work
        groups = groups_of(
            shape.name,
            work.contexts,
            work.blocks,
            work.per_step,
            work.alphas,
            self.options.dynamic,
        )
        try:
            contexts: tuple[int, ...] = ()
            for group in groups:
                if group.contexts != contexts:
                    free()
                    contexts = group.contexts
                    vanilla = make_arm("b", model, shape, group.cells[0], self.options)
                GroupRun(self, bench, maker, model, group, vanilla).run()
                if self.out_of_time():
                    return
        finally:
            del model
            free()

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, row: dict[str, Any]) -> None:
        rows = self.result["rows"]
        same = (row["run"], results.key(row))
        rows[:] = [r for r in rows if (r["run"], results.key(r)) != same]
        rows.append(row)
        self.write()
        show(row)


@dataclass
class GroupRun:
    """The arms on a group of cells that share compiled programs."""

    runner: Runner
    bench: Bench
    maker: RowMaker
    model: Any
    group: Group
    compiled_vanilla: Arm

    def run(self) -> None:
        arms = self.runner.work.arms
        chosen = [a for a in ORDER if a in arms and arms[a] in (None, self.group.block)]
        for letter in chosen:
            self._arm(letter)
            if self.runner.out_of_time():
                console.print("the budget is used up; the rest is for another run")
                return

    def _arm(self, letter: str) -> None:
        arm: Arm | None = None
        first: Measurement | None = None
        for cell in self.group.cells:
            key = key_of(letter, cell)
            shared = key in self.runner.measured
            if not shared:
                arm = arm or self._make(letter, cell)
                self.runner.measured[key] = self._measure(letter, arm, cell)
                first = self._with_compilation(first, self.runner.measured[key])
            self._report(letter, cell, self.runner.measured[key], shared)
            if self.runner.out_of_time():
                break
            if arm is not None and len(self.group.contexts) > 1:
                arm.release()
        if arm is not None:
            arm.release()
            del arm
            drop(self.bench.weights_bytes)

    @staticmethod
    def _with_compilation(
        first: Measurement | None, measured: Measurement | str
    ) -> Measurement | None:
        """Later cells of a group use what the first compiled, so its seconds are theirs too."""
        if isinstance(measured, str):
            return first
        if first is None:
            return measured
        measured.compile_s += first.compile_s
        return first

    def _make(self, letter: str, cell: Cell) -> Arm:
        if letter == "b":
            return self.compiled_vanilla
        return make_arm(letter, self.model, self.maker.shape, cell, self.runner.options)

    def _measure(self, letter: str, arm: Arm, cell: Cell) -> Measurement | str:
        """The measurement, or why there is none: an arm that fails does not stop the others."""
        try:
            measured = self._timed(letter, arm, cell)
            check_measurement(letter, measured)
            if self._whole_is_due(letter, cell):
                self._compare_with_whole(letter, arm, cell, measured)
            return measured
        except Refused:
            raise
        except Exception as error:  # an arm that fails is a row; the others go on
            if letter in POLICIES:
                console.print_exception(max_frames=4)
                self.runner.failed = True
            return failure(error)

    def _timed(self, letter: str, arm: Arm, cell: Cell) -> Measurement:
        if letter in "ab":
            return self.bench.vanilla(arm, cell)
        return self.bench.incremental(arm, cell, self._between(letter, cell))

    def _between(self, letter: str, cell: Cell) -> Any:
        """A call of (b) after each block of the first (g) of a context, so that the headline's two
        arms alternate."""
        vanilla = self.runner.measured.get(key_of("b", cell))
        if letter != "g" or not isinstance(vanilla, Measurement):
            return None
        if len(vanilla.calls) > self.bench.rounds:
            return None
        canvas = self.bench.canvas(cell)

        def call() -> None:
            self.compiled_vanilla.begin(canvas)
            vanilla.calls += self.bench.timed_calls(self.compiled_vanilla, canvas, 1)

        return lambda: self.bench.aside(call)

    def _report(self, letter: str, cell: Cell, measured: Measurement | str, shared: bool) -> None:
        if isinstance(measured, str):
            self.runner.add(self.maker.failed(letter, cell, measured))
            return
        self.runner.add(self.maker.row(letter, cell, measured, shared))
        vanilla = self.runner.measured.get(key_of("b", cell))
        if letter == "g" and isinstance(vanilla, Measurement):  # it was called in between
            self.runner.add(self.maker.row("b", cell, vanilla, False))

    def _whole_is_due(self, letter: str, cell: Cell) -> bool:
        if not self.runner.work.verify_composition or letter not in "bg":
            return False
        return cell.per_step == 1 and cell.context <= COMPOSITION_CONTEXT

    def _compare_with_whole(self, letter: str, arm: Arm, cell: Cell, measured: Measurement) -> None:
        composed = measured.total_s(self.bench.generated // cell.block, cell.block)
        whole = self.bench.whole_generation(arm, cell)
        found = cell.to_dict() | {
            "arm": letter,
            "run": self.runner.run,
            "composed_s": composed,
            "whole_s": whole,
            "error": composed / whole - 1,
        }
        self.runner.result.setdefault("composition", []).append(found)
        console.print(f"composition: {found}")
        if abs(found["error"]) > COMPOSITION_ERROR:
            raise Refused(
                f"arm {letter} at {cell.context}: composed {composed:.3f} s, whole {whole:.3f} s, "
                f"more than {COMPOSITION_ERROR:.0%} apart"
            )


def drop(weights: int, tolerated_gib: float = 2.0) -> None:
    """Free what an arm held; if its programs still hold much of it, free them too."""
    STORE.clear()
    gc.collect()
    if not torch.cuda.is_available():
        return
    torch.cuda.empty_cache()
    if torch.cuda.memory_allocated() - weights > tolerated_gib * GIB:
        free()


def free() -> None:
    """Drop all compiled programs."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(row: dict[str, Any]) -> None:
    cell = " ".join(str(row[name]) for name in ("model", "context", "block", "per_step", "alpha"))
    if row.get("error"):
        console.print(f"{cell} [bold]{row['arm']}[/bold] failed: {row['error'][:300]}")
        return
    numbers = {
        name: row[name]
        for name in (
            "total_s",
            "refresh_ms",
            "step_ms",
            "step_over_floor",
            "rows",
            "launches",
            "peak_gib",
            "compile_s",
        )
        if row.get(name) is not None
    }
    text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    console.print(f"{cell} [bold]{row['arm']}[/bold]  {text}", highlight=False)


def failure(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip()[:500]
