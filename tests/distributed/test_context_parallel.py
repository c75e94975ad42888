"""Keys and values spread over ranks by position: the tokens and decisions of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch._dynamo.exc import BackendCompilerFailed

import focus_compile
from focus_compile.errors import OptionError
from focus_compile.runtime.store import STORE
from focus_compile.runtime.trajectory import Trajectory
from tests.distributed.cases import Decisions, decode, prompts, split, stock
from tests.distributed.ranks import run
from tests.models.stock import MASK_TOKEN_ID
from tests.runtime.tiny import OPTIONS

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="no gloo in this build of torch"
)

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "focus-dllm": ("llama", 2, {}),
    "no sinks captured, blocks of 3": ("eurobert", 1, {"key_block": 3, "sink_tokens": 0}),
    "dual-cache": ("eurobert", 1, {"policy": "dual-cache"}),
    "lists": ("llama", 1, {"list_reuse": 3}),
    "response": ("qwen3", 1, {"logits": "response", "merge_projections": True}),
    "guard": ("llama", 1, {"guard": 0.5}),
    "inductor": ("llama", 1, {"lowering": "inductor"}),
}
"""Family, batch, options."""
FIRST = ("focus-dllm", "no sinks captured, blocks of 3", "lists")


def decode_case(case: str, **more: Any) -> tuple[Tensor, Decisions]:
    torch.compiler.reset()
    family, batch, options = CASES[case]
    return decode(stock(family), batch, options | more)


def decode_cases(cases: list[str]) -> dict[str, Any]:
    """Each of the cases over all ranks."""
    return {case: decode_case(case, context_parallel="world") for case in cases}


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, list(FIRST)),
        (4, ["response"]),
        pytest.param(2, sorted({*CASES} - {*FIRST}), marks=pytest.mark.long),
        pytest.param(4, sorted({*CASES} - {"inductor"}), marks=pytest.mark.long),
    ],
)
def test_tokens_and_decisions_are_those_of_one_process(
    ranks: int, cases: list[str], tmp_path: Path
) -> None:
    found = run(ranks, tmp_path, decode_cases, cases)
    for result in found:
        if isinstance(result, Exception):
            raise result
    for case in cases:
        tokens, decisions = decode_case(case)
        assert any(call[0] != "refresh" for call in decisions), "nothing but refreshes ran"
        for result in found:
            assert torch.equal(result[case][0], tokens), case
            assert result[case][1] == decisions, case


def sequences(length: int) -> tuple[Tensor, Tensor]:
    """Ids that end in masks, one sequence padded on the left, and their attention mask."""
    ids = torch.cat([prompts(2)[:, : length - 6], torch.full((2, 6), MASK_TOKEN_ID)], 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


def masked_calls(more: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
    """Logits of a few calls of two padded sequences, and the positions that caches hold, at two
    lengths."""
    torch.compiler.reset()
    chosen = {**OPTIONS, "mask_token_id": MASK_TOKEN_ID, "lowering": "eager", "strict": True}
    plain = stock("eurobert")
    model, first = focus_compile.compile(plain, **(chosen | more)), next(plain.parameters())
    found, held = [], []
    for length in (22, 19):
        ids, mask = sequences(length)
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        torch._dynamo.maybe_mark_dynamic(mask, 1)
        for at in range(length - 6, length - 3):
            with torch.no_grad(), focus_compile.record() as calls:
                found.append(model(input_ids=ids, attention_mask=mask).logits.clone())
            assert [call.program for call in calls] != ["exact"]
            ids[:, at] = 1 + at
        trajectory = STORE.slot(first).trajectory
        assert isinstance(trajectory, Trajectory)
        held.append(trajectory.caches[0].shape[2])
    return found, held


def test_padded_sequences_of_several_lengths(tmp_path: Path) -> None:
    expected, held = masked_calls({})
    assert held == [22, 19]
    for result in run(2, tmp_path, masked_calls, {"context_parallel": "world"}):
        if isinstance(result, Exception):
            raise result
        found, held = result
        assert held == [12, 10]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def refusals() -> dict[str, str]:
    """What ranks hear of what cannot be spread."""
    chosen = {**OPTIONS, "mask_token_id": MASK_TOKEN_ID, "lowering": "eager", "strict": True}

    def said(model: Any, ids: Tensor, **more: Any) -> str:
        torch.compiler.reset()
        try:
            with torch.no_grad():
                focus_compile.compile(model, **(chosen | more))(ids)
        except Exception as error:  # Dynamo's, around ours
            return f"{type(error).__name__}: {error}"
        return "no error"

    ids, _ = sequences(22)
    return {
        "few": said(stock("llama"), ids, key_block=30, context_parallel="world"),
        "both": said(split(stock("llama")), ids, context_parallel="world"),
        "unknown": said(stock("llama"), ids, context_parallel="nobody"),
        "group": said(stock("llama"), ids, context_parallel=dist.group.WORLD),
        "differ": said(stock("llama"), ids, context_parallel="world", window=2 + dist.get_rank()),
    }


def test_what_cannot_be_spread_is_refused(tmp_path: Path) -> None:
    for heard in run(2, tmp_path, refusals):
        if isinstance(heard, Exception):
            raise heard
        assert "22 tokens are too few to give each of 2 ranks" in heard["few"]
        assert "would be its keys and values" in heard["both"]
        assert "in no process group 'nobody'" in heard["unknown"]
        assert heard["group"] == "no error"
        assert "ranks differ in options" in heard["differ"]


def test_options_that_have_no_form() -> None:
    model = stock("llama")
    for options in ({"refresh": "adaptive"}, {"policy": "focus-evict"}):
        with pytest.raises(OptionError, match="keys spread over ranks"):
            focus_compile.compile(model, context_parallel="world", **options)
    with pytest.raises(OptionError, match="context_parallel"):
        focus_compile.compile(model, context_parallel=2)


def test_without_processes_it_says_how_to_start_them() -> None:
    ids, _ = sequences(22)
    model = focus_compile.compile(
        stock("llama"), mask_token_id=MASK_TOKEN_ID, context_parallel="world", lowering="eager"
    )
    with pytest.raises(BackendCompilerFailed, match="Run under torchrun"), torch.no_grad():
        model(ids)
