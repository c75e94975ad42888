"""The ladders that models are trained on, and the batches of each of their stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from examples.train_tiny import tasks
from examples.train_tiny.layout import Layout
from examples.train_tiny.prepare import MASK
from examples.train_tiny.tasks import Batch, Corpus

Objective = Literal["next", "block", "full"]

DECODE_BLOCK = 32
_FULLY_MASKED = 0.25  # share of noisy blocks that are all masks, as when their decoding starts
_LEFT_TO_RIGHT = 0.2  # share of noisy blocks that are masks from some token on
_SEMI_AUTOREGRESSIVE = 0.3  # share of responses seen as when decoded block by block


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: what is predicted, at which lengths, and when it is learnt."""

    name: str
    objective: Objective
    """"next": each token from those before it. "block": masked tokens of noisy blocks, in place.
    "full": masked tokens of a sequence that reads all of itself."""
    lengths: tuple[int, ...]
    """Tokens of an example; each batch has one of them, drawn evenly."""
    block: int = 1
    """Tokens of a noisy block; of meaning for "block"."""
    repeat: float = 0.1
    """Share of examples that repeat a span."""
    text: float = 0.2
    """Share of examples that are plain text; the rest asks for facts."""
    digits: bool = False
    """Values are five digits instead of one word."""
    threshold: float = 0.95
    """Share of values right at which the next stage starts."""
    least: int = 40
    """Steps before it may."""
    most: int | None = 600
    """Steps after which it does in any case; None: never."""
    batch_tokens: int = 65_536
    """Tokens of a batch, all copies counted."""

    def layout(self, length: int) -> Layout:
        """The layout of this stage's examples of `length` tokens."""
        if self.objective == "next":
            return Layout(length, 1)
        if self.objective == "full":
            return Layout(length, length)
        if length <= 192:
            return Layout(length, self.block, length, 1)
        return Layout(length, self.block, max(responses(length)), 4 if length <= 1024 else 8)


def responses(length: int) -> tuple[int, ...]:
    """Tokens that answers may have in examples of `length` tokens."""
    if length < 192:
        return (32,)
    return (32, 64) if length < 512 else (32, 64, 128)


_NEXT = (
    Stage("next-96", "next", (96,), repeat=0.5, text=0.1, most=4000, batch_tokens=32_768),
    Stage("next-192", "next", (96, 192, 192), repeat=0.2, batch_tokens=32_768),
    Stage("next-512", "next", (192, 512, 512)),
    Stage("next-1024", "next", (192, 512, 1024, 1024)),
)
_BLOCK = (
    Stage("block-1", "block", (96, 192, 512), block=1, most=1200),
    Stage("block-4", "block", (192, 512), block=4),
    Stage("block-16", "block", (192, 512), block=16),
    Stage("block-32", "block", (96, 192, 512), block=32),
    Stage("block-32-1024", "block", (192, 512, 1024, 1024), block=32),
    Stage("block-32-2048", "block", (192, 512, 1024, 2048, 2048), block=32, most=None),
)
_FULL = (
    Stage("full-192", "full", (96, 192, 192), most=1500),
    Stage("full-512", "full", (192, 512, 512)),
    Stage("full-1024", "full", (192, 512, 1024, 1024)),
    Stage("full-2048", "full", (192, 512, 1024, 2048, 2048)),
    Stage("full-4096", "full", (192, 512, 1024, 2048, 4096, 4096), most=None),
)
_DIGITS = (
    Stage("digits-96", "full", (96,), repeat=0.5, text=0.0, digits=True, threshold=0.8, most=None),
    Stage("digits-192", "full", (96, 192), repeat=0.3, text=0.1, digits=True, threshold=0.8),
    Stage("full-96", "full", (96,), repeat=0.2, text=0.1, most=2000),
)

LADDERS: dict[str, tuple[Stage, ...]] = {
    "block": (*_NEXT, *_BLOCK),
    "bidir": (*_NEXT, *_FULL),
    "bidir-digits": (*_DIGITS, *_FULL),
    "smoke": (
        Stage("next-64", "next", (64,), repeat=0.5, text=0.0, threshold=0.9, most=None),
        Stage("block-1", "block", (64,), block=1, repeat=0.3, text=0.0, threshold=0.9),
        Stage("block-4", "block", (64,), block=4, text=0.0, threshold=0.9),
        Stage("block-32", "block", (64,), block=32, text=0.0, threshold=0.9, most=None),
    ),
}
"""By name. "bidir" is told where to look by predicting the next token first, "bidir-digits" by
copying numbers. "smoke" is for a small model on a CPU."""


@dataclass(frozen=True, slots=True)
class Work:
    """A batch as the model is given it, and what it has to say."""

    ids: Tensor
    """[batch, rows] int64: the layout's rows."""
    rows: Tensor
    """[targets] int64: indices into batch x rows of the predictions that count."""
    targets: Tensor
    """[targets] int64: the tokens that they should name."""
    kinds: Tensor
    """[targets] int64: what those tokens are, as in `tasks`."""
    weights: Tensor
    """[targets] fp32."""
    layout: Layout

    def to(self, device: torch.device) -> Work:
        """The same on `device`."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Work:
        """The same in pinned memory, for the data loader."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Work:
        return Work(
            change(self.ids),
            change(self.rows),
            change(self.targets),
            change(self.kinds),
            change(self.weights),
            self.layout,
        )


