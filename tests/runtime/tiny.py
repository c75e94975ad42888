"""The model, prompt and options that most tests of the runtime share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import focus_compile
from tests.models import ModelSpec, build
from tests.models.network import Dllm, logits_of

SPEC = ModelSpec(layers=2, output="tensor", vocab=24)
MASK = SPEC.mask_token_id
OPTIONS: dict[str, Any] = {
    "mask_token_id": MASK,
    "block_length": 4,
    "dense_layers": 0,
    "expansion": 1,
    "window": 2,
    "keep_ratio": 0.5,
    "sink_tokens": 1,
    "key_block": 2,
}


def tiny_model(seed: int = 0) -> Dllm:
    return build(SPEC, seed)


def shared(model: Any, **options: Any) -> Any:
    """The focus-compiled model; models of one class and options share a graph between tests."""
    chosen = {"lowering": "eager", "dynamic": False} | OPTIONS | options
    return focus_compile.compile(model, **chosen)


def prompt(masks: int = 4, length: int = 12, batch: int = 1, seed: int = 0) -> Tensor:
    """Ids [batch, length] that end in masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, MASK, (batch, length), generator=generator)
    ids[:, length - masks :] = MASK
    return ids


def decided(ids: Tensor, count: int = 1) -> Tensor:
    """A copy in which the first masks of each sequence hold tokens."""
    ids = ids.clone()
    for row in ids:
        row[(row == MASK).nonzero()[:count, 0]] = 1
    return ids


def own_logits(model: Dllm, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(model(ids))


def assert_own(found: Tensor, model: Dllm, ids: Tensor) -> None:
    """`found` are the model's own logits, up to rounding."""
    torch.testing.assert_close(found, own_logits(model, ids), rtol=1e-4, atol=1e-4)
