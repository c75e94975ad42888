"""What a generator lets its caller look at and change, and what its programs are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from focus_compile.block_diffusion import tracing
from focus_compile.config import FocusConfig
from focus_compile.lowering.program import Program
from tests.block_diffusion.tiny import MASK, decoder, generate, generator

BLOCK = 8
PROMPTS = [[3, 1, 4, 1, 5], [9] * 16, [2, 7] * 8]


def evicting(**options: Any) -> Any:
    made = generator(decoder("qwen3"), block_length=BLOCK, alpha=1.0, **options)
    made.decode_counts = torch.ones(made.max_batch, dtype=torch.int64)
    return made


def test_rows_are_ranked_by_what_the_caller_says() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def rank(at_cut: Tensor, before: Tensor) -> Tensor:
        seen.append((at_cut, before))
        return torch.sub(at_cut, before)

    expected = generate(evicting(), PROMPTS, 12)
    assert generate(evicting(rank=rank), PROMPTS, 12) == expected
    assert all(at_cut.dtype == before.dtype == torch.float32 for at_cut, before in seen)
    first = evicting(rank=lambda at_cut, before: -torch.arange(len(at_cut)).float())
    generate(first, [PROMPTS[1]], BLOCK)
    # The first row alone, then also rows whose right neighbour was masked when they were computed.
    assert first.history[0].kept < BLOCK // 2


def test_a_response_can_be_watched() -> None:
    made = evicting(max_batch=1)
    first, second = (made.submit(prompt, 12) for prompt in PROMPTS[:2])
    assert made.partial(first) == made.partial(second) == []
    responses = []
    while made.pending:
        done = made.step()
        watched = made.partial(first)
        if done:
            assert watched == []
            break
        responses.append(watched)
    given = len(PROMPTS[0]) % BLOCK
    assert responses[0].count(MASK) == BLOCK - given - 1
    assert all(len(response) <= 12 for response in responses)
    assert done[0].tokens[: BLOCK - given] == tuple(responses[-1][: BLOCK - given])
    assert MASK not in done[0].tokens


def test_programs_get_the_sizes_that_they_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor takes them for granted; op by op nobody would notice."""
    called: list[tuple[str, dict[str, int]]] = []
    run = Program.__call__

    def check(program: Program, *args: Any) -> tuple[Any, ...]:
        sizes: dict[str, int] = {}
        for spec, value in zip(program.inputs, args, strict=True):
            if spec.shape is not None:
                for size, actual in zip(spec.shape, value.shape, strict=True):
                    if size.is_Symbol:
                        assert sizes.setdefault(str(size), actual) == actual, spec.name
        called.append((program.name, sizes))
        return run(program, *args)

    monkeypatch.setattr(Program, "__call__", check)
    made = evicting(max_batch=3)
    generate(made, [[1] * BLOCK, [2] * 2 * BLOCK, [3] * BLOCK], 2 * BLOCK)
    assert {name for name, _ in called} == {"whole", "prefix", "leave", "suffix"}
    suffix = [sizes for name, sizes in called if name == "suffix"]
    assert any(sizes["listed_rows"] > sizes["chosen_rows"] for sizes in suffix)


def test_models_are_captured_as_often_as_one_likes() -> None:
    config = FocusConfig(
        policy="delayed-cache", mask_token_id=MASK, block_length=BLOCK, lowering="eager"
    )
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            tracing.trace(decoder("llama"), config, 16)
