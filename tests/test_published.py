"""Twins of published dLLMs: equal to the oracle, or refused with the line that is why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.passes.block_causality import block_causal_mask
from focus_compile.plan import FRAGMENT
from tests import versions
from tests.compiled import compiled, run_call, seen_steps
from tests.models.published import build_published
from tests.oracle import Oracle
from tests.test_families import MASK, OPTIONS, assert_exact, assert_follows_oracle, trajectory

torch.set_num_threads(1)
LENGTH = trajectory()[0].shape[1]
PADDING = torch.ones(2, LENGTH, dtype=torch.long)
PADDING[0, :3] = 0
FLOATS = torch.linspace(-2, 2, LENGTH * LENGTH).view(1, 1, LENGTH, LENGTH)
BOOLS = (torch.arange(LENGTH) >= torch.arange(LENGTH)[:, None] - 8)[None, None]

ACCEPTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llada": ("llada", {}, {}),
    "llada, fused": ("llada", {"fused": True}, {}),
    "llada, added bias": ("llada", {}, {"attention_bias": FLOATS}),
    "llada, bool bias": ("llada", {}, {"attention_bias": BOOLS}),
    "dream": ("dream", {}, {}),
    "dream, padded": ("dream", {}, {"attention_mask": PADDING}),
    "dream, a mask that hides nothing": (
        "dream", {}, {"attention_mask": torch.ones_like(PADDING)}
    ),
    "dream, positions": ("dream", {}, {"position_ids": torch.arange(LENGTH)[None] + 3}),
    "dream, an empty cache": ("dream", {}, {"use_cache": True}),
    "llada2, grouped": ("llada2", {"experts": "grouped"}, {}),
    "llada2, batched": ("llada2", {"experts": "batched"}, {}),
    "sdar": ("sdar", {"seed": 1}, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=versions.grouped_experts) if "grouped" in case else case
        for case in ACCEPTED
    ],
)
def test_steps_equal_the_oracle(case: str) -> None:
    name, options, inputs = ACCEPTED[case]
    model = build_published(name, **options)
    if options.get("experts") == "grouped":
        options = {"experts": "batched"}  # grouped products know no float64
    assert_follows_oracle(model, build_published(name, **options), **inputs)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llada looks into its mask": (
        "llada", {}, {"attention_mask": PADDING},
        "in logits: if mask is not None and 0.0 in mask",
    ),
    "sdar's layers look at their mask": (
        "sdar", {}, {"attention_mask": block_causal_mask(LENGTH, 4)}, "torch.all(mask)",
    ),
    "llada2's experts in a loop": ("llada2", {"experts": "loop"}, {}, "counts.tolist()"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_forward_that_is_cut_says_where(case: str) -> None:
    name, options, inputs, reason = REFUSED[case]
    assert_exact(build_published(name, **options), trajectory()[0], reason=reason, **inputs)


def test_a_head_over_the_last_rows() -> None:
    """The rows are those of the head over all, and the slice comes after it."""
    model, found = build_published("dream"), []
    for inputs in ({}, {"num_logits_to_keep": 3}):
        focus = compiled(model, mask_token_id=MASK, strict=True)
        found.append([run_call(focus, ids, **inputs) for ids in trajectory()])
    assert "step" in [record.program for _, record in found[0]]
    for (every, one), (last, other) in zip(*found, strict=True):
        assert one.program == other.program
        assert last.shape[1] == 3
        torch.testing.assert_close(last, every[:, -3:])


def test_a_look_at_a_mask_is_no_fallback() -> None:
    """Dynamo cuts it off; what is left is the whole model, and even `strict` has no complaint."""
    focus = compiled(build_published("dream"), mask_token_id=MASK, strict=True)
    with torch.no_grad(), focus_compile.record() as history:
        focus(trajectory()[0], attention_mask=PADDING)
    assert [record.program for record in history] == ["exact", "refresh"]
    assert history[0].why == FRAGMENT.reason


BLOCKS: dict[str, Any] = {
    "whole blocks": {"policy": "block-diffusion"},
    "delayed cache": {"policy": "delayed-cache"},
    "through the cut": {"policy": "focus-evict", "evict_alpha": 1e6},
}


@pytest.mark.parametrize("policy", BLOCKS)
def test_llada2_in_blocks_equals_dense(policy: str) -> None:
    """Nothing is evicted, so that masked rows have the model's own logits in every step.

    The fused projection is one tuple on both sides of the cut.
    """
    model = build_published("llada2", experts="batched")
    options = {"mask_token_id": MASK, "block_length": 4, "strict": True}
    focus = compiled(model, **options, **BLOCKS[policy])
    truth = torch.randint(3, 38, (1, 12), generator=torch.Generator().manual_seed(1))
    programs = []
    for length in (8, 12):
        ids: Tensor = truth[:, :length].clone()
        ids[:, -4:] = MASK
        mask, positions = block_causal_mask(length, 4), torch.arange(length)[None]
        for decided in range(3):
            logits, record = run_call(focus, ids, attention_mask=mask, position_ids=positions)
            with torch.no_grad():
                expected = model(ids, attention_mask=mask, position_ids=positions).logits
            masked = ids[0] == MASK
            torch.testing.assert_close(logits[:, masked], expected[:, masked], rtol=1e-4, atol=1e-4)
            programs.append(record.program)
            ids = ids.clone()
            ids[:, decided - 4] = truth[:, length + decided - 4]
    assert "exact" not in programs
    assert programs.count("step") >= 4


@pytest.mark.parametrize("policy", ["focus-dllm", "dual-cache"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_row_that_scores_a_position_is_learnt_from_the_loop(policy: str, offset: int) -> None:
    """Dream's loop reads a position's score in the row before: that row is computed.

    Nothing but the tokens that the loop decides says so.
    """
    options = {**OPTIONS, "window": 1, "policy": policy}
    model = build_published("dream")
    oracle, focus = Oracle(model, **options), compiled(model, **options)
    ids = trajectory()[0]
    records = []
    with seen_steps() as seen:
        for _ in range(4):
            expected = oracle.call(ids)
            logits, record = run_call(focus, ids)
            assert expected.margin > 1e-4, "choose another seed: this one is a tie"
            torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
            if record.program == "step":
                assert torch.equal(seen[-1].rows, expected.active)
            records.append(record)
            scores = torch.cat([logits[:, :offset], logits[:, : LENGTH - offset]], 1).softmax(-1)
            scores = scores * (ids == MASK)[..., None] * (torch.arange(LENGTH) < 15)[:, None]
            scores[..., MASK] = 0
            best, tokens = scores.max(-1)
            at = best.argmax(1, keepdim=True)
            ids = ids.scatter(1, at, tokens.gather(1, at))
    assert [record.program for record in records] == ["refresh", "step", "step", "step"]
    assert oracle.state is not None
    own, before, decided = oracle.state.scored
    assert (before if offset else own) == decided == 6
