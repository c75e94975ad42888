"""Ranks that cannot go on together end with an error that says why; none waits for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import focus_compile
from focus_compile.distributed.agreement import of_first_rank, require_same
from focus_compile.distributed.check import check_split
from focus_compile.errors import RanksError
from focus_compile.runtime.programs import Programs
from tests.distributed.cases import prompts, split, stock
from tests.distributed.ranks import run
from tests.models.stock import MASK_TOKEN_ID
from tests.runtime.tiny import OPTIONS

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="no gloo in this build of torch"
)


def said(call: Any, *args: Any, **named: Any) -> str:
    """What a RanksError of the call says; of Dynamo's, the first cause."""
    try:
        with torch.no_grad():
            call(*args, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def model_and_ids(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    ids = torch.cat([prompts(), torch.full((1, 8), MASK_TOKEN_ID)], 1)
    chosen = {**OPTIONS, "mask_token_id": MASK_TOKEN_ID, "lowering": "eager", "strict": True}
    return focus_compile.compile(split(stock("llama")), **(chosen | options)), ids


def quarrels() -> dict[str, str]:
    """What each rank hears where the ranks differ."""
    rank, heard = dist.get_rank(), {}
    heard["facts"] = said(require_same, dist.group.WORLD, {"torch version": "2", "window": rank})
    heard["no facts"] = said(require_same, dist.group.WORLD, {"torch version": "2"})
    heard["costs"] = f"{of_first_rank(dist.group.WORLD, rank + 5)}"
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    uneven = stock("llama", num_attention_heads=2, num_key_value_heads=1)
    query = {"model.layers.0.self_attn.q_proj": ColwiseParallel()}
    heard["heads"] = said(check_split, parallelize_module(uneven, mesh, query))
    mixed = stock("llama")
    mixed.model.layers[0].mlp.double()
    heard["dtypes"] = said(check_split, split(mixed))
    heard["whole"] = said(check_split, stock("llama"))
    model, ids = model_and_ids()
    assert said(model, ids) == "no error"
    ids[:, prompts().shape[1]] = 1 + rank
    heard["ids"] = said(model, ids)
    return heard


def out_of_memory() -> None:
    """One rank has no memory for a step; a process that an error ends leaves the others alone."""
    model, ids = model_and_ids()
    assert said(model, ids) == "no error"
    ids[:, prompts().shape[1]] = 1
    if dist.get_rank() == 1:
        Programs.run_step = _no_memory  # type: ignore[method-assign]
    raise RanksError(said(model, ids))


def _no_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")


def test_ranks_that_differ_are_told_in_what(tmp_path: Path) -> None:
    for heard in run(2, tmp_path, quarrels):
        if isinstance(heard, Exception):
            raise heard
        assert "ranks differ in window: rank 0 has 0, rank 1 has 1" in heard["facts"]
        assert heard["costs"] == "5"
        assert "1 key value heads cannot be split evenly over 2 ranks" in heard["heads"]
        assert "float32" in heard["dtypes"]
        assert "float64" in heard["dtypes"]
        assert heard["whole"] == heard["no facts"] == "no error"
        assert "RanksError" in heard["ids"]
        assert "different ids" in heard["ids"]


def test_a_rank_without_memory_ends_all(tmp_path: Path) -> None:
    first, second = run(2, tmp_path, out_of_memory)
    assert "rank 1 of 2: an incremental program ran out of memory" in str(second)
    assert "another rank has failed" in str(first)
