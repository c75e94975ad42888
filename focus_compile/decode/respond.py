"""One prompt in words, one response: what `generate` of the command line does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.block_diffusion.batch_generator import KEY_OPTIONS, BatchGenerator
from focus_compile.config import BLOCK_POLICIES, COMBINED, FocusConfig
from focus_compile.decode.canvas import BlockDrawing, Canvas
from focus_compile.decode.sampler import DecodeProgress, generate
from focus_compile.errors import OptionError
from focus_compile.frontend import compile as focus_compiled
from focus_compile.frontend import options_for
from focus_compile.runtime.record import StepRecord, record

__all__ = ["Response", "ResponseSettings", "ShiftedLogits", "encode_prompt", "respond"]

BLOCK_THRESHOLD = 0.9
"""From which probability on block policies decode where neither calls nor threshold are given."""
_BLOCK_OPTIONS = frozenset(
    {
        "policy", "mask_token_id", "block_length", "evict_alpha", "evict_layer", "lowering",
        "cuda_graphs", "merge_projections", *KEY_OPTIONS,
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseSettings:
    """How to decode. `options` of FocusConfig name the mask token."""

    options: dict[str, Any]
    gen_length: int = 128
    """Tokens."""
    steps: int | None = None
    """Model calls in all; None: one for each token, or the threshold of block policies."""
    threshold: float | None = None
    temperature: float = 0.0
    seed: int = 0
    """Of the draws at a temperature above 0."""
    shift_logits: bool = False
    """Whether the model's row i scores position i + 1."""

    def check(self) -> FocusConfig:
        """The options in force.

        Raises:
            OptionError: one that is unknown, out of range, or not read by the policy.
        """
        config = FocusConfig.from_options(self.options)
        if self.steps is not None and self.threshold is not None:
            raise OptionError("generate: steps and threshold exclude each other; give one")
        if config.policy in BLOCK_POLICIES:
            self._check_block(config)
        return config

    def _check_block(self, config: FocusConfig) -> None:
        for name in self.options:
            if name not in _BLOCK_OPTIONS:
                raise OptionError(
                    f"generate: option {name} is not read with policy {config.policy}; known: "
                    f"{', '.join(sorted(_BLOCK_OPTIONS))}"
                )
        if self.temperature or self.shift_logits:
            name = "temperature" if self.temperature else "shift_logits"
            raise OptionError(f"generate: {name} is not read with policy {config.policy}")
        if self.steps is not None and (self.steps < 1 or self.gen_length % self.steps):
            raise OptionError(
                f"generate: steps={self.steps} must divide gen_length={self.gen_length}, so that "
                "every call decodes as many tokens"
            )


@dataclass(frozen=True, slots=True)
class Response:
    """What was decoded and what it took."""

    text: str
    tokens: tuple[int, ...]
    """Ids up to the end token, which is left out."""
    prompt_tokens: int
    model_calls: int
    programs: dict[str, int]
    """Calls by program."""
    rows: int
    """Token rows that the calls computed."""
    seconds: float
    """Decoding, without compilation and drawing."""
    compile_seconds: float
    exact_because: tuple[str, ...] = ()
    """Distinct reasons why calls ran the model itself."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second."""
        return len(self.tokens) / max(self.seconds, 1e-9)


def encode_prompt(tokenizer: Any, text: str, *, chat: bool = True) -> list[int]:
    """Token ids of a prompt: as a user's message where the tokenizer has a chat template.

    Raises:
        OptionError: nothing to read.
    """
    if not text.strip():
        raise OptionError("generate: the prompt is empty")
    if chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        ids = tokenizer(text)["input_ids"]
    return list(ids)


def respond(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    settings: ResponseSettings,
    canvas: Callable[..., Canvas],
) -> Response:
    """Decode one response.

    canvas: makes the live view, given a `program` that names that of the last call and the tokens
    of the prompt that a progress holds.

    Raises:
        FocusError: settings out of range, or a model that the policy cannot serve.
    """
    config = settings.check()
    in_blocks = config.policy in BLOCK_POLICIES
    decode = _decode_blocks if in_blocks else _decode_masks
    return decode(model, tokenizer, prompt, settings, canvas)


