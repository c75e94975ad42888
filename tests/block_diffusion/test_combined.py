"""The combined policy under torch.compile: keys are chosen, rows leave, finished blocks are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.block_diffusion import dispatch
from tests.block_diffusion.test_dispatch import OPTIONS, B, at_least, best, call, decode, prompts
from tests.block_diffusion.tiny import MASK, decoder, oracle
from tests.compiled import compiled

POLICY = "focus-dllm+evict"
KEYS: dict[str, Any] = {"key_block": 4, "sink_tokens": 3, "dense_layers": 1}


@pytest.mark.parametrize(("name", "batch"), [("qwen3", 1), ("qwen3", 2), ("llama", 2)])
@pytest.mark.parametrize("alpha", [1.0, 1e9])
def test_a_loop_decodes_as_the_oracle(name: str, batch: int, alpha: float) -> None:
    """One token a call: then no sequence's yield depends on the others'."""
    model = decoder(name)
    options = KEYS | {"policy": POLICY, "keep_ratio": 0.5}
    focus = compiled(model, evict_alpha=alpha, **options, **OPTIONS)
    judge = oracle(
        model, block_length=B, alpha=alpha, threshold=2.0, model_first=True, max_length=64, **options
    )
    decode(focus, prompts(batch, 9, length=3 * B), 2, best(4))  # a graph for one length, one for all
    compared = evicted = left_out = 0
    for seed in range(8):
        ids, calls = prompts(batch, seed, length=3 * B), []
        with focus_compile.record() as history:
            found = decode(focus, ids, 2, best(1), lambda *given: calls.append(given))
        for at, (prompt, whole) in enumerate(zip(ids.tolist(), found.tolist(), strict=True)):
            run = judge.generate(prompt, max_new_tokens=2 * B)
            if not run.clear:
                continue
            compared += 1
            assert whole[3 * B :] == run.tokens
            steps = [step for step in run.steps if not step.commits]
            assert len(steps) == len(calls)
            for (given, logits), step in zip(calls, steps, strict=True):
                evicted += len(step.listed) - len(step.kept)
                left_out += sum(map(len, step.left_out.values()))
                for position, expected in step.logits.items():
                    assert given[at, position] == MASK
                    torch.testing.assert_close(logits[at, position], expected, rtol=1e-3, atol=1e-3)
        if compared >= 2:
            break
    assert compared
    assert left_out
    assert bool(evicted) == (alpha == 1.0)
    assert {record.program for record in history} <= {"refresh", "step"}
