"""A model split over ranks decodes the tokens of one process, by the same decisions."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from tests.distributed.cases import BLOCK_CASES, CASES, decode, decode_case, decode_cases, stock
from tests.distributed.ranks import run

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="no gloo in this build of torch"
)
REST = sorted({*CASES, *BLOCK_CASES} - {"focus-evict"})


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, ["focus-evict"]),
        (4, ["focus-dllm"]),
        pytest.param(2, REST, marks=pytest.mark.long),
        pytest.param(4, ["dual-cache", "adaptive"], marks=pytest.mark.long),
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
        tokens, decisions = decode_case(case, over_ranks=False)
        assert any(call[0] != "refresh" for call in decisions), "nothing but refreshes ran"
        for result in found:
            assert torch.equal(result[case][0], tokens), case
            assert result[case][1] == decisions, case


def loaded_split(folder: str) -> nn.Module:
    """The model that transformers splits by its own plan, as under torchrun."""
    from transformers import AutoModelForCausalLM

    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank()}
    os.environ.update({k: str(v) for k, v in place.items()}, WORLD_SIZE=str(dist.get_world_size()))
    how: dict[str, Any] = {"tp_plan": "auto", "attn_implementation": "sdpa"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer ones take a DistributedConfig
        return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def decode_loaded(folder: str) -> Any:
    model = loaded_split(folder)
    split = {type(parameter).__name__ for parameter in model.parameters()}
    return split, decode(model, 1, {})


def test_transformers_own_plan(tmp_path: Path) -> None:
    """`from_pretrained(..., tp_plan="auto")`."""
    whole = stock("llama")
    whole.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "ranks").mkdir()
    found = run(2, tmp_path / "ranks", decode_loaded, str(tmp_path / "model"))
    torch.compiler.reset()
    tokens, decisions = decode(whole, 1, {})
    for result in found:
        if isinstance(result, Exception):
            raise result
        split, (ours, chosen) = result
        assert "DTensor" in split
        assert torch.equal(ours, tokens)
        assert chosen == decisions
