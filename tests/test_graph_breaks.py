"""A refusal names where Dynamo cut the forward, of this model and of no other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import focus_compile
from tests.models import build
from tests.models.spec import ModelSpec

MASK = 39


class Cut(nn.Module):
    """Its head is in another graph than its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        torch._dynamo.graph_break()
        return self.head(hidden)


def said(model: nn.Module) -> str:
    ids = torch.randint(0, MASK, (1, 12))
    ids[:, 6:] = MASK
    return str(focus_compile.explain(model.eval(), ids, mask_token_id=MASK, quiet=True))


def test_the_line_of_the_cut_is_named_for_the_model_that_was_cut() -> None:
    torch.compiler.reset()
    where = "Dynamo cut a forward at test_graph_breaks.py"
    found = said(Cut())
    assert where in found
    assert "in forward: torch._dynamo.graph_break()" in found
    other = said(build(ModelSpec(attention="softcap", layers=2), 0))
    assert "no attention was recognised" in other
    assert where not in other
