"""The peers of the benchmark decode the same: same rows, same tokens, same logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.suite.arms import ArmOptions, make_arm
from benchmarks.suite.cells import Cell
from benchmarks.suite.loop import Canvas, commit, counts_of_block, decode_blocks
from benchmarks.suite.shapes import SHAPES, build
from focus_compile.decode.sampler import generate
from tests.oracle import Oracle

TINY = SHAPES["tiny"].with_layers(4)
CPU = torch.device("cpu")
CONTEXT, BLOCK, GENERATED = 149, 16, 32
OPTIONS = ArmOptions(lowering="eager")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.set_num_threads(1)
    return build(TINY, CPU, torch.float32)


@pytest.fixture(autouse=True)
def clean_compiler() -> None:
    torch.compiler.reset()


@dataclass
class Trace:
    """What an arm did in a whole generation, call by call."""

    programs: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    ids: Tensor = field(default_factory=lambda: torch.empty(0))


def canvas() -> Canvas:
    return Canvas.random(TINY, CONTEXT, GENERATED, BLOCK, CPU, seed=3)


def trace(letter: str, model: nn.Module, per_step: int = 1, alpha: float = 0.25) -> Trace:
    cell = Cell("tiny", CONTEXT, BLOCK, per_step, alpha)
    arm, sequence, seen = make_arm(letter, model, TINY, cell, OPTIONS), canvas(), Trace()
    arm.begin(sequence)
    calls = decode_blocks(
        arm,
        sequence,
        range(sequence.blocks),
        counts_of_block(BLOCK, per_step),
        poison=True,
        observe=lambda _, logits: seen.logits.append(logits.clone()),
    )
    seen.programs = [call.program for call in calls]
    seen.rows = [call.ran.rows for call in calls]
    seen.ids = sequence.ids
    assert all(call.finite for call in calls)
    return seen


def assert_same(left: Trace, right: Trace) -> None:
    assert left.programs == right.programs
    assert left.rows == right.rows
    for ours, theirs in zip(left.logits, right.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(left.ids, right.ids)
    assert not (left.ids == TINY.mask_token_id).any()


@pytest.mark.parametrize("per_step", [1, 3])
def test_fast_dllm_equals_our_dual_cache(model: nn.Module, per_step: int) -> None:
    assert_same(trace("c", model, per_step), trace("d", model, per_step))


@pytest.mark.parametrize(("per_step", "alpha"), [(1, 0.25), (3, 0.5)])
def test_the_focus_arms_agree(model: nn.Module, per_step: int, alpha: float) -> None:
    eager = trace("e", model, per_step, alpha)
    assert_same(eager, trace("f", model, per_step, alpha))
    assert_same(eager, trace("g", model, per_step, alpha))
    assert min(eager.rows) < BLOCK


def test_what_is_kept_and_which_rows_are_computed_matters(model: nn.Module) -> None:
    """Else the arms could agree by ignoring both."""
    some, all_keys, dual = trace("e", model, 1, 0.25), trace("e", model, 1, 1.0), trace("c", model)
    assert not torch.allclose(some.logits[3], all_keys.logits[3], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(all_keys.logits[3], dual.logits[3], rtol=1e-3, atol=1e-3)
    assert torch.allclose(some.logits[0], dual.logits[0], rtol=1e-4, atol=1e-4)


def test_the_eager_focus_arm_is_the_oracle(model: nn.Module) -> None:
    """Teacher-forced by the arm's own ids, over a whole generation."""
    cell = Cell("tiny", CONTEXT, BLOCK, 1, 0.5)
    arm, sequence = make_arm("e", model, TINY, cell, OPTIONS), canvas()
    options: dict[str, Any] = {"block_length": BLOCK, "keep_ratio": 0.5, **TINY.options}
    oracle = Oracle(model, mask_token_id=TINY.mask_token_id, **options)
    arm.begin(sequence)
    for index in range(sequence.blocks):
        block = sequence.block(index)
        for count in counts_of_block(BLOCK, 1):
            logits, expected = arm(sequence, block), oracle.call(sequence.ids)
            assert arm.ran.program == expected.program
            assert arm.ran.rows == int(expected.active.sum())
            torch.testing.assert_close(logits, expected.logits[0, block], rtol=1e-4, atol=1e-4)
            commit(sequence, block, logits, count)


def test_vanilla_compiled_equals_vanilla(model: nn.Module) -> None:
    assert_same(trace("a", model, 4), trace("b", model, 4))


def test_the_loop_decodes_like_the_packages_sampler(model: nn.Module) -> None:
    prompt = canvas().ids[:, :CONTEXT]
    calls = len(counts_of_block(BLOCK, 3)) * GENERATED // BLOCK
    expected = generate(model, prompt, gen_length=GENERATED, block_length=BLOCK, steps=calls)
    assert torch.equal(trace("a", model, 3).ids, expected.ids)
