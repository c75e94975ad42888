"""A user's typed program, which mypy reads with `make lint`: what public names take and give."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

import focus_compile
from focus_compile import Explanation, FocusConfig, StepRecord, WarmUp
from focus_compile.decode import BatchGenerator, GenerateResult, generate


def decode(model: nn.Module, ids: Tensor) -> Tensor:
    config = FocusConfig(mask_token_id=3, keep_ratio=0.25)
    compiled = focus_compile.compile(model, **config.to_dict())
    assert_type(compiled, nn.Module)
    assert_type(focus_compile.explain(model, ids, quiet=True), Explanation)
    assert_type(focus_compile.warmup(compiled, ids), tuple[WarmUp, ...])
    with torch.no_grad(), focus_compile.record() as history:
        logits: Tensor = compiled(ids)
    assert_type(history, list[StepRecord])
    assert_type(history[-1].recall, float | None)
    return logits


def decode_blocks(model: nn.Module, prompt: list[int]) -> list[int]:
    generator = BatchGenerator(model, block_length=32, max_length=512)
    assert_type(generator.submit(prompt, max_new_tokens=64), int)
    return [token for done in generator.results() for token in done.tokens]


def sample(model: nn.Module, ids: Tensor) -> GenerateResult:
    assert_type(focus_compile.__version__, str)
    try:
        return generate(model, ids, gen_length=64, block_length=32)
    except focus_compile.FocusError as error:
        raise SystemExit(str(error)) from error
