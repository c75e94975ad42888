"""flex_attention becomes SDPA with a dense mask, and its block mask's builder goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from focus_compile.capture import CaptureRefused, capture, copy_graph_module
from focus_compile.passes.flex_attention import NormalizeFlexAttention

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 16, 8


def normalised(
    function: Callable[..., Any], *examples: Tensor
) -> tuple[fx.GraphModule, tuple[Any, ...], int]:
    """Dynamo's graph of `function` after the pass, its inputs, and the calls rewritten."""
    torch._dynamo.reset()
    found: list[Any] = []

    def collect(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        work = copy_graph_module(gm)
        done = NormalizeFlexAttention().apply(work)

        def run(*args: Any) -> Any:
            found.append((work, args, done))
            return (examples[0],) * len(gm.graph.output_node().args[0])  # type: ignore[arg-type]

        return run

    with torch.no_grad():
        torch.compile(function, backend=collect, fullgraph=True)(*examples)
    return found[0]


def operands(kv_heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, kv_heads, kv_heads)
    return [torch.randn(BATCH, h, LENGTH, WIDTH, generator=generator) for h in heads]


MASKS: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "window": (lambda b, h, q, k: (q - k).abs() < 4, lambda q, k: (q - k).abs() < 4),
    "causal": (lambda b, h, q, k: q >= k, lambda q, k: q >= k),
    "keys alone": (lambda b, h, q, k: k < 10, lambda q, k: (k < 10) & (q >= 0)),
    "everything": (lambda b, h, q, k: q >= 0, lambda q, k: (q >= 0) & (k >= 0)),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_attention_with_a_dense_mask(name: str) -> None:
    mask_mod, dense = MASKS[name]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        blocks = create_block_mask(mask_mod, None, None, LENGTH, LENGTH, device="cpu")
        return flex_attention(q, k, v, block_mask=blocks, scale=0.3)

    gm, args, done = normalised(function, *operands())
    assert done == 1
    positions = torch.arange(LENGTH)
    mask = dense(positions[:, None], positions)
    expected = F.scaled_dot_product_attention(*operands(), attn_mask=mask, scale=0.3)
    torch.testing.assert_close(gm(*args)[0], expected)
    targets = [str(node.target) for node in gm.graph.nodes]
    assert not any("flex" in target or "vmap" in target for target in targets)
    assert NormalizeFlexAttention().apply(gm) == 0


def test_fewer_kv_heads_and_no_mask() -> None:
    gm, args, done = normalised(
        lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), *operands(kv_heads=2)
    )
    assert done == 1
    expected = F.scaled_dot_product_attention(*operands(kv_heads=2), enable_gqa=True)
    torch.testing.assert_close(gm(*args)[0], expected)


def test_a_log_sum_exp_that_is_cast_and_dropped() -> None:
    """As transformers calls it on all devices but the CPU."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        attended, sums = flex_attention(q, k, v, return_lse=True)
        for _ in range(64):  # as many paths as a deep model has, each looked at once
            sums, attended = sums + sums.to(v.dtype), attended + attended
        return attended

    gm, args, done = normalised(function, *operands())
    assert done == 1
    expected = F.scaled_dot_product_attention(*operands()) * 2.0**64
    torch.testing.assert_close(gm(*args)[0], expected)


def test_a_mask_of_a_captured_tensor() -> None:
    lengths = torch.tensor([16, 9])

    def function(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        def real(b: Any, h: Any, i: Any, j: Any) -> Any:
            return j < lengths[b]

        blocks = create_block_mask(real, BATCH, None, LENGTH, LENGTH, device="cpu")
        return flex_attention(q, k, v, block_mask=blocks)

    gm, args, done = normalised(function, *operands(), lengths)
    assert done == 1
    mask = (torch.arange(LENGTH) < lengths[:, None])[:, None, None]
    expected = F.scaled_dot_product_attention(*operands(), attn_mask=mask)
    torch.testing.assert_close(gm(*args)[0], expected)


OTHERS: dict[str, Callable[..., Any]] = {
    "score_mod": lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + i - j),
    "log-sum-exp": lambda q, k, v: flex_attention(q, k, v, return_lse=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_uses_stay_and_are_refused(name: str) -> None:
    gm, args, done = normalised(OTHERS[name], *operands())
    assert done == 0
    assert any("flex_attention" in str(node.target) for node in gm.graph.nodes)
    with pytest.raises(CaptureRefused, match=r"score_mod, or whose log-sum-exp .* BlockMask"):
        capture(gm, args)