class Stream(IterableDataset[Work]):
    """Endless work of one stage, made anew for every step."""

    def __init__(self, corpus: Corpus, stage: Stage, seed: int) -> None:
        self.corpus = corpus
        self.stage = stage
        self.seed = seed

    def __iter__(self) -> Iterator[Work]:
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, 0 if worker is None else worker.id))
        while True:
            yield make_work(self.corpus, self.stage, rng)


def make_work(corpus: Corpus, stage: Stage, rng: np.random.Generator) -> Work:
    """One batch of a stage."""
    length = int(rng.choice(stage.lengths))
    layout = stage.layout(length)
    batch = make_examples(corpus, stage, rng, max(1, stage.batch_tokens // layout.rows), length)
    if stage.objective == "next":
        return _next_work(batch, layout)
    if stage.objective == "full":
        return _full_work(batch, layout, rng)
    return _block_work(batch, layout, rng)


def make_examples(
    corpus: Corpus, stage: Stage, rng: np.random.Generator, count: int, length: int
) -> Batch:
    """`count` examples in the mix of a stage."""
    repeats = int(rng.binomial(count, stage.repeat))
    texts = int(rng.binomial(count - repeats, min(1.0, stage.text / (1 - stage.repeat))))
    parts = []
    if repeats:
        parts.append(tasks.repeat(corpus, rng, repeats, length))
    if texts:
        parts.append(tasks.text(corpus, rng, texts, length))
    left = count - repeats - texts
    while left:
        group = min(left, max(4, count // 12))
        parts.append(_questions(corpus, stage, rng, group, length))
        left -= group
    return Batch.join(parts)


def _questions(
    corpus: Corpus, stage: Stage, rng: np.random.Generator, count: int, length: int
) -> Batch:
    """`count` examples that ask for facts, with sizes drawn once for all of them."""
    response = int(rng.choice(responses(length)))
    most_of = {
        kind: tasks.most_questions(
            corpus, length, kind=kind, response=response, digits=stage.digits
        )
        for kind in tasks.MOST_FACTS
    }
    kind = str(rng.choice([kind for kind, most in most_of.items() if most]))
    most = most_of[kind]
    return tasks.retrieval(
        corpus,
        rng,
        count,
        length,
        kind=kind,
        response=response,
        questions=most if rng.random() < 0.5 else int(rng.integers(1, most + 1)),
        digits=stage.digits,
    )


def noise(shape: tuple[int, int], block: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which tokens of noisy sequences are masks: [sequences, tokens], independently by block.

    A block has a share of masks drawn evenly from 0 to 1, or only masks, or masks from some token
    on; a block of one token is always a mask.
    """
    sequences, tokens = shape
    blocks = (sequences, tokens // block, 1)
    if block == 1:
        return np.ones(shape, dtype=bool)
    form = rng.random(blocks)
    share = rng.random(blocks)
    share = np.where(form < _FULLY_MASKED, 1.1, share)
    masked = rng.random((*blocks[:2], block)) < share
    ordered = np.arange(block) >= rng.integers(0, block, blocks)
    masked = np.where(form > 1 - _LEFT_TO_RIGHT, ordered, masked)
    return masked.reshape(shape)


def _next_work(batch: Batch, layout: Layout) -> Work:
    chosen = np.zeros_like(batch.ids, dtype=bool)
    chosen[:, :-1] = True
    following = Batch(
        np.roll(batch.ids, -1, 1), np.roll(batch.kind, -1, 1), np.roll(batch.weight, -1, 1)
    )
    return _work(batch.ids, chosen, following, layout)


def _block_work(batch: Batch, layout: Layout, rng: np.random.Generator) -> Work:
    count, first = len(batch.ids), layout.length - layout.noisy

    def rows(part: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([*[part[:, first:]] * layout.copies, part], axis=1)

    masked = np.zeros((count, layout.rows), dtype=bool)
    drawn = noise((count * layout.copies, layout.noisy), layout.block, rng)
    masked[:, : layout.noisy_rows] = drawn.reshape(count, -1)
    truth = Batch(rows(batch.ids), rows(batch.kind), rows(batch.weight))
    return _work(np.where(masked, MASK, truth.ids), masked, truth, layout)


def _full_work(batch: Batch, layout: Layout, rng: np.random.Generator) -> Work:
    """Masks in the answers, in repetitions, and all over plain text."""
    shape = batch.ids.shape
    fixed = (batch.kind == tasks.TEXT) & (batch.kind != tasks.TEXT).any(1, keepdims=True)
    share = rng.random((shape[0], 1))
    masked = rng.random(shape) < share
    # The states of block-by-block decoding: what is left of the block is clean, the rest masked.
    from_end = np.arange(shape[1])[::-1] // DECODE_BLOCK
    now = rng.integers(0, (~fixed).sum(1, keepdims=True) // DECODE_BLOCK + 1)
    by_block = (from_end < now) | ((from_end == now) & masked)
    masked = np.where(rng.random((shape[0], 1)) < _SEMI_AUTOREGRESSIVE, by_block, masked) & ~fixed
    return _work(np.where(masked, MASK, batch.ids), masked, batch, layout)


def _work(ids: NDArray[np.int64], chosen: NDArray[np.bool_], truth: Batch, layout: Layout) -> Work:
    """chosen [batch, rows]: which rows' predictions count; truth has the same rows."""
    at = np.flatnonzero(chosen & (truth.weight > 0))
    return Work(
        torch.from_numpy(np.ascontiguousarray(ids)),
        torch.from_numpy(at),
        torch.from_numpy(truth.ids.reshape(-1)[at]),
        torch.from_numpy(truth.kind.reshape(-1)[at]),
        torch.from_numpy(truth.weight.reshape(-1)[at]),
        layout,
    )
