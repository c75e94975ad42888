"""How near a setting's answers are to dense ones, and what they cost: one prompt at a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.bench import DENSE_CALLS, Call, TimedModel
from focus_compile.config import FocusConfig
from focus_compile.decode.respond import ShiftedLogits
from focus_compile.decode.sampler import DecodeProgress, count_blocks, generate
from focus_compile.errors import OptionError
from focus_compile.frontend import compile as focus_compiled
from focus_compile.model_files import LoadedModel
from focus_compile.runtime.record import StepRecord, record
from focus_compile.tuning.work import ModelShape

__all__ = ["MEASURES", "Decoding", "Judge", "Score", "compare"]

MEASURES = ("work", "time")


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How responses are decoded: by a fixed number of calls, or by a threshold."""

    mask_token_id: int
    gen_length: int = 64
    block_length: int = 32
    steps: int | None = None
    """Model calls in all; None: one for each token."""
    threshold: float | None = None
    eos_token_id: int | None = None
    """Ends a response; its blocks after that one are not decoded."""
    shift_logits: bool = False

    @property
    def blocks(self) -> int:
        """Of a response; OptionError where they do not divide it."""
        return count_blocks(self.gen_length, self.block_length)

    @property
    def calls_per_block(self) -> int | None:
        """None where a threshold decides."""
        if self.threshold is not None:
            return None
        return (self.steps or self.gen_length) // self.blocks


@dataclass(frozen=True, slots=True)
class Score:
    """A setting on some prompts.

    same, compared: tokens; cost: a decoded token's, in units of a dense one's.
    """

    same: int
    compared: int
    costs: tuple[float, ...] = ()
    """By prompt."""

    @property
    def agreement(self) -> float:
        """Share of the tokens that are the dense loop's."""
        return self.same / self.compared if self.compared else 1.0

    @property
    def cost(self) -> float:
        """Mean over the prompts."""
        return statistics.fmean(self.costs)

    def __add__(self, other: Score) -> Score:
        return Score(
            self.same + other.same, self.compared + other.compared, self.costs + other.costs
        )


def compare(dense: Sequence[int], other: Sequence[int], end: int | None) -> tuple[int, int]:
    """Positions with the same token, and positions compared: up to the end token of whichever
    response is longer, and with it."""
    count = max(_tokens_until(dense, end), _tokens_until(other, end))
    return sum(a == b for a, b in zip(dense[:count], other[:count], strict=True)), count


