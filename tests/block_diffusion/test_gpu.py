"""On a CUDA device: the same tokens as on the CPU, with kernels, Inductor and CUDA graphs.

pytest -m gpu tests/block_diffusion/test_gpu.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from focus_compile.block_diffusion.batch_generator import BatchGenerator
from focus_compile.config import COMBINED
from tests.block_diffusion.test_dispatch import OPTIONS, B, best, call, decode, prompts
from tests.block_diffusion.tiny import MASK, MAX_LENGTH, decoder, generate, generator, oracle
from tests.compiled import compiled

pytestmark = pytest.mark.gpu
KEYS: dict[str, Any] = {"key_block": 4, "sink_tokens": 3, "dense_if_faster": False}
PROMPTS = [[3, 1, 4, 1, 5], list(range(1, 17)), [7] * 9, list(range(5, 28))]


@pytest.mark.parametrize("policy", ["block-diffusion", "delayed-cache", "focus-evict", COMBINED])
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_batch_decodes_as_on_the_cpu(policy: str, lowering: str) -> None:
    """Twice, so that the second time replays what the first one captured."""
    model = decoder("qwen3")
    options: dict[str, Any] = {"block_length": 8, "policy": policy, "threshold": 0.6}
    keys = KEYS if policy == COMBINED else {}
    judge = oracle(model, **options, key_block=4, sink_tokens=3)
    options["key_options"] = keys
    expected = [done.tokens for done in generate(generator(model, **options), PROMPTS, 16)]
    clear = [judge.generate(prompt, max_new_tokens=16).clear for prompt in PROMPTS]
    made = BatchGenerator(
        copy.deepcopy(model).cuda(), max_length=MAX_LENGTH, max_batch=2, mask_token_id=MASK,
        lowering=lowering, evict_if_faster=False, **options,
    )  # fmt: skip
    for _ in range(2):
        found = [done.tokens for done in generate(made, PROMPTS, 16)]
        for ours, theirs, sure in zip(found, expected, clear, strict=True):
            assert ours == theirs or not sure
    assert made.graphs.captured
    assert any(clear)


@pytest.mark.parametrize("policy", ["delayed-cache", "focus-evict"])
def test_after_warmup_nothing_is_compiled_or_captured(policy: str) -> None:
    model = copy.deepcopy(decoder("qwen3")).cuda()
    made = BatchGenerator(
        model, block_length=8, max_length=MAX_LENGTH, max_batch=2, mask_token_id=MASK,
        policy=policy, threshold=0.6, evict_if_faster=False,
    )  # fmt: skip
    captured = made.warmup()
    assert captured == made.graphs.captured > 0
    compiled = [program.compilations for program in made.programs.programs]
    generate(made, PROMPTS, 16)
    assert made.graphs.captured == captured
    assert [program.compilations for program in made.programs.programs] == compiled


@pytest.mark.parametrize("policy", ["delayed-cache", "focus-evict", COMBINED])
def test_a_caller_s_loop_keeps_finished_blocks_exact(policy: str) -> None:
    model = copy.deepcopy(decoder("llama")).cuda()
    keys = KEYS if policy == COMBINED else {}
    focus = compiled(model, policy=policy, **(keys | OPTIONS))

    def see(ids: torch.Tensor, logits: torch.Tensor) -> None:
        dense = call(model, ids)
        torch.testing.assert_close(logits[:, :-B], dense[:, :-B], rtol=2e-3, atol=2e-3)

    decode(focus, prompts(2).cuda(), 3, best(2), see)
