"""A response decoded by `decode.generate` and recorded, beside dense where that is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus_compile.block_diffusion.batch_generator import KEY_OPTIONS
from focus_compile.config import BLOCK_POLICIES, FocusConfig
from focus_compile.decode.respond import ResponseSettings, ShiftedLogits, block_generator
from focus_compile.decode.sampler import DecodeProgress, GenerateResult, generate
from focus_compile.frontend import compile as focus_compiled
from focus_compile.records.recorder import Recording, recording

__all__ = ["DecodeSettings", "record_decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """How a response is decoded and what is noted of it; options name the mask token."""

    options: dict[str, Any]
    gen_length: int = 64
    steps: int | None = None
    threshold: float | None = None
    temperature: float = 0.0
    seed: int = 0
    shift_logits: bool = False
    """Whether the model's row i scores position i + 1."""
    dense: bool = False
    """Whether dense and focus are also timed, each after a decode that compiles what it needs."""
    attention: bool = True
    logits: bool = False

    def check(self) -> FocusConfig:
        """The options in force.

        Raises:
            OptionError: one that is unknown, out of range, or not read by the policy.
        """
        return self.response().check()

    def response(self) -> ResponseSettings:
        """The same of a response that nobody records."""
        names = ("gen_length", "steps", "threshold", "temperature", "seed", "shift_logits")
        given = {name: getattr(self, name) for name in names}
        return ResponseSettings(options=self.options, **given)

    def noted(self) -> dict[str, Any]:
        """What a record says of the loop."""
        left_out = ("options", "dense", "attention", "logits")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def record_decode(
    model: Any,
    prompt: Tensor,
    settings: DecodeSettings,
    path: Path | None,
    *,
    text: Callable[[list[int]], str] | None = None,
    progress: Callable[[str, DecodeProgress], object] | None = None,
) -> Recording:
    """Decode a response to `prompt` int64 [1, tokens], and record it into `path`.

    text: of a response's ids. progress: given what is being decoded and how far it is.
    """
    config = settings.check()
    in_blocks = config.policy in BLOCK_POLICIES
    arms: dict[str, dict[str, Any]] = {}

    def decode(name: str, by: Any) -> GenerateResult:
        if in_blocks:
            return _decode_blocks(model, prompt, by, name, progress)
        return _decode(by, prompt, config, settings, name, progress)

    if settings.dense:
        plain = model if config.lowering == "eager" else torch.compile(model)
        dense = _whole_blocks(settings) if in_blocks else plain
        arms["dense"] = _timed("dense", dense, decode, text, prompt.shape[1])
        torch.compiler.reset()
    compiled = settings if in_blocks else focus_compiled(model, **settings.options)
    if settings.dense:
        arms["focus"] = _timed("focus", compiled, decode, text, prompt.shape[1])
    with recording(path, attention=settings.attention, logits=settings.logits) as run:
        found = decode("recording", compiled)
        response = found.ids[0, prompt.shape[1] :].tolist()
        run.output(found.ids, None if text is None else text(response))
        run.note(**settings.noted())
        run.record.arms |= arms
        run.record.model["class"] = type(model).__name__
    return run


def _whole_blocks(settings: DecodeSettings) -> DecodeSettings:
    """What decodes in the same blocks, dense."""
    kept = {name: value for name, value in settings.options.items() if name not in KEY_OPTIONS}
    return replace(settings, options=kept | {"policy": "block-diffusion"})


def _decode_blocks(
    model: Any,
    prompt: Tensor,
    settings: DecodeSettings,
    name: str,
    progress: Callable[[str, DecodeProgress], object] | None,
) -> GenerateResult:
    """By a `BatchGenerator` for this prompt alone."""
    wanted = settings.response()
    length = prompt.shape[1] + settings.gen_length
    generator = block_generator(model, None, wanted.check(), length, wanted)
    generator.submit(prompt[0], settings.gen_length)
    ids = prompt.cpu()
    while generator.pending:
        before = ids
        for done in generator.step():
            ids = torch.cat([prompt.cpu(), torch.tensor([done.tokens])], dim=1)
        if progress is not None:
            steps = len(generator.history)
            progress(name, DecodeProgress(before, torch.zeros_like(before).bool(), steps, None))
    return GenerateResult(ids, len(generator.history))


def _timed(
    name: str,
    by: Any,
    decode: Callable[[str, Any], GenerateResult],
    text: Callable[[list[int]], str] | None,
    start: int,
) -> dict[str, Any]:
    """Figures of the second of two decodes; the first one compiles."""
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        found = decode(name, by)
        seconds.append(time.perf_counter() - begun)
    response = found.ids[0, start:].tolist()
    return {
        "model_calls": found.model_calls,
        "seconds": seconds[1],
        "first_seconds": seconds[0],
        "tokens": [response],
        "text": None if text is None else text(response),
    }


def _decode(
    model: Any,
    prompt: Tensor,
    config: FocusConfig,
    settings: DecodeSettings,
    name: str,
    progress: Callable[[str, DecodeProgress], object] | None,
) -> GenerateResult:
    random = torch.Generator(device=prompt.device).manual_seed(settings.seed)
    return generate(
        ShiftedLogits(model) if settings.shift_logits else model,
        prompt,
        gen_length=settings.gen_length,
        steps=settings.steps,
        block_length=config.block_length,
        mask_token_id=config.mask_token_id,
        threshold=settings.threshold,
        temperature=settings.temperature,
        generator=random,
        progress=None if progress is None else lambda state: progress(name, state),
    )
