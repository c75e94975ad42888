"""Tiny random decoders, their captured graphs, and what a generator did in every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from focus_compile.block_diffusion import block_model
from focus_compile.block_diffusion.batch_generator import BatchGenerator, Completion
from focus_compile.block_diffusion.tracing import (
    TracedModel,
    call_with_block_mask,
    trace,
)
from focus_compile.config import BLOCK_POLICIES, COMBINED
from tests.block_oracle import BlockOracle

VOCAB = 40
MASK = VOCAB - 1
MAX_LENGTH = 48
DENSE_POLICIES = tuple(policy for policy in BLOCK_POLICIES if policy != COMBINED)
"""Those under which every layer reads all keys."""
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_DECODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 4}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1, "num_hidden_layers": 4}),
}
DECODERS = tuple(_DECODERS)


@cache
def decoder(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """A stock model, with weights large enough that attention matters and tokens get likely."""
    config, model, own = _DECODERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: nn.Module = model(config(**{**_COMMON, **own, **options})).eval()
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
    return made


@cache
def traced_once(
    model: nn.Module, config: Any, max_length: int, call: Any = call_with_block_mask
) -> TracedModel:
    """`trace`, once for a model of this file."""
    with torch._dynamo.config.patch(recompile_limit=256):
        return trace(model, config, max_length, call)


def share_graphs(patch: pytest.MonkeyPatch) -> None:
    """Capture a model once for all generators of the same block length."""
    patch.setattr(block_model, "trace", traced_once)


def generator(model: nn.Module, **options: Any) -> BatchGenerator:
    """With the mask of these models, and op by op unless `lowering` is given."""
    defaults = {"max_length": MAX_LENGTH, "mask_token_id": MASK, "lowering": "eager"}
    return BatchGenerator(model, **{**defaults, **options})


def oracle(model: nn.Module, **options: Any) -> BlockOracle:
    return BlockOracle(model, **{"max_length": MAX_LENGTH, "mask_token_id": MASK, **options})


def generate(
    made: BatchGenerator, prompts: list[list[int]], tokens: int, **options: Any
) -> list[Completion]:
    """The completions of all prompts, in their order."""
    numbers = [made.submit(prompt, tokens, **options) for prompt in prompts]
    done = {completion.request: completion for completion in made.results()}
    assert made.pending == 0
    return [done[number] for number in numbers]


@dataclass
class SequenceStep:
    """What one step did with one sequence; all positions are absolute and ascending."""

    listed: list[int]
    kept: list[int]
    decoded: list[int]
    logits: dict[int, Tensor]
    """[V] of each kept masked row, before the mask token is ruled out."""


@dataclass
class Watch:
    """Records what a generator's steps do with every request."""

    made: BatchGenerator
    steps: dict[int, list[SequenceStep]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._wrap(self.made.state, "listing", self._see_listing)
        self._wrap(self.made.programs, "run_whole", self._see_logits)
        self._wrap(self.made.programs, "run_suffix", self._see_logits)
        advance = self.made.state.advance
        object.__setattr__(self.made.state, "advance", self._advancing(advance))

    def _wrap(self, owner: Any, name: str, see: Callable[[Any], None]) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            result = function(*args, **named)
            see(result)
            return result

        object.__setattr__(owner, name, wrapped)

    def _see_listing(self, listing: Any) -> None:
        self.listing = listing

    def _see_logits(self, outputs: tuple[Tensor, ...]) -> None:
        self.logits = outputs[self.made.programs.plan.logits][0].clone()

    def _advancing(self, advance: Callable[..., None]) -> Callable[..., None]:
        def wrapped(computed: Any, scored: Any, *args: Any, **named: Any) -> None:
            state = self.made.state
            begin, masked = state.begin.tolist(), state.masked()
            requests = [slot and slot.request.number for slot in self.made._slots]
            advance(computed, scored, *args, **named)
            decoded = masked & ~state.masked()
            for at, request in enumerate(requests):
                if request is None:
                    continue
                first = at * state.block_length

                def of(index: Tensor, where: Tensor, first: int = first, at: int = at) -> list[int]:
                    local = (index[where] - first).tolist()
                    return [begin[at] + i for i in local if 0 <= i < state.block_length]

                every = torch.arange(decoded.numel())
                scores = scored.masked & (scored.index // state.block_length == at)
                step = SequenceStep(
                    of(self.listing.index, self.listing.real),
                    of(computed.index, computed.real),
                    of(every, decoded.flatten()),
                    dict(zip(of(scored.index, scores), self.logits[scores], strict=True)),
                )
                self.steps.setdefault(request, []).append(step)

        return wrapped
