"""Dense against focus on one model: what `focus-compile bench` measures.

Prompts are random ids, so that this says how fast calls are and nothing about answers. The dense
arm is `torch.compile(model)`, the focus arm `focus_compile.compile(model)`; both are called as a
decoding loop calls them, and with `lowering="eager"` both run op by op. After a generation of each
that compiles, rounds alternate: a few dense calls, which all do the same work, then a whole
generation with focus. What the sampler takes is left out of both.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import BLOCK_POLICIES, FocusConfig
from focus_compile.decode.sampler import count_blocks, generate
from focus_compile.demo import environment
from focus_compile.errors import OptionError
from focus_compile.frontend import compile as focus_compiled
from focus_compile.model_files import LoadedModel
from focus_compile.passes.block_causality import block_causal_mask
from focus_compile.runtime.record import record

__all__ = [
    "DENSE_CALLS",
    "BenchCell",
    "BenchResult",
    "BenchSettings",
    "Call",
    "TimedModel",
    "phases",
    "run",
]

GIB = 1 << 30
DENSE_CALLS = 2
"""Dense calls in a round, for each length that calls have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """What to measure. `options` of FocusConfig name the mask token."""

    options: dict[str, Any]
    lengths: tuple[int, ...] = (1024,)
    """Tokens of prompt and response together."""
    gen_length: int = 64
    tokens_per_call: int = 1
    rounds: int = 3
    seed: int = 0

    def check(self) -> FocusConfig:
        """The options in force.

        Raises:
            OptionError: an option is out of range, or no prompt fits a length.
        """
        config = FocusConfig.from_options(self.options)
        blocks = count_blocks(self.gen_length, config.block_length)
        if config.mask_token_id is None:
            raise OptionError("bench: the options name no mask_token_id")
        if (self.gen_length // blocks) % self.tokens_per_call:
            raise OptionError.invalid(
                "tokens_per_call", self.tokens_per_call, "a divisor of the block length"
            )
        for length in self.lengths:
            if length <= self.gen_length:
                expected = f"more than gen_length={self.gen_length}, so that there is a prompt"
                raise OptionError.invalid("length", length, expected)
            if config.policy in BLOCK_POLICIES and length % config.block_length:
                expected = f"a multiple of block_length={config.block_length}"
                raise OptionError.invalid("length", length, expected)
        return config


@dataclass(frozen=True, slots=True)
class Call:
    """One timed call. milliseconds: until the device is done, without compilation."""

    program: str
    milliseconds: float
    compile_seconds: float
    rows: int
    why: str


@dataclass(frozen=True, slots=True)
class BenchCell:
    """Both arms at one length. Milliseconds are medians, ratios dense by focus."""

    length: int
    dense_ms: float
    """A call of the full length."""
    refresh_ms: float | None
    """None where no refresh was run."""
    step_ms: float | None
    rows_per_step: float | None
    dense_seconds: float
    """All calls of a generation; composed of its calls, of which only some were run."""
    focus_seconds: float
    ratios: tuple[float, ...]
    """Of a generation, by round."""
    dense_compile_seconds: float
    focus_compile_seconds: float
    dense_peak_gib: float | None
    """Of the device's memory, weights included; None on the CPU."""
    focus_peak_gib: float | None
    exact_because: tuple[str, ...] = ()
    """Reasons why calls with focus ran the model itself."""
    calls: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Milliseconds of every timed call, by program."""

    @property
    def ratio(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.ratios)

    @property
    def loses(self) -> bool:
        """Whether focus was not faster."""
        return self.ratio <= 1

    @property
    def pays_after(self) -> int | None:
        """Generations after which the longer compilation is made up for; None: never."""
        gained = self.dense_seconds - self.focus_seconds
        if gained <= 0:
            return None
        return max(0, math.ceil((self.focus_compile_seconds - self.dense_compile_seconds) / gained))

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        verdict = {"ratio": self.ratio, "loses": self.loses, "pays_after": self.pays_after}
        return asdict(self) | verdict


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All lengths measured so far, and on what."""

    cells: tuple[BenchCell, ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"cells": [cell.to_dict() for cell in self.cells], "settings": self.settings}


def phases(settings: BenchSettings) -> int:
    """How often `advance` is called in a run."""
    return len(settings.lengths) * (2 + 2 * settings.rounds)


def run(
    loaded: LoadedModel,
    settings: BenchSettings,
    advance: Callable[[str], object] = lambda phase: None,
) -> Iterator[BenchResult]:
    """Measure one length after another; after each, the result so far.

    loaded: the model, not compiled. advance: called with its name at the end of each of the
    `phases`.

    Raises:
        FocusError: settings out of range, or under `strict` a refusal.
    """
    config = settings.check()
    cells: list[BenchCell] = []
    known = asdict(settings) | loaded.description | environment.describe()
    for length in settings.lengths:
        cells.append(_Cell(loaded, settings, config, length, advance).measure())
        yield BenchResult(tuple(cells), known)


class TimedModel:
    """Calls an arm's compiled model as a loop does, and times each call.

    With block policies the ids up to the end of the current block are passed, and a block-causal
    mask; else all ids.
    """

    def __init__(self, model: Any, config: FocusConfig) -> None:
        self.calls: list[Call] = []
        self._model, self._mask = model, config.mask_token_id or 0
        self._block = config.block_length if config.policy in BLOCK_POLICIES else None

    def __call__(self, ids: Tensor) -> Any:
        length = ids.shape[1]
        if self._block is None:
            return self._timed(ids)
        undecided = int(ids[0].eq(self._mask).int().argmax())
        end = (undecided // self._block + 1) * self._block
        mask = block_causal_mask(end, self._block, ids.device)
        logits = self._timed(ids[:, :end].contiguous(), attention_mask=mask).logits
        return SimpleNamespace(
            logits=torch.nn.functional.pad(logits, (0, 0, 0, length - logits.shape[1]))
        )

    def _timed(self, *inputs: Tensor, **named: Tensor) -> Any:
        device = inputs[0].device
        _synchronize(device)
        begun = time.perf_counter()
        with torch.no_grad(), record() as history:
            output = self._model(*inputs, **named)
        _synchronize(device)
        seconds = time.perf_counter() - begun
        compiling = sum(call.compile_seconds for call in history)
        last = history[-1] if history else None
        self.calls.append(
            Call(
                program=last.program if last else "dense",
                milliseconds=max(0.0, seconds - compiling) * 1e3,
                compile_seconds=compiling,
                rows=sum(call.rows for call in history) if last else inputs[0].numel(),
                why=last.why if last else "",
            )
        )
        return output

    def take(self) -> list[Call]:
        """The calls since the last time, in order."""
        calls, self.calls = self.calls, []
        return calls


class _Cell:
    """Both arms of one length."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: BenchSettings,
        config: FocusConfig,
        length: int,
        advance: Callable[[str], object],
    ) -> None:
        torch.compiler.reset()
        self.settings, self.config, self.length = settings, config, length
        self.loaded, self.advance = loaded, advance
        self.device: torch.device = loaded.model.device
        self.dense = TimedModel(torch.compile(loaded.model, backend=config.lowering), config)
        self.focus = TimedModel(focus_compiled(loaded.model, **settings.options), config)
        self.blocks = count_blocks(settings.gen_length, config.block_length)
        self.calls_per_block = settings.gen_length // self.blocks // settings.tokens_per_call

    def measure(self) -> BenchCell:
        """Compile both, then alternate."""
        _, cold_dense_s = _clocked(functools.partial(self._dense_round, 0))
        self.advance(f"{self.length} tokens: dense compiled")
        self._reset_peak()
        _, warm_dense_s = _clocked(functools.partial(self._dense_round, 0))
        dense_peak = self._peak()
        _, cold_focus_s = _clocked(functools.partial(self._focus_round, 0))
        self.advance(f"{self.length} tokens: focus compiled")
        self._reset_peak()
        rounds: list[tuple[list[list[Call]], list[Call], float]] = []
        for number in range(1, self.settings.rounds + 1):
            dense = self._dense_round(number)
            self.advance(f"{self.length} tokens: dense, round {number}")
            focus, seconds = _clocked(functools.partial(self._focus_round, number))
            self.advance(f"{self.length} tokens: focus, round {number}")
            rounds.append((dense, focus, seconds))
        return self._cell(
            rounds,
            dense_compile=max(0.0, cold_dense_s - warm_dense_s),
            focus_compile=max(0.0, cold_focus_s - statistics.median(s for *_, s in rounds)),
            dense_peak=dense_peak,
            focus_peak=self._peak(),
        )

    def _cell(
        self,
        rounds: list[tuple[list[list[Call]], list[Call], float]],
        *,
        dense_compile: float,
        focus_compile: float,
        dense_peak: float | None,
        focus_peak: float | None,
    ) -> BenchCell:
        focus_calls = [call for _, calls, _ in rounds for call in calls]
        dense_calls = [call for states, _, _ in rounds for call in states[-1]]
        dense_seconds = [self._composed(states) for states, _, _ in rounds]
        focus_seconds = [sum(c.milliseconds for c in calls) / 1e3 for _, calls, _ in rounds]
        steps = [call for call in focus_calls if call.program == "step"]
        programs = dict.fromkeys(call.program for call in focus_calls)
        return BenchCell(
            length=self.length,
            dense_ms=statistics.median(call.milliseconds for call in dense_calls),
            refresh_ms=_median_ms(focus_calls, "refresh"),
            step_ms=_median_ms(focus_calls, "step"),
            rows_per_step=statistics.mean(call.rows for call in steps) if steps else None,
            dense_seconds=statistics.median(dense_seconds),
            focus_seconds=statistics.median(focus_seconds),
            ratios=tuple(d / f for d, f in zip(dense_seconds, focus_seconds, strict=True)),
            dense_compile_seconds=dense_compile,
            focus_compile_seconds=focus_compile,
            dense_peak_gib=dense_peak,
            focus_peak_gib=focus_peak,
            exact_because=tuple(
                dict.fromkeys(call.why for call in focus_calls if call.program == "exact")
            ),
            calls={"dense": tuple(call.milliseconds for call in dense_calls)}
            | {
                name: tuple(c.milliseconds for c in focus_calls if c.program == name)
                for name in programs
            },
        )

    def _composed(self, states: list[list[Call]]) -> float:
        """Seconds of all calls of a generation from some calls of each length."""
        usual = [statistics.median(call.milliseconds for call in calls) for calls in states]
        return sum(usual) / len(usual) * self.blocks * self.calls_per_block / 1e3

    def _dense_round(self, number: int) -> list[list[Call]]:
        """`DENSE_CALLS` calls of each length that calls of a generation have."""
        whole = self._ids(number, self.settings.gen_length)
        first = self.length - self.settings.gen_length
        starts = [first]
        if self.config.policy in BLOCK_POLICIES:
            starts = list(range(first, self.length, self.config.block_length))
        decoded = self._ids(number, 0)
        found = []
        for start in starts:
            ids = torch.cat([decoded[:, :start], whole[:, start:]], 1)
            for _ in range(DENSE_CALLS):
                self.dense(ids)
            found.append(self.dense.take())
        return found

    def _focus_round(self, number: int) -> list[Call]:
        """All calls of one generation."""
        generate(
            self.focus,
            self._ids(number, 0)[:, : self.length - self.settings.gen_length],
            gen_length=self.settings.gen_length,
            steps=self.blocks * self.calls_per_block,
            block_length=self.config.block_length,
            mask_token_id=self.config.mask_token_id,
        )
        return self.focus.take()

    def _ids(self, number: int, masked: int) -> Tensor:
        """Random ids, new in each round, of which the last `masked` are masks."""
        seed = self.settings.seed * 1009 + number
        return self.loaded.random_ids(self.length, masked, self.config.mask_token_id, seed)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / GIB


def _clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds it took."""
    begun = time.perf_counter()
    return work(), time.perf_counter() - begun


def _median_ms(calls: list[Call], program: str) -> float | None:
    times = [call.milliseconds for call in calls if call.program == program]
    return statistics.median(times) if times else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