def _tokens_until(tokens: Sequence[int], end: int | None) -> int:
    return list(tokens).index(end) + 1 if end is not None and end in tokens else len(tokens)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A response int, its decoded tokens and its model calls."""

    tokens: list[int]
    decoded: int
    calls: int


class Judge:
    """Compares settings with the dense loop of one model, whose answers are made once and kept.

    measure "work": multiply-adds by the records of the calls (`ModelShape`), with the plain model
    as the dense one. "time": seconds of the calls; a few dense calls are timed right before each
    prompt's, because a machine's speed drifts. `lowering` is what runs both.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        measure: str,
        lowering: str,
    ) -> None:
        self.decoding, self.measure, self.lowering = decoding, measure, lowering
        self._model = loaded.model
        self._prompts = [torch.tensor([list(ids)], device=self._model.device) for ids in prompts]
        self._dense: list[_Answer] = []
        self._setting: tuple[Any, FocusConfig] | None = None
        self._dense_model: Any = None
        first = self._whole(0)
        plan_of = {"mask_token_id": decoding.mask_token_id, "policy": "focus-dllm"}
        self.shape = ModelShape.of(self._model, first, plan_of)

    def __len__(self) -> int:
        return len(self._prompts)

    def answer_densely(self, advance: Callable[[], object] = lambda: None) -> None:
        """The dense answers of all prompts."""
        torch.compiler.reset()
        model = self._model
        if self.lowering != "eager":
            model = torch.compile(model, backend=self.lowering)
        for ids in self._prompts:
            self._dense.append(self._answer(model, ids))
            advance()

    def dense_tokens(self, number: int) -> int:
        """Tokens of a prompt's dense answer, its end included."""
        return _tokens_until(self._dense[number].tokens, self.decoding.eos_token_id)

    def use(self, options: dict[str, Any]) -> None:
        """The setting that is scored from now on.

        Raises:
            OptionError: an option is out of range.
        """
        known = {
            "mask_token_id": self.decoding.mask_token_id,
            "block_length": self.decoding.block_length,
            "lowering": self.lowering,
        }
        options = known | options
        config = FocusConfig.from_options(options)
        if self._setting is not None and self._setting[1] == config:
            return
        torch.compiler.reset()
        model = focus_compiled(self._model, **options)
        self._setting = model, config
        if self.measure == "time":
            self._setting = TimedModel(model, config), config
            backend = "eager" if self.lowering == "eager" else "inductor"
            self._dense_model = TimedModel(torch.compile(self._model, backend=backend), config)
            self._warm_up()

    def score(self, number: int) -> Score:
        """The setting in use on a prompt.

        Raises:
            OptionError: a call ran the model itself.
        """
        assert self._setting is not None, "use() comes first"
        model, config = self._setting
        ids = self._prompts[number]
        dense = self._dense[number]
        dense_seconds = self._time_dense(number) if self.measure == "time" else 0.0
        with record() as history:
            answer = self._answer(model, ids)
        if self.measure == "work":
            _check_incremental(history)
            length = ids.shape[1] + self.decoding.gen_length
            cost = self.shape.work(history, length, config)
            dense_cost = dense.calls * self.shape.dense(length, length)
        else:
            timed = model.take()
            _check_incremental(timed)
            cost = sum(call.milliseconds for call in timed) / 1e3
            dense_cost = dense.calls * dense_seconds
        same, compared = compare(dense.tokens, answer.tokens, self.decoding.eos_token_id)
        ratio = (cost / max(1, answer.decoded)) / (dense_cost / max(1, dense.decoded))
        return Score(same, compared, (ratio,))

    def _warm_up(self) -> None:
        """Compile both, and on a GPU capture what is met twice."""
        assert self._setting is not None
        for _ in range(2):
            self._time_dense(0)
            self._answer(self._setting[0], self._prompts[0])
        self._setting[0].take()

    def _time_dense(self, number: int) -> float:
        """Seconds of a dense call on a prompt."""
        ids = self._whole(number)
        for _ in range(DENSE_CALLS):
            self._dense_model(ids)
        return statistics.median(call.milliseconds for call in self._dense_model.take()) / 1e3

    def _whole(self, number: int) -> Tensor:
        """A prompt with its response of masks."""
        ids = self._prompts[number]
        return torch.nn.functional.pad(
            ids, (0, self.decoding.gen_length), value=self.decoding.mask_token_id
        )

    def _answer(self, model: Any, ids: Tensor) -> _Answer:
        how = self.decoding
        decoded = _Counter()
        result = generate(
            ShiftedLogits(model) if how.shift_logits else model,
            ids,
            gen_length=how.gen_length,
            steps=how.steps,
            block_length=how.block_length,
            mask_token_id=how.mask_token_id,
            threshold=how.threshold,
            eos_token_id=how.eos_token_id,
            progress=decoded,
        )
        tokens = result.ids[0, ids.shape[1] :].tolist()
        return _Answer(tokens, decoded.tokens, result.model_calls)


def _check_incremental(calls: Sequence[StepRecord] | Sequence[Call]) -> None:
    exact = [call.why for call in calls if call.program == "exact"]
    if exact:
        raise OptionError(f"tune: calls ran the model itself: {exact[0]}")


class _Counter:
    """Counts the tokens that calls decode."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, progress: DecodeProgress) -> None:
        self.tokens += int(progress.decoded.sum())
