"""Heads dealt out to ranks: the sum of the ranks' scores chooses what all heads would."""

from __future__ import annotations

import pytest
import torch

from focus_compile.kernels.attention.op import attention_with_lse
from focus_compile.kernels.block_selection import reference as blocks_reference
from focus_compile.kernels.block_selection.op import (
    block_relevance,
    keep_blocks,
    select_blocks,
)
from focus_compile.kernels.sink_capture import reference as sinks_reference
from focus_compile.kernels.sink_capture.op import capture_sinks, keep_sinks, sink_scores


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_sum_of_parts_chooses_as_the_whole(ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    q = torch.randn(2, 8, 3, 16, generator=generator)
    k, summaries = (torch.randn(2, 4, n, 16, generator=generator) for n in (20, 10))
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    limit, keep = torch.tensor([20, 13]), torch.tensor([4, 12])
    candidates = torch.tensor([9, 10])
    parts = list(zip(q.chunk(ranks, 1), k.chunk(ranks, 1), summaries.chunk(ranks, 1), strict=True))
    relevance = sum(block_relevance(part, weight, s) for part, _, s in parts)
    assert isinstance(relevance, torch.Tensor)
    kept = keep_blocks(relevance, candidates, keep)
    assert torch.equal(kept, select_blocks(q, weight, summaries, candidates, keep))
    scores = torch.zeros(2, 20)
    for part, keys, _ in parts:
        _, lse = attention_with_lse(part, keys, keys, None, 0.25)
        scores += sink_scores(part, keys, lse, weight, None, limit, 0.25)
    _, lse = attention_with_lse(q, k, k, None, 0.25)
    expected = capture_sinks(q, k, lse, weight, None, limit, 5, 0.25)
    assert torch.equal(keep_sinks(scores, limit, 5), expected)


def test_the_halves_are_those_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, n, 8, generator=generator) for n in (3, 12))
    weight, limit = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([12])
    _, lse = attention_with_lse(q, k, k, None, 0.3)
    torch.testing.assert_close(
        block_relevance(q, weight, k), blocks_reference.block_relevance(q, weight, k)
    )
    torch.testing.assert_close(
        sink_scores(q, k, lse, weight, None, limit, 0.3),
        sinks_reference.sink_scores(q, k, lse, weight, None, limit, 0.3),
    )


def test_scores_of_another_dtype_are_refused() -> None:
    scores, limit = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([4])
    with pytest.raises(TypeError, match="float32"):
        keep_blocks(scores, limit, limit)
    with pytest.raises(TypeError, match="float32"):
        keep_sinks(scores, limit, 2)