def _decode_masks(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    settings: ResponseSettings,
    canvas: Callable[..., Canvas],
) -> Response:
    options = options_for(model, settings.options)
    config = FocusConfig.from_options(options)
    compiled = focus_compiled(model, **options)
    ids = torch.tensor([prompt], device=model.device)
    random = torch.Generator(device=model.device).manual_seed(settings.seed)
    with (
        record() as history,
        canvas(program=lambda: history[-1].program, prompt_tokens=len(prompt)) as view,
    ):
        progress = _Progress(view, history)
        result = generate(
            ShiftedLogits(compiled) if settings.shift_logits else compiled,
            ids,
            gen_length=settings.gen_length,
            steps=settings.steps,
            block_length=config.block_length,
            mask_token_id=config.mask_token_id,
            threshold=settings.threshold,
            temperature=settings.temperature,
            eos_token_id=tokenizer.eos_token_id,
            generator=random,
            progress=progress,
        )
        seconds = time.perf_counter() - progress.begun - view.seconds
    tokens = _until(tokenizer.eos_token_id, result.ids[0, len(prompt) :].tolist())
    return Response(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=len(prompt),
        model_calls=result.model_calls,
        programs=dict(Counter(call.program for call in history)),
        rows=sum(call.rows for call in history),
        seconds=seconds,
        compile_seconds=progress.compile_seconds,
        exact_because=_why_exact(history) if config.policy != "exact" else (),
    )


def _decode_blocks(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    settings: ResponseSettings,
    canvas: Callable[..., Canvas],
) -> Response:
    config = FocusConfig.from_options(options_for(model, settings.options))
    begun = time.perf_counter()
    length = len(prompt) + settings.gen_length
    generator = block_generator(model, tokenizer.eos_token_id, config, length, settings)
    compile_seconds = time.perf_counter() - begun
    history = generator.history
    request = generator.submit(prompt, settings.gen_length)
    with canvas(program=lambda: f"{history[-1].kept} rows", prompt_tokens=0) as view:
        assert config.mask_token_id is not None
        draw = BlockDrawing(view, history, settings.gen_length, config.mask_token_id)
        begun = time.perf_counter()
        tokens: tuple[int, ...] = ()
        while generator.pending:
            for done in generator.step():
                tokens = done.tokens
            compile_seconds += history[-1].compile_seconds
            view.leave_out(history[-1].compile_seconds)
            draw(tokens or generator.partial(request))
        seconds = time.perf_counter() - begun - view.seconds
    return Response(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=len(prompt),
        model_calls=len(history),
        programs={"step": len(history)},
        rows=sum(step.listed for step in history),
        seconds=seconds,
        compile_seconds=compile_seconds,
    )


def block_generator(
    model: Any,
    eos_token_id: int | None,
    config: FocusConfig,
    length: int,
    settings: ResponseSettings,
) -> BatchGenerator:
    """A generator for one sequence of up to `length` tokens."""
    keys = {name: getattr(config, name) for name in KEY_OPTIONS}
    threshold = BLOCK_THRESHOLD if settings.threshold is None else settings.threshold
    generator = BatchGenerator(
        model,
        block_length=config.block_length,
        max_length=max(length, 2 * config.block_length),
        max_batch=1,
        policy=config.policy,
        mask_token_id=config.mask_token_id,
        threshold=threshold,
        alpha=config.evict_alpha,
        eos_token_id=eos_token_id,
        cut=config.evict_layer,
        merge_projections=config.merge_projections,
        lowering=config.lowering,
        cuda_graphs=config.cuda_graphs,
        key_options=keys if config.policy == COMBINED else None,
    )
    if settings.steps is not None:
        each = settings.gen_length // settings.steps
        generator.decode_counts = torch.full_like(generator.state.begin, each)
    return generator


class _Progress:
    """Passes progress on to a canvas, and leaves out what calls took to compile.

    Beside what the records say, that is the first call's time outside of the programs: tracing.
    """

    def __init__(self, view: Canvas, history: Sequence[StepRecord]) -> None:
        self.compile_seconds = 0.0
        self.begun = time.perf_counter()
        self._view, self._history = view, history
        self._seen = 0

    def __call__(self, progress: DecodeProgress) -> None:
        new = self._history[self._seen :]
        compiling = sum(call.compile_seconds for call in new)
        if self._seen == 0:
            running = sum(call.milliseconds for call in new) / 1e3
            compiling += max(0.0, time.perf_counter() - self.begun - running)
        self._seen = len(self._history)
        self.compile_seconds += compiling
        self._view.leave_out(compiling)
        self._view(progress)


class ShiftedLogits:
    """A model whose row i scores position i + 1, as one whose rows score their own positions."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model

    def __call__(self, ids: Tensor, **inputs: Tensor) -> Any:
        output = self._model(ids, **inputs)
        logits = output.logits
        output.logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return output


def _until(end: int | None, ids: list[int]) -> tuple[int, ...]:
    return tuple(ids[: ids.index(end)] if end in ids else ids)


def _why_exact(history: list[StepRecord]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(call.why for call in history if call.program == "exact"))
