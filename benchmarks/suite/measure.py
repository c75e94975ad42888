"""Measures one arm on one cell: cold, then timed calls, then the kernels of one step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.suite.ceilings import gemm_tflop_s, synchronize
from benchmarks.suite.cells import BEYOND, Cell
from benchmarks.suite.loop import (
    Arm,
    Call,
    Canvas,
    commit,
    counts_of_block,
    decode_blocks,
)

__all__ = ["Bench", "Measurement", "spread"]

GIB = 1 << 30
ONE_OFF = 1.5


@dataclass
class Measurement:
    """What one arm took. `cold` and `calls` are in order; vanilla has no refreshes or steps."""

    cold: list[Call]
    calls: list[Call]
    blocks: int
    compile_s: float = 0.0
    cold_refresh_s: float = 0.0
    cold_steps_s: float = 0.0
    compile_in_calls_s: float = 0.0
    recompilations: int = 0
    peak_gib: float | None = None
    launches: int | None = None
    host_launches: int | None = None
    probe_tflop_s: list[float] = field(default_factory=list)

    def of(self, program: str) -> list[Call]:
        return [call for call in self.calls if call.program == program]

    @property
    def refreshes(self) -> list[Call]:
        """At block entries, of all rows or of some."""
        return [call for call in self.calls if call.program in ("refresh", "partial")]

    @property
    def steps(self) -> list[Call]:
        return self.of("step") or self.of("vanilla")

    @property
    def sampler_ms(self) -> float:
        return statistics.median(call.sampler_ms for call in self.calls)

    @property
    def step_ms(self) -> float:
        """Median of the steps, or of vanilla's calls; 0 where a block is a single call."""
        return statistics.median([call.ms for call in self.steps] or [0.0])

    @property
    def first_refresh_ms(self) -> float | None:
        """The refresh that begins a sequence: it also takes its memory."""
        return self.refreshes[0].ms if self.refreshes else None

    @property
    def refresh_ms(self) -> float | None:
        """Median of the later refreshes, or the first where there is no other."""
        times = [call.ms for call in self.refreshes]
        return statistics.median(times[1:] or times) if times else None

    @property
    def usual_step_ms(self) -> float:
        """Mean of the steps that are not one-offs: kinds of steps that alternate all count."""
        usual = [call.ms for call in self.steps if call.ms <= ONE_OFF * self.step_ms]
        return statistics.mean(usual or [0.0])

    @property
    def one_off_s(self) -> float:
        """What a new sequence takes once, such as captures of its row counts: steps of more than
        half as long again as the median, beyond what is usual."""
        excess = (
            call.ms - self.usual_step_ms for call in self.steps if call.ms > ONE_OFF * self.step_ms
        )
        return sum(excess) / 1e3 if self.refreshes else 0.0

    def total_s(self, blocks: int, calls_per_block: int) -> float:
        """Composed time of a generation: the refreshes, the other calls as steps, the sampler, and
        what the sequence took once."""
        calls = blocks * calls_per_block
        if self.refresh_ms is None or self.first_refresh_ms is None:
            return calls * (self.usual_step_ms + self.sampler_ms) / 1e3
        refreshes = self.first_refresh_ms + (blocks - 1) * self.refresh_ms
        steps = (calls - blocks) * self.usual_step_ms
        return (refreshes + steps + calls * self.sampler_ms) / 1e3 + self.one_off_s


def spread(calls: list[Call]) -> dict[str, float | None]:
    """Median, tenth and ninetieth percentile of the host times, and the median device time."""
    times = sorted(call.ms for call in calls)
    devices = [call.device_ms for call in calls if call.device_ms is not None]
    at = len(times) - 1
    return {
        "ms": statistics.median(times),
        "p10": times[round(0.1 * at)],
        "p90": times[round(0.9 * at)],
        "device_ms": statistics.median(devices) if devices else None,
    }


