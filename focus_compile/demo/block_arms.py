"""The ways of decoding with the bundled block-diffusion model that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile import demo
from focus_compile.block_diffusion.batch_generator import BatchGenerator, BlockStep
from focus_compile.config import COMBINED, EVICTING_POLICIES
from focus_compile.demo import retrieval
from focus_compile.demo.retrieval import Example
from focus_compile.errors import OptionError
from focus_compile.policies.focus_evict import Rank

__all__ = ["MODEL", "BlockArm", "BlockQuestions", "Responses", "Work", "decode", "set_rule"]

MODEL = "block"
"""The bundled model that all arms run."""
RANKS = ("difference", "random", "reversed")


@dataclass(frozen=True, slots=True)
class BlockArm:
    """One way of decoding blocks."""

    name: str
    policy: str
    alpha: float = 1.5
    commit: str = "exact"
    rank: str = "difference"
    """What masked rows are ranked by: the "difference" of importances, its "reversed", "random"."""
    keep_ratio: float = 0.5
    """With the combined policy, the share of finished key blocks that sparse layers read."""

    def set(self, generator: BatchGenerator, seed: int = 0) -> None:
        """Have an idle generator without CUDA graphs decode in this way; one whose layers choose
        keys, if this arm does."""
        generator.policy, generator.alpha = self.policy, self.alpha
        generator.commit, generator.rank = self.commit, ranking(self.rank, seed)
        if self.policy == COMBINED:
            generator.keep_ratio = self.keep_ratio

    def options(self) -> dict[str, Any]:
        """As JSON types; alpha and rank where they mean something."""
        found: dict[str, Any] = {"policy": self.policy, "commit": self.commit}
        if self.policy in EVICTING_POLICIES:
            alpha = "inf" if math.isinf(self.alpha) else self.alpha
            found |= {"alpha": alpha, "rank": self.rank}
        if self.policy == COMBINED:
            found["keep_ratio"] = self.keep_ratio
        return found


def ranking(name: str, seed: int = 0) -> Rank:
    """The function of that name of `RANKS`; fresh random numbers of the seed in each step."""
    if name == "difference":
        return torch.sub
    if name == "reversed":
        return lambda at_cut, before: before - at_cut
    if name != "random":
        raise OptionError.unknown(name, RANKS, kind="rank")
    numbers = torch.Generator().manual_seed(seed)

    def random(at_cut: Tensor, before: Tensor) -> Tensor:
        return torch.randn(at_cut.shape, generator=numbers).to(at_cut.device)

    return random


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockQuestions:
    """Questions whose prompts end where a block does, as the model was trained."""

    length: int
    """Tokens of prompt and response together."""
    gen_length: int
    questions: int
    block_length: int
    seed: int = 0

    def check(self) -> None:
        """Raises OptionError where a length is no multiple of the block length."""
        for name in ("length", "gen_length"):
            value = getattr(self, name)
            if value % self.block_length:
                raise OptionError.invalid(name, value, f"a multiple of {self.block_length}")

    def make(self, tokenizer: Any, kind: retrieval.Kind, count: int) -> list[Example]:
        """That many questions of one kind; OptionError where they do not fit the length."""
        self.check()
        return [
            retrieval.make(
                tokenizer,
                self.length,
                kind=kind,
                questions=self.questions,
                response=self.gen_length,
                seed=self.seed + number,
                model=MODEL,
            )
            for number in range(count)
        ]


@dataclass(frozen=True, slots=True)
class Work:
    """What a generator computed."""

    steps: int
    decoded: int
    """Tokens."""
    listed: int
    """Rows that began a step."""
    kept: int
    """Rows that went through all layers."""
    sequence_steps: int
    """Steps, summed over the sequences that took part."""

    @classmethod
    def of(cls, history: Sequence[BlockStep]) -> Work:
        """The work of all steps of a history."""
        return cls(
            len(history),
            sum(step.decoded for step in history),
            sum(step.listed for step in history),
            sum(step.kept for step in history),
            sum(step.sequences for step in history),
        )

    def __add__(self, other: Work) -> Work:
        return Work(
            self.steps + other.steps,
            self.decoded + other.decoded,
            self.listed + other.listed,
            self.kept + other.kept,
            self.sequence_steps + other.sequence_steps,
        )


@dataclass(frozen=True, slots=True)
class Responses:
    """The responses to some questions, in their order."""

    tokens: tuple[tuple[int, ...], ...]
    right: tuple[tuple[bool, ...], ...]
    """Whether each of the pairs asked for is stated, by question."""
    work: Work

    def marks(self) -> list[bool]:
        """Those of all questions."""
        return [mark for marks in self.right for mark in marks]


def block_length_of(model: Any) -> int:
    """Tokens per block of a model that was trained for blocks of one size."""
    return int(model.config.block_length)


def load() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    return demo.load(MODEL)


def set_rule(
    generator: BatchGenerator, tokens_per_step: int | None, threshold: float = 1.0
) -> None:
    """What an idle generator decodes in a step: so many tokens of each sequence, or by threshold.

    Raises:
        OptionError: out of range.
    """
    check_rule(tokens_per_step, threshold)
    counts = None
    if tokens_per_step is not None:
        counts = torch.full_like(generator.state.begin, tokens_per_step)
    generator.decode_counts, generator.threshold = counts, threshold


def check_rule(tokens_per_step: int | None, threshold: float) -> None:
    """Raises OptionError where one of them is out of range."""
    if tokens_per_step is not None and tokens_per_step < 1:
        raise OptionError.invalid("tokens_per_step", tokens_per_step, "a whole number >= 1")
    if not 0 <= threshold <= 1:
        raise OptionError.invalid("threshold", threshold, "a probability")


def decode(
    generator: BatchGenerator,
    tokenizer: Any,
    examples: Sequence[Example],
    gen_length: int,
    after_step: Callable[[Sequence[int]], object] | None = None,
) -> Responses:
    """The responses of an idle generator, whose history starts anew.

    after_step: called after every step with the first response so far.
    """
    generator.history.clear()
    numbers = [generator.submit(example.prompt_ids, gen_length) for example in examples]
    done: dict[int, tuple[int, ...]] = {}
    while generator.pending:
        done |= {found.request: found.tokens for found in generator.step()}
        if after_step is not None:
            after_step(done.get(numbers[0]) or generator.partial(numbers[0]))
    tokens = tuple(done[number] for number in numbers)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    right = tuple(example.marks(text) for example, text in zip(examples, texts, strict=True))
    return Responses(tokens, right, Work.of(generator.history))
