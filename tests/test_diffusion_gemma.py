"""DiffusionGemma's own `generate`, with focus as the default backend: exact, and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.fallback import FocusWarning

pytest.importorskip("transformers.models.diffusion_gemma")
if not hasattr(torch.compiler, "set_default_backend"):
    pytest.skip("this torch has no default backend", allow_module_level=True)

VOCABULARY, PROMPT, CANVAS = 40, 7, 8


@pytest.fixture(autouse=True)
def focus_by_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Op by op: Inductor draws other random numbers for the canvas than eager does."""
    monkeypatch.setenv("FOCUS_COMPILE_LOWERING", "eager")
    torch.compiler.reset()
    torch.compiler.set_default_backend("focus")
    yield
    torch.compiler.set_default_backend(None)


def tiny_model() -> Any:
    """One sliding and one full layer over four experts, weights large enough that all matter."""
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
    )

    text = DiffusionGemmaTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, global_head_dim=16,
        sliding_window=8, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
        max_position_embeddings=256, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=None, canvas_length=CANVAS)
    model: Any = DiffusionGemmaForBlockDiffusion._from_config(config, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model.eval()


def generated(model: Any, *, compile: bool) -> Tensor:
    """Two canvases after a prompt, [2, PROMPT + 2 * CANVAS]."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    config = generation.DiffusionGemmaGenerationConfig(
        max_new_tokens=2 * CANVAS, max_denoising_steps=2, cache_implementation="static",
        pad_token_id=0, eos_token_id=1, bos_token_id=2, disable_compile=not compile,
    )  # fmt: skip
    ids = torch.randint(3, 39, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        ).sequences


def test_generate_gives_the_same_tokens_and_says_why_it_is_exact() -> None:
    model = tiny_model()
    expected = generated(model, compile=False)
    with warnings.catch_warnings(record=True) as seen, focus_compile.record() as history:
        warnings.simplefilter("always")
        found = generated(model, compile=True)
    assert torch.equal(found, expected)
    assert expected[:, PROMPT:].unique().numel() > 3
    assert {record.program for record in history} == {"exact"}
    lines = sorted(str(w.message) for w in seen if issubclass(w.category, FocusWarning))
    assert len(lines) == 2, "one for the decoder, one for the encoder, none for the sampler"
    assert "attention reads a cache" in lines[0]
    assert "8 queries" in lines[0]
    assert "the forward writes into its inputs or buffers" in lines[1]
    assert "past_key_values" in lines[1]
