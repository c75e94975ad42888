"""DiffusionGemma's own `generate`, with focus as the default backend: steps over the cache of its
encoder, or exact, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
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
LONG_PROMPT, STEPS = 100, 4
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture(autouse=True)
def focus_by_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Op by op: Inductor draws other random numbers for the canvas than eager does."""
    monkeypatch.setenv("FOCUS_COMPILE_LOWERING", "eager")
    torch.compiler.reset()
    torch.compiler.set_default_backend("focus")
    yield
    torch.compiler.set_default_backend(None)


def tiny_model(pairs: int = 1, scale: float = 0.5) -> Any:
    """Pairs of a sliding and a full layer over four experts, weights so large that all matter."""
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
    )

    text = DiffusionGemmaTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2 * pairs,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, global_head_dim=16,
        sliding_window=8, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
        max_position_embeddings=256, layer_types=[SLIDING, FULL] * pairs,
    )  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=None, canvas_length=CANVAS)
    model: Any = DiffusionGemmaForBlockDiffusion._from_config(config, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def generated(
    model: Any, *, compile: bool, prompt: int = PROMPT, pad: int = 0, steps: int = 2
) -> Tensor:
    """Two canvases after a prompt, whose first sequence is padded, [2, prompt + 2 * CANVAS]."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    config = generation.DiffusionGemmaGenerationConfig(
        max_new_tokens=2 * CANVAS, max_denoising_steps=steps, cache_implementation="static",
        pad_token_id=0, eos_token_id=1, bos_token_id=2, disable_compile=not compile,
    )  # fmt: skip
    ids = torch.randint(3, 39, (2, prompt), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    ids[0, :pad] = real[0, :pad] = 0
    torch.manual_seed(2)
    with torch.no_grad():
        return model.generate(ids, attention_mask=real, generation_config=config).sequences


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
    assert "1 of its layers read the whole cache" in lines[0]
    assert "the forward writes into its inputs or buffers" in lines[1]
    assert "past_key_values" in lines[1]


@pytest.fixture(name="options")
def _options(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets options by the environment: generate names a mode, and torch.compile takes a mode or
    options."""

    def chosen(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"FOCUS_COMPILE_{name.upper()}", str(value))

    return chosen


@pytest.mark.parametrize("pad", [0, 9])
def test_steps_over_the_encoder_s_cache_decode_the_same_tokens(
    options: Callable[..., None], pad: int
) -> None:
    """All keys: the canvas is computed in place of the model's own copies of the cache."""
    options(keep_ratio=1, key_block=4)
    model = tiny_model(pairs=4, scale=0.25)
    sizes = {"prompt": LONG_PROMPT, "pad": pad, "steps": STEPS}
    expected = generated(model, compile=False, **sizes)
    with focus_compile.record() as history:
        found = generated(model, compile=True, **sizes)
    assert torch.equal(found, expected)
    decoder = [call.program for call in history if call.program != "exact"]
    canvases = "".join(program[0] for program in decoder).split("r")[1:]
    assert len(canvases) == 2
    assert all(canvas == "s" * (STEPS - 1) for canvas in canvases), decoder


def test_a_step_reads_a_share_of_the_encoder_s_keys(options: Callable[..., None]) -> None:
    options(keep_ratio=0.5, key_block=4, sink_tokens=2)
    model = tiny_model(pairs=4, scale=0.25)
    with focus_compile.record() as history:
        found = generated(model, compile=True, prompt=LONG_PROMPT, steps=STEPS)
    assert found.shape == (2, LONG_PROMPT + 2 * CANVAS)
    steps = [call for call in history if call.program == "step"]
    assert len(steps) == 2 * (STEPS - 1)
    for call in steps:
        prompt = call.keys["dense-prefix"]
        assert prompt in (LONG_PROMPT, LONG_PROMPT + CANVAS)
        assert call.keys["sink-capture"] == prompt
        kept = -(-(prompt // 4) // 2) * 4
        assert call.keys["sparse-suffix"] == kept + prompt % 4 + 2
        assert call.rows == 2 * CANVAS
