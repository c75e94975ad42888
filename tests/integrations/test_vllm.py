"""Why vLLM's models are refused: their attention is an op that writes, over pages of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import focus_compile

LIBRARY = torch.library.Library("vllm_like", "DEF")
LIBRARY.define(
    "unified_attention_with_output("
    "Tensor query, Tensor key, Tensor value, Tensor(a!) output, str layer_name) -> ()"
)


@torch.library.impl(LIBRARY, "unified_attention_with_output", "CPU")
def _attend(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer: str) -> None:
    """Stands for attention of all tokens to all pages."""
    attended = nn.functional.scaled_dot_product_attention(
        *(each.transpose(0, 1) for each in (query, key, value))
    )
    output.copy_(attended.transpose(0, 1))


@torch.library.impl(LIBRARY, "unified_attention_with_output", "Meta")
def _shapes(*arguments: Any) -> None:
    pass


class Decoder(nn.Module):
    """A layer as vLLM's models have them: tokens [T], without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.qkv = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        q, k, v = (layer(hidden).view(-1, 4, 8) for layer in self.qkv)
        out = torch.empty_like(q)
        torch.ops.vllm_like.unified_attention_with_output(q, k, v, out, "layers.0")
        return self.head(out.view(-1, 32))


@torch.no_grad()
def test_attention_that_writes_is_refused_by_name() -> None:
    torch._dynamo.reset()
    model, ids = Decoder().eval(), torch.arange(16)
    found = focus_compile.explain(model, ids, quiet=True, mask_token_id=63)
    assert not found.accepted
    assert "the op vllm_like.unified_attention_with_output.default writes" in str(found)
    assert "BatchGenerator" in str(found)
    compiled = focus_compile.compile(model, mask_token_id=63, lowering="eager")
    assert torch.equal(compiled(ids), model(ids))
