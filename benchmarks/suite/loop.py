"""The decoding loop that every arm runs: one canvas, one schedule, one sampler.

A block of the response is decoded in a fixed number of calls; each call commits the masked
positions of the block whose predicted token is the most probable, `per_step` of them. Nothing here
waits for the device, and an arm hands over the logits of the current block only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.suite.ceilings import synchronize
from benchmarks.suite.shapes import Shape

__all__ = ["Arm", "Call", "Canvas", "Clock", "Ran", "commit", "counts_of_block", "decode_blocks"]


@dataclass
class Canvas:
    """Prompt and response of one sequence; `ids` int64 [1, prompt + generated] changes in place."""

    ids: Tensor
    prompt: int
    block_length: int
    mask_token_id: int

    @classmethod
    def random(
        cls,
        shape: Shape,
        context: int,
        generated: int,
        block_length: int,
        device: torch.device,
        seed: int,
        dynamic: bool = False,
    ) -> Canvas:
        """A random prompt of `context` tokens, then masks.

        dynamic: tell `torch.compile` that the length changes.
        """
        generator = torch.Generator().manual_seed(seed)
        length = context + generated
        ids = torch.randint(3, shape.mask_token_id, (1, length), generator=generator)
        ids[:, context:] = shape.mask_token_id
        ids = ids.to(device)
        if dynamic:
            torch._dynamo.maybe_mark_dynamic(ids, 1)
        return cls(ids, context, block_length, shape.mask_token_id)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def blocks(self) -> int:
        return (self.length - self.prompt) // self.block_length

    def block(self, index: int) -> slice:
        """Positions of a decode block."""
        start = self.prompt + index * self.block_length
        return slice(start, start + self.block_length)


@dataclass(frozen=True)
class Ran:
    """What an arm's last call was: "refresh" of all rows, "partial" of some, "step", "vanilla" or
    "exact"; rows computed and, for a partial refresh or a step, the rows that it was padded to and
    whether every layer read all keys."""

    program: str
    rows: int
    bucket: int
    compile_seconds: float = 0.0
    all_keys: bool = True


class Arm(Protocol):
    """One way to run the model."""

    letter: str
    ran: Ran

    def begin(self, canvas: Canvas) -> None:
        """A new sequence: drop what was cached of the last one."""
        ...

    def __call__(self, canvas: Canvas, block: slice) -> Tensor:
        """Logits of the current block, [block, vocabulary]."""
        ...

    def poison(self) -> None:
        """Overwrite what the last call handed out, which nobody may rely on any more."""
        ...

    def release(self) -> None:
        """Free everything but the model."""
        ...


@dataclass(frozen=True)
class Call:
    """One timed model call. ms: host time, from an idle device until it is idle again; device_ms:
    between events around the work, None on the CPU."""

    ran: Ran
    ms: float
    device_ms: float | None
    sampler_ms: float
    finite: bool

    @property
    def program(self) -> str:
        return self.ran.program


class Clock:
    """Times a piece of work until the device has finished it."""

    def __init__(self, device: torch.device):
        self.device = device

    def time(self, work: Callable[[], Any]) -> tuple[Any, float, float | None]:
        """(result, host milliseconds, device milliseconds or None)."""
        synchronize(self.device)
        if self.device.type != "cuda":
            started = time.perf_counter()
            result = work()
            return result, (time.perf_counter() - started) * 1e3, None
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = time.perf_counter()
        first.record()
        result = work()
        last.record()
        synchronize(self.device)
        return result, (time.perf_counter() - started) * 1e3, first.elapsed_time(last)


def counts_of_block(block_length: int, per_step: int) -> list[int]:
    """Tokens that each call of a block commits: `per_step`, spread evenly where it is no divisor.

    The same as `focus_compile.decode.generate` with that number of calls.
    """
    calls = math.ceil(block_length / per_step)
    least, rest = divmod(block_length, calls)
    return [least + (call < rest) for call in range(calls)]


def commit(canvas: Canvas, block: slice, logits: Tensor, count: int) -> Tensor:
    """Decode `count` positions of the block from logits [block, vocabulary].

    Returns whether all logits were finite, as a bool on the device.
    """
    scores = logits.float()
    if scores.data_ptr() == logits.data_ptr():
        scores = scores.clone()
    finite = scores.isfinite().all()
    scores[:, canvas.mask_token_id] = -math.inf
    probability, token = scores.softmax(-1).max(-1)
    ids = canvas.ids[0, block]
    masked = ids == canvas.mask_token_id
    order = torch.where(masked, probability, -1.0).argsort(descending=True, stable=True)[:count]
    ids.index_copy_(0, order, token[order])
    return finite


def decode_blocks(
    arm: Arm,
    canvas: Canvas,
    blocks: Iterable[int],
    counts: list[int],
    *,
    poison: bool = False,
    observe: Callable[[int, Tensor], None] | None = None,
    between: Callable[[], None] | None = None,
) -> list[Call]:
    """Decode these blocks of the canvas and time every call.

    poison: overwrite what each call handed out once it was read. observe(block index, logits) sees
    each call's block logits before the commit. between() runs after each block.
    """
    clock = Clock(canvas.ids.device)
    calls = []
    for index in blocks:
        block = canvas.block(index)
        for count in counts:
            logits, ms, device_ms = clock.time(lambda block=block: arm(canvas, block))
            if observe is not None:
                observe(index, logits)
            finite, sampler_ms, _ = clock.time(
                lambda block=block, logits=logits, count=count: commit(canvas, block, logits, count)
            )
            del logits
            if poison:
                arm.poison()
            calls.append(Call(arm.ran, ms, device_ms, sampler_ms, bool(finite)))
        if between is not None:
            between()
    return calls
