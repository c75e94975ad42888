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

__all__ = ["Blocks", "OwnedTrajectory", "SeenWeights", "Trajectory", "current_stream"]


@dataclass(frozen=True)
class Blocks:
    """Decode blocks of each sequence: counted from its first mask in the first call.

    response_start int64 [batch]: that position, or the length where there is none.
    """

    response_start: Tensor
    block_length: int

    @classmethod
    def of(cls, masked: Tensor, block_length: int) -> Blocks:
        return cls(first_true(masked), block_length)

    def current(self, masked: Tensor) -> Tensor:
        """Index of the block that holds the first mask, int64 [batch]; -1 where none is left."""
        first = first_true(masked)
        block = (first - self.response_start) // self.block_length
        return torch.where(first < masked.shape[1], block, -1)

    def start_of(self, block: Tensor) -> Tensor:
        """First position of a block, int64 [batch]."""
        return self.response_start + block * self.block_length


def first_true(flags: Tensor) -> Tensor:
    """First True of each row of a bool [batch, length], or the length where there is none."""
    found, at = flags.max(1)
    return torch.where(found, at, flags.shape[1])


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
    the call at hand, and of the last call that continued. guarded, numbers: the other inputs.
    same_inputs: bool, whether the call's guarded inputs are these. candidates, keep int64 [batch]:
    key blocks of the prompt, and those a sparse layer keeps. caches: the programs' state tensors in
    `cache_names` order. merged: copies of weights that a step reads as one, of when the trajectory
    began. confidence fp32 [batch, length]: max probability of each row's latest logits. active,
    focus bool [batch, length]: rows of the call at hand; predicted: focus rows of the last step,
    none after a refresh. refreshed_at int64 [batch]: current block at the last refresh. rows int64
    [batch, length - first_row]: what a refresh returns.
    """

    numbers: tuple[Any, ...]
    blocks: Blocks
    incoming: Tensor
    ids: Tensor
    guarded: tuple[Tensor, ...]
    same_inputs: Tensor
    candidates: Tensor
    keep: Tensor
    rows: Tensor
    confidence: Tensor
    active: Tensor
    focus: Tensor
    predicted: Tensor
    refreshed_at: Tensor
    caches: list[Tensor]
    graphs: DeviceGraphs
    merged: list[Tensor] = field(default_factory=list)
    outputs: list[LatestRows] = field(default_factory=list)
    steps_since_refresh: int = 0
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
            guarded=tuple(torch.empty_like(tensor) for tensor in call.guarded),
            same_inputs=torch.ones((), dtype=torch.bool, device=call.ids.device),
            candidates=per_sequence(),
            keep=per_sequence(),
            rows=rows.repeat(batch, 1),
            confidence=per_row(torch.float32),
            active=per_row(torch.bool),
            focus=per_row(torch.bool),
            predicted=per_row(torch.bool),
            refreshed_at=per_sequence(),
            caches=caches,
            graphs=graphs,
        )

    def begin(self, call: CallInputs, blocks: Blocks, key_block: int, keep_ratio: float) -> None:
        """Forget the calls so far; `call` is the first of a new trajectory."""
        self.weights = SeenWeights(call.weights)
        self.thread = weakref.ref(threading.current_thread())
        self.stream = current_stream(call.ids)
        self.incoming.copy_(call.ids)
        for mine, given in zip(self.guarded, call.guarded, strict=True):
            mine.copy_(given)
        self.same_inputs.fill_(True)
        self.blocks.response_start.copy_(blocks.response_start)
        self.blocks = Blocks(self.blocks.response_start, blocks.block_length)
        candidates = blocks.response_start // key_block
        keep = (candidates.double() * keep_ratio).ceil().long()
        self.candidates.copy_(candidates)
        self.keep.copy_(torch.minimum(keep, candidates))
        self.prompt_blocks = int(self.candidates[0]), int(self.keep[0])

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
