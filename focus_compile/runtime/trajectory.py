"""A trajectory: a run of calls that continue one another, and all the state it needs."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.guard import CallInputs
from focus_compile.runtime.latest_rows import LatestRows

__all__ = ["NO_TOKEN", "Blocks", "OwnedTrajectory", "SeenWeights", "Trajectory", "current_stream"]


NO_TOKEN = -1
"""No id that a caller passes."""


@dataclass(frozen=True)
class Blocks:
    """Decode blocks of each sequence: counted from its first mask in the first call.

    response_start int64 [batch]: that position, or the length where there is none. Masks before it
    are of no block.
    """

    response_start: Tensor
    block_length: int

    @classmethod
    def of(cls, masked: Tensor, block_length: int) -> Blocks:
        return cls(first_true(masked), block_length)

    def current(self, masked: Tensor) -> Tensor:
        """Index of the block that holds the first mask, int64 [batch]; -1 where none is left."""
        first = first_true(masked & self.in_response(masked))
        block = (first - self.response_start) // self.block_length
        return torch.where(first < masked.shape[1], block, -1)

    def in_response(self, like: Tensor) -> Tensor:
        """Which positions of [batch, length] are at or after the response's start, bool."""
        positions = torch.arange(like.shape[1], device=like.device)
        return positions >= self.response_start[:, None]

    def of_guided(self, ids: Tensor, masked: Tensor) -> Blocks:
        """The same, but a sequence that is its like in the other half of the batch with more of it
        masked, as the unconditional half of classifier-free guidance is, has that one's blocks."""
        batch = ids.shape[0]
        if batch % 2:
            return self
        other = ids.roll(batch // 2, 0)
        alike = (masked | (ids == other)).all(1)
        starts = self.response_start.roll(batch // 2, 0)
        guided = alike & (starts > self.response_start)
        return Blocks(torch.where(guided, starts, self.response_start), self.block_length)

    def start_of(self, block: Tensor) -> Tensor:
        """First position of a block, int64 [batch]."""
        return self.response_start + block * self.block_length


def first_true(flags: Tensor) -> Tensor:
    """First True of each row of a bool [batch, length], or the length where there is none."""
    length = flags.shape[1]
    return torch.where(flags, torch.arange(length, device=flags.device), length).amin(1)


class SeenWeights:
    """What the weights were: each tensor, its memory and its version, without keeping any alive.

    An id or address alone may be reused by a new tensor once the old one is freed. A write through
    `.data` shows in none of these; call `torch.compiler.reset()` after one.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._tensors = [weakref.ref(w) for w in weights]
        self._storages = [StorageWeakRef(w.untyped_storage()) for w in weights]
        self._versions = [w._version for w in weights]
        self.addresses = [w.data_ptr() for w in weights]

    def are(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors over the same memory, and nobody wrote into it.

        Part of every call: one pass in C for each property.
        """
        return (
            len(weights) == len(self._versions)
            and all(map(operator.is_, [tensor() for tensor in self._tensors], weights))
            and [w._version for w in weights] == self._versions
            and [w.data_ptr() for w in weights] == self.addresses
            and not any(map(torch.UntypedStorage._expired, [s.cdata for s in self._storages]))
        )


@dataclass(eq=False)
class OwnedTrajectory:
    """What every trajectory is bound to: a compiled graph, its weights, a stream and a thread."""

    owner: object
    weights: SeenWeights
    stream: int
    thread: weakref.ref[threading.Thread] = field(
        default_factory=lambda: weakref.ref(threading.current_thread()), kw_only=True
    )

    def belongs_to_another_thread(self) -> bool:
        """True while the thread that started the trajectory lives and is not the caller's."""
        thread = self.thread()
        return thread is not None and thread.is_alive() and thread is not threading.current_thread()

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class Trajectory(OwnedTrajectory):
    """State of one run of calls. All tensors are private to it.

    A new trajectory of the same sizes takes the tensors of the old one, so that what was captured
    over their addresses stays valid.

    incoming, ids [batch, length] in the caller's dtype, which the programs were compiled for: of
    the call at hand, and of the last call that continued; other: until some call continued, of the
    last call of the trajectory that this one replaced, else no ids at all. guarded, numbers: the
    other inputs. same_inputs: bool, whether the call's guarded inputs are these. candidates, keep
    int64 [batch]: key blocks of the prompt, and those a sparse layer keeps. caches: the programs'
    state tensors in `cache_names` order. merged: copies of weights that a step reads as one, of
    when the trajectory began. confidence fp32, best int64 [batch, length]: highest probability of
    each row's latest logits, and the token that has it. active, focus bool [batch, length]: rows of
    the call at hand; foreseen: the positions that the focus rows score; predicted: those of the
    last step, none after a refresh. scored, scored_before int64 [3]: of the positions decided so
    far, those decided as their own row had it, as the row before had it, and all; with the call at
    hand, and without. refreshed_at int64 [batch]: current block at the last refresh. rows int64
    [batch, length - first_row]: what a refresh returns. age int64, received fp32 [batch, length],
    of each prompt row: block entries since it was computed, and the attention it drew from the
    response when that was last `measured`; renewals: partial refreshes so far.
    """

    numbers: tuple[Any, ...]
    blocks: Blocks
    incoming: Tensor
    ids: Tensor
    other: Tensor
    guarded: tuple[Tensor, ...]
    same_inputs: Tensor
    candidates: Tensor
    keep: Tensor
    rows: Tensor
    confidence: Tensor
    best: Tensor
    active: Tensor
    focus: Tensor
    foreseen: Tensor
    predicted: Tensor
    scored: Tensor
    scored_before: Tensor
    refreshed_at: Tensor
    age: Tensor
    received: Tensor
    mask_token_id: int
    caches: list[Tensor]
    graphs: DeviceGraphs
    merged: list[Tensor] = field(default_factory=list)
    outputs: list[LatestRows] = field(default_factory=list)
    steps_since_refresh: int = 0
    steps_on_lists: int = 0
    """Steps on the keys that sparse layers read now; 0: the next one chooses them."""
    continued: bool = False
    measured: bool = False
    renewals: int = 0
    fresh: bool = False
    """Whether no step ran since the refresh."""
    prompt_blocks: tuple[int, int] = (0, 0)
    """candidates and keep of sequence 0."""

    @classmethod
    def allocate(
        cls,
        owner: object,
        call: CallInputs,
        first_row: int,
        caches: list[Tensor],
        graphs: DeviceGraphs,
        mask_token_id: int,
    ) -> Trajectory:
        """State of the sizes of `call`; `begin` must follow."""
        batch, length = call.ids.shape

        def per_row(dtype: torch.dtype) -> Tensor:
            return torch.zeros((batch, length), dtype=dtype, device=call.ids.device)

        def per_sequence() -> Tensor:
            return torch.zeros(batch, dtype=torch.int64, device=call.ids.device)

        rows = torch.arange(first_row, length, device=call.ids.device)
        return cls(
            owner=owner,
            weights=SeenWeights(call.weights),
            stream=current_stream(call.ids),
            numbers=call.numbers,
            blocks=Blocks(per_sequence(), 1),
            incoming=per_row(call.ids.dtype),
            ids=per_row(call.ids.dtype),
            other=per_row(call.ids.dtype),
            guarded=tuple(torch.empty_like(tensor) for tensor in call.guarded),
            same_inputs=torch.ones((), dtype=torch.bool, device=call.ids.device),
            candidates=per_sequence(),
            keep=per_sequence(),
            rows=rows.repeat(batch, 1),
            confidence=per_row(torch.float32),
            best=per_row(torch.int64),
            active=per_row(torch.bool),
            focus=per_row(torch.bool),
            foreseen=per_row(torch.bool),
            predicted=per_row(torch.bool),
            scored=torch.zeros(3, dtype=torch.int64, device=call.ids.device),
            scored_before=torch.zeros(3, dtype=torch.int64, device=call.ids.device),
            refreshed_at=per_sequence(),
            age=per_row(torch.int64),
            received=per_row(torch.float32),
            mask_token_id=mask_token_id,
            caches=caches,
            graphs=graphs,
        )

    def begin(
        self,
        call: CallInputs,
        blocks: Blocks,
        key_block: int,
        keep_ratio: float,
        other: Tensor | None = None,
    ) -> None:
        """Forget the calls so far; `call` is the first of a new trajectory."""
        self.continued = self.measured = False
        self.renewals = self.steps_on_lists = 0
        if other is not None and other.shape == self.other.shape:
            self.other.copy_(other)
        else:
            self.other.fill_(NO_TOKEN)
        self.weights = SeenWeights(call.weights)
        self.thread = weakref.ref(threading.current_thread())
        self.stream = current_stream(call.ids)
        self.incoming.copy_(call.ids)
        for mine, given in zip(self.guarded, call.guarded, strict=True):
            mine.copy_(given)
        self.same_inputs.fill_(True)
        self.scored.zero_()
        self.blocks.response_start.copy_(blocks.response_start)
        self.blocks = Blocks(self.blocks.response_start, blocks.block_length)
        candidates = blocks.response_start // key_block
        keep = (candidates.double() * keep_ratio).ceil().long()
        self.candidates.copy_(candidates)
        self.keep.copy_(torch.minimum(keep, candidates))
        self.prompt_blocks = int(self.candidates[0]), int(self.keep[0])

    def read_all_keys(self) -> None:
        """Sparse layers leave no key block of the prompt out."""
        self.steps_on_lists = 0
        self.keep.copy_(self.candidates)
        self.prompt_blocks = self.prompt_blocks[0], self.prompt_blocks[0]

    def forget_other(self) -> None:
        """A call went on from here: its caller is the one whose trajectory this is."""
        if not self.continued:
            self.continued = True
            self.other.fill_(NO_TOKEN)

    @property
    def first_row(self) -> int:
        """The first row that a refresh returns."""
        return self.ids.shape[1] - self.rows.shape[1]

    def fits(self, call: CallInputs, first_row: int) -> bool:
        """Whether a trajectory that starts with `call` can take these tensors, and what was
        captured over them."""
        return (
            self.first_row == first_row
            and self.stream == current_stream(call.ids)
            and self.numbers == call.numbers
            and all(
                mine.shape == given.shape
                and mine.dtype == given.dtype
                and mine.device == given.device
                for mine, given in zip(
                    (self.ids, *self.guarded), (call.ids, *call.guarded), strict=True
                )
            )
            and self.weights.addresses == [weight.data_ptr() for weight in call.weights]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of K/V, summaries, logits and merged weights held."""
        tensors = [*self.caches, *self.merged]
        cached = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return cached + sum(output.nbytes for output in self.outputs)


def current_stream(tensor: Tensor) -> int:
    """The stream that work on the tensor's device goes to; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
