"""A trajectory: a run of calls that continue one another, and all the state it needs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from focus_compile.runtime.latest_rows import LatestRows

__all__ = ["Blocks", "SeenWeights", "Trajectory", "masks_became_tokens"]


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


def masks_became_tokens(before: Tensor, after: Tensor, mask_token_id: int) -> bool:
    """Whether ids changed only from mask to token."""
    changed = before != after
    return bool((before == mask_token_id).logical_or_(changed.logical_not_()).all())


class SeenWeights:
    """What the weights were: each tensor, its memory and its version, without keeping any alive.

    An id or address alone may be reused by a new tensor once the old one is freed. A write through
    `.data` shows in none of these; call `torch.compiler.reset()` after one.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._tensors = [weakref.ref(w) for w in weights]
        self._storages = [StorageWeakRef(w.untyped_storage()) for w in weights]
        self._marks = [_mark(w) for w in weights]

    def are(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors over the same memory, and nobody wrote into it."""
        return (
            len(weights) == len(self._marks)
            and all(seen() is w for seen, w in zip(self._tensors, weights, strict=True))
            and all(mark == _mark(w) for mark, w in zip(self._marks, weights, strict=True))
            and not any(storage.expired() for storage in self._storages)
        )


def _mark(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()


@dataclass
class Trajectory:
    """State of one run of calls. All tensors are private to it.

    guarded, numbers: the other inputs. caches: the programs' state tensors in `cache_names` order.
    confidence fp32 [batch, length]: max probability of each row's latest logits. predicted bool
    [batch, length]: focus rows of the last call, None after a refresh. refreshed_at int64 [batch]:
    current block at the last refresh.
    """

    owner: object
    ids: Tensor
    guarded: tuple[Tensor, ...]
    numbers: tuple[Any, ...]
    weights: SeenWeights
    blocks: Blocks
    candidates: Tensor
    keep: Tensor
    caches: list[Tensor]
    outputs: list[LatestRows] = field(default_factory=list)
    confidence: Tensor = field(default_factory=lambda: torch.empty(0))
    predicted: Tensor | None = None
    refreshed_at: Tensor = field(default_factory=lambda: torch.empty(0))
    calls_since_refresh: int = 0
    thread: weakref.ref[threading.Thread] = field(
        default_factory=lambda: weakref.ref(threading.current_thread())
    )

    def belongs_to_another_thread(self) -> bool:
        """True while the thread that started the trajectory lives and is not the caller's."""
        thread = self.thread()
        return thread is not None and thread.is_alive() and thread is not threading.current_thread()

    @property
    def nbytes(self) -> int:
        """Bytes of K/V, summaries and logits held."""
        cached = sum(tensor.untyped_storage().nbytes() for tensor in self.caches)
        return cached + sum(output.nbytes for output in self.outputs)
