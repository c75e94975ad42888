"""The semi-autoregressive low-confidence sampler of LLaDA, with Fast-dLLM's threshold rule.

The response starts as masks and is decoded block by block, left to right. In a block each model
call commits the masked positions whose predicted token is the most probable: a fixed number of
them (LLaDA, arXiv 2502.09992), or all above a threshold and always the best one (Fast-dLLM, arXiv
2505.22618). Sequences of one batch share the blocks but never each other's choices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.errors import OptionError
from focus_compile.frontend import known_mask_token_id
from focus_compile.kernels.confidence.op import confidence

__all__ = ["DecodeProgress", "GenerateResult", "generate"]


@dataclass(frozen=True, slots=True)
class DecodeProgress:
    """What a `progress` callback is given after every model call."""

    ids: Tensor
    """[batch, length] int64: prompt and response so far. The live tensor: copy what you keep."""
    decoded: Tensor
    """[batch, length] bool: positions that this call decoded."""
    step: int
    """Model calls so far, from 1."""
    total: int | None
    """Model calls planned; None where a threshold decides."""


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """What `generate` returns."""

    ids: Tensor
    """[batch, prompt + gen_length] int64: the prompts with their responses."""
    model_calls: int
    """How often the model was called."""


@dataclass(frozen=True, slots=True)
class _CommitRule:
    """Which of a block's masked positions a call decodes, and to what."""

    mask_token_id: int
    threshold: float | None
    temperature: float
    generator: torch.Generator | None

    def choose(self, logits: Tensor, masked: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        """Choices for one block.

        logits [batch, block, vocabulary]; masked [batch, block] bool; count: positions to decode,
        None with a threshold. Returns chosen [batch, block] bool, at most `count` a sequence, and
        tokens [batch, block] int64, of meaning where chosen.
        """
        probability, token = self._predict(logits[masked].float())
        score = torch.full(masked.shape, -1.0, device=masked.device).masked_scatter(
            masked, probability
        )
        tokens = torch.zeros(masked.shape, dtype=torch.int64, device=masked.device).masked_scatter(
            masked, token
        )
        best = score.argsort(dim=1, descending=True, stable=True)[:, : count or 1]
        chosen = torch.zeros_like(masked).scatter(1, best, True)
        if self.threshold is not None:
            chosen |= score >= self.threshold
        return chosen & masked, tokens

    def _predict(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Token of each row, never the mask, and its probability. rows [rows, vocabulary] fp32."""
        if self.mask_token_id < rows.shape[-1]:
            rows[:, self.mask_token_id] = -math.inf
        if self.temperature == 0:
            return confidence(rows)
        # argmax(logits + temperature * Gumbel) draws from softmax(logits / temperature).
        gumbel = -torch.empty_like(rows).exponential_(generator=self.generator).log()
        token = (rows + self.temperature * gumbel).argmax(dim=-1)
        return rows.softmax(dim=-1).gather(-1, token[:, None]).squeeze(-1), token


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    input_ids: Tensor,
    *,
    gen_length: int,
    steps: int | None = None,
    block_length: int = 32,
    mask_token_id: int | None = None,
    threshold: float | None = None,
    temperature: float = 0.0,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    ended: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[DecodeProgress], object] | None = None,
) -> GenerateResult:
    """Decode `gen_length` tokens after each prompt.

    Args:
        model: any callable whose result has `.logits` [batch, length, vocabulary], plain or
            compiled.
        input_ids: prompts, [batch, prompt] int64. Prompts of different lengths are padded on the
            left.
        gen_length: tokens to decode, a multiple of `block_length`.
        steps: model calls over all blocks, a multiple of the number of blocks; None decodes one
            token a call. Not used with a threshold.
        block_length: tokens per decode block; more than `gen_length` means one block.
        mask_token_id: None takes it from `model.config`.
        threshold: decode every position of the block at least this probable, and always the most
            probable one, instead of a fixed number a call.
        temperature: 0 takes the most probable token; above, Gumbel noise of that strength.
        attention_mask: [batch, prompt], 1 for tokens and 0 for padding; the response is added.
        eos_token_id: where a sequence's finished block holds this token, the rest of its response
            is filled with it without further calls. None decodes everything.
        ended: given the responses up to the block just finished, [batch, tokens], tells which of
            them are complete, [batch] bool, for endings that are no single token; their rest is
            filled with `eos_token_id` as well.
        generator: the source of randomness at a temperature above 0.
        progress: called after every model call.

    Raises:
        OptionError: arguments out of range or not divisible, no mask token id, a prompt that
            holds masks, or a model whose result is not logits for every position; `ended` without
            an `eos_token_id`.
    """
    mask_token_id = _mask_token_id(model, mask_token_id)
    _check_prompt(input_ids, attention_mask, mask_token_id)
    _check_rates(threshold, temperature)
    if ended is not None and eos_token_id is None:
        raise OptionError("generate: ended= needs eos_token_id, which fills a response's rest")
    blocks = count_blocks(gen_length, block_length)
    block_length = gen_length // blocks
    counts = None if threshold is not None else _counts(gen_length, blocks, steps)
    total = None if counts is None else len(counts) * blocks
    ids = _extend(input_ids, gen_length, mask_token_id)
    inputs = {}
    if attention_mask is not None:
        inputs["attention_mask"] = _extend(attention_mask, gen_length, 1)
    rule = _CommitRule(mask_token_id, threshold, temperature, generator)
    calls = 0
    for start in range(input_ids.shape[1], ids.shape[1], block_length):
        block = slice(start, start + block_length)
        for chosen in _decode_block(model, ids, inputs, block, rule, counts):
            calls += 1
            if progress is not None:
                decoded = torch.zeros_like(ids, dtype=torch.bool)
                decoded[:, block] = chosen
                progress(DecodeProgress(ids, decoded, calls, total))
        if eos_token_id is not None:
            complete = (ids[:, block] == eos_token_id).any(dim=1)
            if ended is not None:
                complete |= ended(ids[:, input_ids.shape[1] : block.stop]).to(ids.device)
            ids[complete, block.stop :] = eos_token_id
    return GenerateResult(ids, calls)


def _decode_block(
    model: Callable[..., Any],
    ids: Tensor,
    inputs: dict[str, Tensor],
    block: slice,
    rule: _CommitRule,
    counts: list[int] | None,
) -> Iterator[Tensor]:
    """Decode one block of `ids` in place; each call yields what it chose, [batch, block] bool."""
    for count in counts or itertools.repeat(None):
        masked = ids[:, block] == rule.mask_token_id
        if not masked.any():
            return
        logits = _logits(model(ids, **inputs), ids)
        chosen, tokens = rule.choose(logits[:, block], masked, count)
        ids[:, block][chosen] = tokens[chosen]
        yield chosen


def count_blocks(gen_length: int, block_length: int) -> int:
    """Decode blocks of a response of `gen_length` tokens; OptionError unless they divide it."""
    block_length = min(_whole("block_length", block_length), _whole("gen_length", gen_length))
    if gen_length % block_length:
        raise OptionError(
            f"generate: gen_length={gen_length} is not a multiple of block_length={block_length}"
        )
    return gen_length // block_length


def _counts(gen_length: int, blocks: int, steps: int | None) -> list[int]:
    """Positions that each call of a block decodes where their number is fixed.

    The floor of block length / calls, and one more in the first calls until the rest is used.
    """
    steps = gen_length if steps is None else _whole("steps", steps)
    if steps % blocks or steps > gen_length:
        raise OptionError(
            f"generate: steps={steps} must be a multiple of the {blocks} blocks and at most "
            f"gen_length={gen_length}, so that every call decodes a token"
        )
    calls = steps // blocks
    least, rest = divmod(gen_length // blocks, calls)
    return [least + (call < rest) for call in range(calls)]


def _extend(prompt: Tensor, gen_length: int, value: int) -> Tensor:
    """[batch, prompt] with `gen_length` columns of `value` after it, in storage of its own."""
    return torch.cat([prompt, prompt.new_full((prompt.shape[0], gen_length), value)], dim=1)


def _logits(output: Any, ids: Tensor) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        got = type(output).__name__ if logits is None else f"logits of shape {_shape(logits)}"
        raise OptionError(
            f"generate: the model must return .logits of shape [{ids.shape[0]}, {ids.shape[1]}, "
            f"vocabulary]; got {got}"
        )
    return logits


def _mask_token_id(model: Callable[..., Any], given: int | None) -> int:
    if given is None:
        given = known_mask_token_id(model)
    if given is None:
        raise OptionError("generate: model.config has no mask_token_id; pass mask_token_id=...")
    return _whole("mask_token_id", given, least=0)


def _check_prompt(input_ids: Tensor, attention_mask: Tensor | None, mask_token_id: int) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.dtype != torch.int64:
        raise OptionError(
            "generate: input_ids must be int64 of shape [batch, prompt]; got "
            f"{input_ids.dtype} of shape {_shape(input_ids)}"
        )
    if (input_ids == mask_token_id).any():
        raise OptionError(
            f"generate: the prompt holds the mask token {mask_token_id}; generate decodes only "
            "what it appends, so pass the prompt without masks"
        )
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise OptionError(
            f"generate: attention_mask has shape {_shape(attention_mask)}, the prompts have "
            f"{_shape(input_ids)}"
        )
    if input_ids.shape[1] and not attention_mask[:, -1].all():
        raise OptionError(
            "generate: a prompt ends in padding; pad prompts of different lengths on the left"
        )


def _check_rates(threshold: float | None, temperature: float) -> None:
    if threshold is not None and not 0 <= threshold <= 1:
        raise OptionError.invalid("threshold", threshold, "a probability between 0 and 1")
    if not 0 <= temperature < math.inf:
        raise OptionError.invalid("temperature", temperature, "a number >= 0")


def _whole(name: str, value: int, *, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError.invalid(name, value, f"a whole number >= {least}")
    return value


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
