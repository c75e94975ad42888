"""One flat row of a results file from one measurement."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.suite.arms import ArmOptions
from benchmarks.suite.ceilings import Ceilings
from benchmarks.suite.cells import ARMS, Cell
from benchmarks.suite.checks import check_floor
from benchmarks.suite.floors import Floor, full_pass_floor, step_floor
from benchmarks.suite.loop import counts_of_block
from benchmarks.suite.measure import Measurement, spread
from benchmarks.suite.shapes import Shape

__all__ = ["RowMaker"]


@dataclass(frozen=True)
class RowMaker:
    """Everything beside the measurement that a row says."""

    suite: str
    run: str
    device: str
    shape: Shape
    ceilings: Ceilings
    options: ArmOptions
    generated: int
    width: int
    """Bytes of a weight."""

    def row(self, arm: str, cell: Cell, measured: Measurement, shared: bool) -> dict[str, Any]:
        """The row of an arm on a cell.

        shared: the times were taken on another cell, on which the arm does the same work.

        Raises:
            Refused: a time is below its floor.
        """
        blocks = self.generated // cell.block
        per_block = len(counts_of_block(cell.block, cell.per_step))
        step = spread(measured.steps) if measured.steps else {}
        row = self._head(arm, cell) | {
            "calls": blocks * per_block,
            "total_s": measured.total_s(blocks, per_block),
            "step_ms": step.get("ms"),
            "step_ms_p10": step.get("p10"),
            "step_ms_p90": step.get("p90"),
            "step_device_ms": step.get("device_ms"),
            "sampler_ms": measured.sampler_ms,
            "one_off_s": measured.one_off_s,
            "peak_gib": measured.peak_gib,
            "launches": measured.launches,
            "host_launches": measured.host_launches,
            "compile_s": measured.compile_s,
            "cold_refresh_s": measured.cold_refresh_s,
            "cold_steps_s": measured.cold_steps_s,
            "recompilations": measured.recompilations,
            "compile_in_calls_s": measured.compile_in_calls_s,
            "probe_tflop_s": measured.probe_tflop_s,
            "shared": shared,
        }
        row |= self._rows_of_steps(measured)
        row |= self._vanilla(cell, row) if arm in "ab" else self._cached(arm, cell, measured, row)
        return row

    def failed(self, arm: str, cell: Cell, error: str) -> dict[str, Any]:
        return self._head(arm, cell) | {"total_s": None, "error": error}

    def _head(self, arm: str, cell: Cell) -> dict[str, Any]:
        head = {"suite": self.suite, "run": self.run, "device": self.device}
        return head | cell.to_dict() | {"arm": arm, "name": ARMS[arm], "generated": self.generated}

    @staticmethod
    def _rows_of_steps(measured: Measurement) -> dict[str, Any]:
        if not measured.steps:
            return {"rows": None, "bucket": None, "padding": None, "all_keys": None}
        all_keys = all(call.ran.all_keys for call in measured.steps)
        rows = statistics.mean(call.ran.rows for call in measured.steps)
        bucket = statistics.mean(call.ran.bucket for call in measured.steps)
        return {"rows": rows, "bucket": bucket, "padding": bucket / rows, "all_keys": all_keys}

    def _vanilla(self, cell: Cell, row: dict[str, Any]) -> dict[str, Any]:
        floor = self._full(cell)
        check_floor(f"arm {row['arm']}, a call at {cell.context}", row["step_ms"], floor)
        return {
            "refreshes": 0,
            "refresh_ms": None,
            "floor_ms": floor.ms,
            "step_over_floor": row["step_ms"] / floor.ms,
            "step_tflop_s": floor.teraflops / row["step_ms"] * 1e3,
        }

    def _full(self, cell: Cell) -> Floor:
        length = cell.context + self.generated
        return full_pass_floor(self.shape, length, cell.block, self.ceilings, self.width)

    def _cached(
        self, arm: str, cell: Cell, measured: Measurement, row: dict[str, Any]
    ) -> dict[str, Any]:
        refresh, full = spread(measured.refreshes), self._full(cell)
        refresh_ms = measured.refresh_ms
        assert refresh_ms is not None
        partial = measured.of("partial")
        whole = spread(measured.of("refresh"))
        check_floor(f"arm {arm}, a refresh at {cell.context}", min_of(whole), full)
        found = {
            "refreshes": self.generated // cell.block,
            "refresh_ms": refresh_ms,
            "first_refresh_ms": measured.first_refresh_ms,
            "refresh_ms_p10": refresh["p10"],
            "refresh_ms_p90": refresh["p90"],
            "refresh_device_ms": refresh["device_ms"],
            "refresh_floor_ms": full.ms,
            "refresh_over_floor": None if partial else refresh_ms / full.ms,
            "refresh_tflop_s": None if partial else full.teraflops / refresh_ms * 1e3,
            "partial_rows": statistics.mean(c.ran.rows for c in partial) if partial else None,
        }
        if not measured.steps:
            return found | {"floor_ms": full.ms}
        settings = None if row["all_keys"] else self.options.settings(self.shape, cell.alpha)
        length = cell.context + self.generated
        floor = step_floor(
            self.shape, length, cell.context, row["rows"], settings, self.ceilings, self.width
        )
        check_floor(f"arm {arm}, a step at {cell.context}", row["step_ms"], floor)
        return found | {
            "floor_ms": floor.ms,
            "bytes_floor_ms": floor.bytes_ms,
            "step_gb": floor.gigabytes,
            "step_over_floor": row["step_ms"] / floor.ms,
            "step_tb_s": floor.gigabytes / row["step_ms"],
            "step_tflop_s": floor.teraflops / row["step_ms"] * 1e3,
        }


def min_of(times: dict[str, float | None]) -> float:
    return times["p10"] or 0.0
