"""Responses to tokenised prompts: full attention and block diffusion, dense and incremental."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import calculate_time_spent

import focus_compile
from focus_compile.block_diffusion.batch_generator import KEY_OPTIONS
from focus_compile.block_diffusion.tracing import call_with_block_mask
from focus_compile.config import COMBINED, FocusConfig
from focus_compile.decode import BatchGenerator, generate
from focus_compile.errors import OptionError
from focus_compile.integrations.lm_eval.settings import Request
from focus_compile.integrations.lm_eval.work import Work

__all__ = ["BlockQueue", "Decoder", "Ended", "block_causal_mask", "dense_call"]

Ended = Callable[[Tensor], Tensor]
"""Responses so far, [batch, tokens], to which of them are complete, bool [batch]."""
Call = Callable[..., Any]


def block_causal_mask(tokens: int, block_length: int, device: torch.device) -> Tensor:
    """Bool [1, 1, tokens, tokens]: a token reads its own block and those before."""
    block = torch.arange(tokens, device=device) // block_length
    return (block[:, None] >= block)[None, None]


def dense_call(model: nn.Module, call: Call, *, block_length: int | None, shift: bool) -> Call:
    """`call` as a function of ids [batch, tokens], and a padding mask, to `.logits` in place.

    call: the model, plain or compiled. block_length: of a model that is given a block-causal mask.
    shift: the row before a position scores it.
    """
    named = inspect.signature(model.forward).parameters
    if block_length is not None:

        def logits_of(ids: Tensor, **_: Tensor) -> Tensor:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            mask = block_causal_mask(ids.shape[1], block_length, ids.device)
            return call_with_block_mask(_WithSignature(call, model), ids, mask, positions)  # type: ignore[arg-type]

    else:

        def logits_of(ids: Tensor, **given: Tensor) -> Tensor:
            output = call(ids, **{key: value for key, value in given.items() if key in named})
            return output if isinstance(output, Tensor) else output.logits

    def dense(ids: Tensor, **given: Tensor) -> SimpleNamespace:
        logits = logits_of(ids, **given)
        if shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return SimpleNamespace(logits=logits)

    return dense


@dataclass(frozen=True)
class _WithSignature:
    """A compiled model that shows the signature of the plain one."""

    call: Call
    model: nn.Module

    @property
    def forward(self) -> Any:
        return self.model.forward

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.call(*arguments, **named)


@dataclass
class Decoder:
    """Batches through the sampler, by calling the model on whole sequences."""

    call: Call
    """ids [batch, tokens], and `attention_mask` where prompts are padded, to `.logits`."""
    mask_token_id: int
    pad_token_id: int
    eos_token_id: int | None
    block_length: int
    device: torch.device
    align: bool = False
    """Decode blocks begin at multiples of `block_length` of the whole sequence."""
    generator: torch.Generator | None = None
    work: Work = field(default_factory=Work)

    def decode(
        self, prompts: Sequence[Sequence[int]], request: Request, ended: Ended | None = None
    ) -> list[list[int]]:
        """`request.max_tokens` tokens for each prompt, whatever follows their end included.

        With `align`, prompts have one length.
        """
        longest = max(map(len, prompts))
        if len({len(prompt) for prompt in prompts}) > 1:  # few shapes for batches of any lengths
            longest = math.ceil(longest / self.block_length) * self.block_length
        ids = torch.full((len(prompts), longest), self.pad_token_id, device=self.device)
        real = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=self.device)
            real[row, longest - len(prompt) :] = 1
        padding = None if bool(real.all()) else real
        begun, compiled = time.perf_counter(), _compile_seconds()
        with focus_compile.record() as history:
            calls = 0
            found = ids
            for gen_length, block_length in self._parts(longest, request.max_tokens):
                result = self._generate(found, gen_length, block_length, padding, request, ended)
                calls, found = calls + result.model_calls, result.ids
        rows = sum(entry.rows if entry.kept is None else entry.kept for entry in history)
        self.work += Work(
            responses=len(prompts),
            tokens=len(prompts) * (found.shape[1] - longest),
            model_calls=calls,
            rows=rows if history else calls * found.numel(),
            seconds=time.perf_counter() - begun,
            compile_seconds=_compile_seconds()
            - compiled
            + sum(entry.compile_seconds for entry in history),
        )
        return [row[: request.max_tokens] for row in found[:, longest:].tolist()]

    def _parts(self, prompt: int, max_tokens: int) -> Iterator[tuple[int, int]]:
        """(tokens, block length) of each run of the sampler: whole decode blocks, after one that
        fills up the block in which the prompt ends."""
        block = self.block_length
        first = -prompt % block if self.align else 0
        if first:
            yield first, first
        if max_tokens > first:
            yield math.ceil((max_tokens - first) / block) * block, block

    def _generate(
        self,
        ids: Tensor,
        gen_length: int,
        block_length: int,
        padding: Tensor | None,
        request: Request,
        ended: Ended | None,
    ) -> Any:
        """One run of the sampler; a fixed number of tokens a call is at most a block."""
        blocks = gen_length // block_length
        calls = math.ceil(block_length / min(request.tokens_per_step, block_length))
        return generate(
            self.call,
            ids,
            gen_length=gen_length,
            block_length=block_length,
            steps=None if request.threshold is not None else calls * blocks,
            threshold=request.threshold,
            mask_token_id=self.mask_token_id,
            temperature=request.temperature,
            attention_mask=padding,
            eos_token_id=self.eos_token_id,
            ended=ended if self.eos_token_id is not None else None,
            generator=self.generator,
        )


@dataclass
class BlockQueue:
    """Block diffusion through a BatchGenerator: prompts of any lengths side by side."""

    model: nn.Module
    config: FocusConfig
    options: dict[str, Any]
    """Those of the config that were given."""
    mask_token_id: int
    eos_token_id: int | None
    max_batch: int
    work: Work = field(default_factory=Work)
    _generator: BatchGenerator | None = None

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        stops: Sequence[Sequence[Sequence[int]]],
    ) -> Iterator[tuple[int, list[int]]]:
        """(number of the prompt, its response without what ends it), as they are completed.

        stops: for each prompt the token sequences that end its response.
        """
        if not prompts:
            return
        longest = max(len(p) + r.max_tokens for p, r in zip(prompts, requests, strict=True))
        rules = {(r.tokens_per_step, r.threshold) for r in requests}
        if any(r.temperature for r in requests):
            raise OptionError(
                f"focus_dllm: policy={self.config.policy!r} decodes the most probable tokens; for "
                "a temperature above 0 pass backend=inductor"
            )
        for rule in sorted(rules, key=str):
            chosen = [
                at for at, r in enumerate(requests) if (r.tokens_per_step, r.threshold) == rule
            ]
            generator = self._with_rule(longest, *rule)
            yield from self._run(generator, chosen, prompts, requests, stops)

    def _run(
        self,
        generator: BatchGenerator,
        chosen: Sequence[int],
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        stops: Sequence[Sequence[Sequence[int]]],
    ) -> Iterator[tuple[int, list[int]]]:
        generator.history.clear()
        numbers = {
            generator.submit(list(prompts[at]), requests[at].max_tokens, stops[at]): at
            for at in chosen
        }
        prefilled = sum(len(prompts[at]) for at in chosen)
        while generator.pending:
            begun, compiled = time.perf_counter(), generator.programs.compile_seconds
            done = generator.step()
            self.work += Work(
                responses=len(done),
                tokens=generator.history[-1].decoded,
                model_calls=1,
                rows=generator.history[-1].kept + prefilled,
                seconds=time.perf_counter() - begun,
                compile_seconds=generator.programs.compile_seconds - compiled,
            )
            prefilled = 0
            for completion in done:
                yield numbers[completion.request], list(completion.tokens)

    def _with_rule(
        self, longest: int, tokens_per_step: int, threshold: float | None
    ) -> BatchGenerator:
        """An idle generator with room for `longest` tokens, which decodes by that rule."""
        generator = self._generator
        if generator is None or generator.max_length < longest:
            begun = time.perf_counter()
            generator = self._generator = self._make(longest)
            seconds = time.perf_counter() - begun
            self.work += Work(seconds=seconds, compile_seconds=seconds)
        counts = torch.full_like(generator.state.begin, tokens_per_step)
        generator.decode_counts = counts if threshold is None else None
        generator.threshold = 1.0 if threshold is None else threshold
        return generator

    def _make(self, longest: int) -> BatchGenerator:
        config = self.config
        keys = {name: value for name, value in self.options.items() if name in KEY_OPTIONS}
        return BatchGenerator(
            self.model,
            block_length=config.block_length,
            max_length=max(longest, 2 * config.block_length),
            max_batch=self.max_batch,
            policy=config.policy,
            mask_token_id=self.mask_token_id,
            alpha=config.evict_alpha,
            cut=config.evict_layer,
            eos_token_id=self.eos_token_id,
            merge_projections=config.merge_projections,
            lowering=config.lowering,
            cuda_graphs=config.cuda_graphs,
            key_options=keys if config.policy == COMBINED else None,
        )


def _compile_seconds() -> float:
    """What Dynamo and the backends behind it took in this process so far."""
    return float(calculate_time_spent()["total_wall_time"])
