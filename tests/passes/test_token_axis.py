"""The row proof on one op at a time: accepted only if rows computed alone equal dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graphs import TracedGraph, rows_alone, trace

HIDDEN, VOCAB = 8, 40
Hook = Callable[[Any, Tensor, Tensor], Any]


class Hooked(nn.Module):
    """Embedding, positions, one attention, then `hook(model, hidden [B, T, 8], ids)`, then head."""

    def __init__(self, hook: Hook) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hook = hook
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Parameter(torch.randn(64, HIDDEN))
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.wide = nn.Linear(2 * HIDDEN, 2 * HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: Tensor) -> Any:
        hidden = self.embedding(ids) + self.positions[: ids.shape[1]]
        batch, length, _ = hidden.shape
        q, k, v = (
            x.view(batch, length, 2, -1).transpose(1, 2) for x in self.qkv(hidden).chunk(3, -1)
        )
        rows = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        hidden = self.hook(self, hidden + rows.reshape(hidden.shape), ids)
        if isinstance(hidden, tuple):
            return self.head(hidden[0]), *hidden[1:]
        return self.head(hidden)


def traced(hook: Hook, batch: int, length: int) -> TracedGraph:
    ids = torch.randint(1, 39, (batch, length), generator=torch.Generator().manual_seed(length))
    (graph,) = trace(Hooked(hook).eval(), ids)
    assert "analysis" not in graph.reason, "a crash is no refusal"
    return graph


def assert_rows_alone_equal_dense(graph: TracedGraph) -> None:
    batch, length = (int(size) for size in (graph.plan.batch, graph.plan.length))
    active = torch.zeros(batch, length, dtype=torch.bool)
    active[:, 0] = True
    active[-1, length // 2] = length > 2
    for alone, dense in rows_alone(graph.programs(), graph.calls[0], active):
        torch.testing.assert_close(alone, dense, rtol=1e-5, atol=1e-5)


ACCEPTED: dict[str, Hook] = {
    "two-tensor max": lambda m, h, i: torch.max(h, m.mix(h)),
    "max over features": lambda m, h, i: h * h.max(-1, keepdim=True).values,
    "argmax over features": lambda m, h, i: h + m.embedding(h.argmax(-1)),
    "norm over features": lambda m, h, i: F.normalize(h, dim=-1),
    "variance over features": lambda m, h, i: h * h.var(-1, keepdim=True),
    "logsumexp over features": lambda m, h, i: h - h.logsumexp(-1, keepdim=True),
    "stack": lambda m, h, i: torch.stack([h, m.mix(h)], 1).mean(1),
    "stack of features": lambda m, h, i: torch.stack([h, m.mix(h)], -1).flatten(-2)[..., ::2],
    "pad features": lambda m, h, i: F.pad(h, (1, 0))[..., :-1],
    "repeat features": lambda m, h, i: h * m.mix(h)[..., :4].repeat(1, 1, 2),
    "heads apart": lambda m, h, i: h.view(*h.shape[:2], 2, 4).softmax(-1).flatten(2),
    "heads merged with the batch": lambda m, h, i: (
        h.view(*h.shape[:2], 2, 4).transpose(1, 2).reshape(-1, h.shape[1], 4).tanh()
        .view(-1, 2, h.shape[1], 4).transpose(1, 2).reshape(h.shape)
    ),
    "tokens merged, mm": lambda m, h, i: (h.reshape(-1, HIDDEN) @ m.mix.weight).view(h.shape),
    "tokens merged, addmm": lambda m, h, i: (
        torch.addmm(m.mix.bias, h.reshape(-1, HIDDEN), m.mix.weight).view(h.shape)
    ),
    "tokens merged, transposed": lambda m, h, i: (
        (m.mix.weight @ h.reshape(-1, HIDDEN).t()).t().reshape(h.shape)
    ),
    "einsum over features": lambda m, h, i: torch.einsum("btd,de->bte", h, m.mix.weight),
    "axes reversed": lambda m, h, i: h.permute(2, 1, 0).tanh().permute(2, 1, 0),
    "number of tokens, static": lambda m, h, i: h / h.shape[1],
    "other ids": lambda m, h, i: h + m.embedding(i.flip(1)),
    "ids transposed": lambda m, h, i: h + m.embedding(i.t()).transpose(0, 1),
    "count of ids": lambda m, h, i: h * (i != 0).cumsum(1)[..., None],
    "one number a sequence": lambda m, h, i: h * i.float().mean(1)[:, None, None],
    "position means": lambda m, h, i: h * m.positions[: h.shape[1]].mean(0),
    "chosen by id": lambda m, h, i: torch.where((i == 3)[..., None], h, m.mix(h)),
    "top two experts": lambda m, h, i: (
        h + m.embedding(m.mix(h).topk(2, -1).indices).mean(-2) * h.topk(2, -1).values[..., :1]
    ),
    "one-hot choices": lambda m, h, i: h * F.one_hot(h.argmax(-1), HIDDEN),
    "pairs as complex numbers": lambda m, h, i: torch.view_as_real(
        torch.view_as_complex(h.unflatten(-1, (-1, 2)))
        * torch.polar(torch.ones(h.shape[1], 4), m.positions[: h.shape[1], :4])
    ).flatten(-2),
    "hidden states returned too": lambda m, h, i: (h, h, m.mix(h)),
}  # fmt: skip
REFUSED: dict[str, tuple[Hook, str]] = {
    "neighbours as complex numbers": (
        lambda m, h, i: torch.view_as_real(
            torch.view_as_complex(h.view(h.shape[0], -1, 2, HIDDEN).mT.contiguous()) * 1j
        ).mT.reshape(h.shape), "cuts through the rows"
    ),
    "max over tokens": (lambda m, h, i: h * h.max(1, keepdim=True).values, "needs every token"),
    "argmax over tokens": (lambda m, h, i: h + m.embedding(h.argmax(1))[:, :1], "every token"),
    "norm over tokens": (lambda m, h, i: F.normalize(h, dim=1), "needs every token"),
    "norm over all": (lambda m, h, i: h / h.norm(dim=(1, 2), keepdim=True), "needs every token"),
    "reversed tokens": (
        lambda m, h, i: h[:, torch.arange(h.shape[1] - 1, -1, -1)], "index.Tensor is not token-wise"
    ),
    "selected tokens": (
        lambda m, h, i: h.index_select(1, torch.arange(h.shape[1]).flip(0)), "indexes the token"
    ),
    "pairs of tokens": (
        lambda m, h, i: m.wide(h.reshape(h.shape[0], -1, 2 * HIDDEN)).view(h.shape),
        "cuts through the rows",
    ),
    "pairs averaged": (
        lambda m, h, i: (
            h + h.view(-1, 2, HIDDEN).mean(1, keepdim=True).expand(-1, 2, -1).reshape(h.shape)
        ),
        "cuts through the rows",
    ),
    "parts of tokens reversed": (
        lambda m, h, i: torch.cat(h.split(1, 1)[::-1], 1), "concatenates along the token axis"
    ),
    "unbound tokens": (lambda m, h, i: h + torch.stack(h.unbind(1)[::-1], 1), "unbind.int"),
    "shift by padding": (lambda m, h, i: F.pad(h, (0, 0, 1, 0))[:, :-1], "slices the token axis"),
    "neighbours unfolded": (
        lambda m, h, i: h + F.pad(h, (0, 0, 1, 1)).unfold(1, 3, 1).mean(-1), "no rule for it"
    ),
    "first token repeated": (
        lambda m, h, i: h * h[:, :1].repeat(1, h.shape[1], 1), "repeats the token axis"
    ),
    "tokens merged, summed": (
        lambda m, h, i: h.flatten(0, 1).cumsum(0).view(h.shape), "works along"
    ),
    "triangular product": (
        lambda m, h, i: torch.ones(h.shape[1], h.shape[1]).tril() @ h, "needs every token"
    ),
    "scores outside attention": (
        lambda m, h, i: h + torch.einsum("btd,bsd->bts", h, h) @ h, "needs every token"
    ),
    "roll where": (
        lambda m, h, i: torch.where((i == 3)[..., None], h, h.roll(1, 1)), "works along the token"
    ),
    "instance norm": (
        lambda m, h, i: F.instance_norm(h.transpose(1, 2)).transpose(1, 2), "no rule for it"
    ),
    "scattered rows": (
        lambda m, h, i: h.masked_scatter(i[..., None] == 3, m.mix(h)), "no rule for it"
    ),
    "random numbers": (lambda m, h, i: h + 0 * torch.rand_like(h), "no rule for it"),
    "attention over heads": (
        lambda m, h, i: F.scaled_dot_product_attention(
            *(h.view(*h.shape[:2], 2, 4) * c for c in (1, 2, 3))
        ).reshape(h.shape),
        "expected tokens@2",
    ),
    "autocast": (lambda m, h, i: _under_autocast(m, h), "autocast is on"),
    "tensor of repeats": (
        lambda m, h, i: h * m.mix(h)[..., :4].repeat_interleave(
            torch.tensor([2, 2, 2, 2]), dim=-1, output_size=8
        ),
        "no rule for how it reads",
    ),
    "positions attended": (
        lambda m, h, i: h + _attended_positions(m.positions[: h.shape[1]]).expand(h.shape),
        "attention over values that are no hidden states",
    ),
}  # fmt: skip
BEHIND: dict[str, Hook] = {
    "pooled output": lambda m, h, i: (h, h[:, 0]),
    "loss": lambda m, h, i: (h, h.mean()),
    "ids returned": lambda m, h, i: (h, i + 1),
}
"""What mixes tokens, or holds none, behind the model."""
BATCH_MIXERS: dict[str, tuple[Hook, str]] = {
    "flip": (lambda m, h, i: h + h.flip(0), "works along the batch axis"),
    "first": (lambda m, h, i: h + h[:1], "broadcast over the batch"),
    "first, unsqueezed": (lambda m, h, i: h + h[0][None], "broadcast over the batch"),
    "product": (
        lambda m, h, i: torch.einsum("ab,bth->ath", torch.ones(h.shape[0], h.shape[0]), h),
        "contracts over the batch axis",
    ),
    "product with the first": (lambda m, h, i: h[:1] @ i.float()[:, :1, None].expand(-1, 8, 8), ""),
}


def _under_autocast(model: Any, hidden: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.mix(hidden)
    return hidden + mixed.float()


def _attended_positions(positions: Tensor) -> Tensor:
    p = positions.view(1, -1, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(p, p * 2, p * 3).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ACCEPTED)
def test_row_wise_ops_are_accepted(name: str) -> None:
    assert_rows_alone_equal_dense(traced(ACCEPTED[name], 2, 6))


@pytest.mark.parametrize("name", BEHIND)
def test_ops_behind_the_model_are_its_tail(name: str) -> None:
    plan = traced(BEHIND[name], 2, 6).plan
    assert not plan.refusals
    assert plan.tail is not None
    assert plan.logits is not None


@pytest.mark.parametrize("name", REFUSED)
def test_ops_that_mix_tokens_are_refused(name: str) -> None:
    hook, why = REFUSED[name]
    graph = traced(hook, 2, 6)
    (refusal,) = graph.call.refusals
    assert why in str(refusal)
    if "token-wise" in refusal.reason:
        assert "test_token_axis.py:" in refusal.where, "the user's line, not torch's"


@pytest.mark.parametrize("name", BATCH_MIXERS)
def test_ops_that_mix_sequences_are_refused_unless_there_is_one(name: str) -> None:
    hook, why = BATCH_MIXERS[name]
    graph = traced(hook, 2, 6)
    assert graph.reason
    assert why in graph.reason
    assert_rows_alone_equal_dense(traced(hook, 1, 6))


SQUARE: dict[str, Hook] = {
    "hidden width": lambda m, h, i: h + h.transpose(1, 2),
    "scrambled": lambda m, h, i: h + h.reshape(h.shape[0], HIDDEN, -1).transpose(1, 2),
    "scrambled only": lambda m, h, i: h.reshape(h.shape[0], HIDDEN, -1).transpose(1, 2),
    "tokens contracted": lambda m, h, i: torch.einsum("btd,te->bed", h, m.mix.weight),
    "batch": lambda m, h, i: h + h.transpose(0, 1),
    "batch and hidden": lambda m, h, i: h + h.permute(1, 2, 0),
    "pooled and stacked": lambda m, h, i: h + torch.stack([h.mean(1)] * h.shape[1], 1),
}


@pytest.mark.parametrize("name", SQUARE)
def test_equal_sizes_are_not_confused(name: str) -> None:
    """Batch, length and width are all 8: shapes tell nothing, the walk must."""
    assert traced(SQUARE[name], 8, 8).reason


def test_the_number_of_tokens_is_refused_where_it_may_change() -> None:
    ids = torch.randint(1, 39, (2, 6))
    (graph,) = trace(Hooked(lambda m, h, i: h * h.shape[1]), ids, dynamic_length=True)
    assert "computes with the number of tokens" in graph.reason


def test_token_ids_are_told_from_position_ids() -> None:
    """Positions are looked up in the larger table, yet the logits tell which ids are the tokens."""

    class WithPositions(Hooked):
        def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
            extra = F.embedding(position_ids, self.positions)
            return super().forward(ids) + self.head(extra)

    ids = torch.randint(1, 39, (2, 6))
    model = WithPositions(lambda m, h, i: h)
    (graph,) = trace(model, ids, position_ids=torch.arange(6).expand(2, 6).contiguous())
    assert not graph.reason
    assert graph.plan.ids.name == "L['ids']"
    assert [r.name for r in graph.plan.inputs if r.role == "guarded"] == ["L['position_ids']"]