@dataclass
class Bench:
    """Measures arms of one model on one device. Canvases get new prompts, hence new sequences."""

    shape: Any
    device: torch.device
    generated: int
    rounds: int = 3
    count_launches: bool = True
    """By the profiler; for the first tokens per step of a cell, as the kernels are the same."""
    least_per_step: int = 1
    dynamic: bool = False
    weights_bytes: int = 0
    seed: int = 0
    _peak_seen: int = 0

    def canvas(self, cell: Cell) -> Canvas:
        self.seed += 1
        return Canvas.random(
            self.shape,
            cell.context,
            self.generated,
            cell.block,
            self.device,
            self.seed,
            self.dynamic,
        )

    def vanilla(self, arm: Arm, cell: Cell) -> Measurement:
        """Cold calls and as many timed ones as rounds; every call does the same work."""
        held = self._held()
        canvas = self.canvas(cell)
        arm.begin(canvas)
        cold = self.timed_calls(arm, canvas, 2)
        self._reset_peak()
        result = Measurement(cold, [], canvas.blocks, probe_tflop_s=[self.probe()])
        before = _graphs()
        result.calls = self.timed_calls(arm, canvas, self.rounds)
        result.recompilations = _graphs() - before
        result.compile_s = max(0.0, (cold[0].ms - result.step_ms) / 1e3)
        result.probe_tflop_s.append(self.probe())
        result.peak_gib = self._peak(held)
        if self._counts(cell):
            result.launches, result.host_launches = self.launches(arm, canvas, canvas.block(0))
        return result

    def timed_calls(self, arm: Arm, canvas: Canvas, count: int) -> list[Call]:
        """Calls of the first block, one position committed each."""
        return decode_blocks(arm, canvas, [0], [1] * count)

    def incremental(
        self, arm: Arm, cell: Cell, between: Callable[[], None] | None = None
    ) -> Measurement:
        """A cold block with poisoned outputs, two where a later entry runs another program, then
        `rounds` blocks of a new sequence."""
        counts = counts_of_block(cell.block, cell.per_step)
        held = self._held()
        poison_free_memory(self.device)
        canvas = self.canvas(cell)
        arm.begin(canvas)
        entries = [0, 1] if arm.letter in BEYOND else [0]
        cold = decode_blocks(arm, canvas, entries[: canvas.blocks], counts, poison=True)
        self._reset_peak()
        canvas = self.canvas(cell)
        arm.begin(canvas)
        blocks = min(self.rounds, canvas.blocks)
        result = Measurement(cold, [], blocks, probe_tflop_s=[self.probe()])
        before = _graphs()
        result.calls = decode_blocks(arm, canvas, range(blocks), counts, between=between)
        result.recompilations = _graphs() - before
        result.compile_in_calls_s = sum(call.ran.compile_seconds for call in result.calls)
        result.probe_tflop_s.append(self.probe())
        result.peak_gib = self._peak(held)
        _split_cold(result)
        if self._counts(cell) and len(counts) > 1:
            result.launches, result.host_launches = self._step_launches(
                arm, cell, canvas, blocks, counts
            )
        return result

    def whole_generation(self, arm: Arm, cell: Cell) -> float:
        """Seconds of one generation without a stop between calls, its sampler included."""
        counts = counts_of_block(cell.block, cell.per_step)
        canvas = self.canvas(cell)
        arm.begin(canvas)
        synchronize(self.device)
        started = time.perf_counter()
        for index in range(canvas.blocks):
            block = canvas.block(index)
            for count in counts:
                commit(canvas, block, arm(canvas, block), count)
        synchronize(self.device)
        return time.perf_counter() - started

    def _step_launches(
        self, arm: Arm, cell: Cell, canvas: Canvas, blocks: int, counts: list[int]
    ) -> tuple[int | None, int | None]:
        """Of the second step of a block: of the next one, or of a new sequence's first."""
        if blocks >= canvas.blocks:
            canvas, blocks = self.canvas(cell), 0
            arm.begin(canvas)
        decode_blocks(arm, canvas, [blocks], counts[: min(2, len(counts) - 1)])
        return self.launches(arm, canvas, canvas.block(blocks))

    def launches(self, arm: Arm, canvas: Canvas, block: slice) -> tuple[int | None, int | None]:
        """(kernels that ran on the device, launches by the host) of one call; None on the CPU."""
        if self.device.type != "cuda":
            return None, None
        from torch._C._autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            arm(canvas, block)
            synchronize(self.device)
        events = list(seen.events() or [])
        kernels = [e for e in events if e.device_type == DeviceType.CUDA]
        copies = ("Memcpy", "Memset", "##", "Torch-Compiled")  # the last two are annotations
        launched = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
        return (
            sum(not e.name.startswith(copies) for e in kernels),
            sum(e.name.startswith(launched) for e in events if e.device_type == DeviceType.CPU),
        )

    def _counts(self, cell: Cell) -> bool:
        return self.count_launches and cell.per_step == self.least_per_step

    def probe(self) -> float:
        return gemm_tflop_s(self.device)

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def aside(self, work: Callable[[], None]) -> None:
        """Run something whose memory is not that of the arm being measured."""
        if self.device.type == "cuda":
            self._peak_seen = max(self._peak_seen, torch.cuda.max_memory_allocated())
        work()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _reset_peak(self) -> None:
        self._peak_seen = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self, held: int) -> float | None:
        """Peak of the model with this arm alone: what was held before it is not its own."""
        if self.device.type != "cuda":
            return None
        peak = max(self._peak_seen, torch.cuda.max_memory_allocated())
        return (peak - held + self.weights_bytes) / GIB


def _split_cold(result: Measurement) -> None:
    """What the cold block took beyond a warm one: the first call, and the steps after it."""
    warm = {"refresh": result.first_refresh_ms or 0.0, "partial": result.refresh_ms or 0.0}
    for call in result.cold:
        beyond = max(0.0, call.ms - warm.get(call.program, result.step_ms)) / 1e3
        if call.program in warm:
            result.cold_refresh_s += beyond
        else:
            result.cold_steps_s += beyond
    result.compile_s = result.cold_refresh_s + result.cold_steps_s


def poison_free_memory(device: torch.device, gib: float = 8.0) -> None:
    """Fill memory that the allocator will hand out with NaN, so that a row that nobody wrote
    shows."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info()
    size = min(int(gib * GIB), free // 4)
    torch.full((size // 2,), float("nan"), dtype=torch.bfloat16, device=device)


def _graphs() -> int:
    """Graphs that Dynamo has compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
