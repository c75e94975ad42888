"""What reads a slice of the logits row by row reads the logits, and is sliced itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from focus_compile.passes.graph_tools import op_name, shape_of
from focus_compile.passes.postpone_slices import PostponeSlices
from focus_compile.passes.remove_no_ops import RemoveNoOps
from tests.graphs import op_names

BATCH, TOKENS, VOCABULARY = 2, 9, 5
Sampler = Callable[[Tensor, Tensor], Any]


def shift(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x[:, :-1]], 1)


def weight() -> Tensor:
    return torch.arange(3.0 * VOCABULARY).reshape(3, VOCABULARY).sin()


def probability_of_best(logits: Tensor) -> Tensor:
    best = logits.argmax(-1, keepdim=True)
    return torch.softmax(logits.double(), -1).gather(-1, best).squeeze(-1)


MOVED: dict[str, Sampler] = {
    "the response": lambda ids, x: x[:, 4:].argmax(-1),
    "every other": lambda ids, x: x[:, ::2].amax(-1),
    "shifted": lambda ids, x: shift(x).argmax(-1),
    "shifted, then the response": lambda ids, x: probability_of_best(shift(x)[:, 4:]),
    "the response's end": lambda ids, x: x[:, 4:][:, -2:].softmax(-1).amax(-1),
    "several results": lambda ids, x: sum(x[:, 2:].max(-1)),
    "top two": lambda ids, x: x[:, 2:].topk(2)[0].select(-1, 1),
    "one vector for all tokens": lambda ids, x: (x[:, 3:] + torch.arange(VOCABULARY)).argmax(-1),
    "a part of the vocabulary": lambda ids, x: x[:, 3:, 1:4].logsumexp(-1),
    "one axis more": lambda ids, x: x[:, 3:].unsqueeze(-1).squeeze(-1).argmax(-1),
    "head of the last": lambda ids, x: F.linear(x[:, -3:], weight()).argmax(-1),
    "product of the last": lambda ids, x: ((x[:, -3:] / 2) @ weight().mT).argmax(-1),
    "two slices": lambda ids, x: (x[:, :4].argmax(-1), x[:, 4:].argmax(-1)),
    "two of one slice": lambda ids, x: (x[:, 4:] * x[:, 4:].exp()).argmax(-1),
    "beside the ids": lambda ids, x: torch.where(ids[:, 4:] == 1, x[:, 4:].argmax(-1), ids[:, 4:]),
    "product over the tokens": lambda ids, x: x[:, 4:].amax(-1) @ torch.ones(TOKENS - 4, 2),
    "layer over the tokens": lambda ids, x: F.linear(x[:, 4:].amax(-1), torch.ones(2, TOKENS - 4)),
    "read sliced as well": lambda ids, x: x[:, 4:].argmax(-1).cumsum(1),
}
STAYED: dict[str, Sampler] = {
    "noise of the slice's size": lambda ids, x: torch.rand_like(x[:, 4:]),
    "over the tokens": lambda ids, x: x[:, 4:].softmax(1),
    "summed over everything": lambda ids, x: x[:, 4:].sum(),
    "turned round": lambda ids, x: x[:, 4:].flip(1),
    "a value for each token": lambda ids, x: x[:, 4:] + ids[:, 4:, None],
    "slices that differ": lambda ids, x: x[:, 4:] - x[:, 3:-1],
    "product of two": lambda ids, x: x[:, 4:] @ x[:, 4:].mT,
    "product of a slice's transpose": lambda ids, x: weight() @ x[:, -3:].mT,
    "largest of all": lambda ids, x: x[:, 4:].max(),
    "any at all": lambda ids, x: x[:, 4:].any(),
    "without axes of one": lambda ids, x: x[:, 4:5].squeeze(),
    "slices of the vocabulary": lambda ids, x: x[:, :, 1:].argmax(-1),
    "no logits": lambda ids, x: x.sum(-1)[:, 4:].exp(),
    "parts of two values": lambda ids, x: torch.cat([x[:, :1], x.exp()[:, :-1]], 1).argmax(-1),
}


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (BATCH, TOKENS), generator=generator)
    return ids, torch.randn(BATCH, TOKENS, VOCABULARY, generator=generator)


def rewritten(sampler: Sampler) -> tuple[fx.GraphModule, int]:
    """The graph of a sampler after the pass, and what the pass counted."""
    gm = make_fx(sampler, tracing_mode="fake", pre_dispatch=True)(*example())
    RemoveNoOps().apply(gm)
    return gm, PostponeSlices(ids_of(gm)).apply(gm)


def ids_of(gm: fx.GraphModule) -> fx.Node:
    return gm.graph.find_nodes(op="placeholder")[0]


def wide_slices(gm: fx.GraphModule) -> list[str]:
    """Selections of tokens of values as wide as the vocabulary."""
    return [
        node.name
        for node in gm.graph.nodes
        if op_name(node) in ("slice.Tensor", "cat.default")
        if shape_of(node)[2:] == [VOCABULARY]
    ]


def same(found: Any, expected: Any) -> None:
    found = found if type(found) is tuple else [found]
    torch.testing.assert_close(
        list(found), list(expected) if type(expected) is tuple else [expected]
    )


@pytest.mark.parametrize("name", MOVED)
def test_hits(name: str) -> None:
    gm, count = rewritten(MOVED[name])
    assert count > 0
    assert not wide_slices(gm)
    for seed in range(3):
        same(gm(*example(seed)), MOVED[name](*example(seed)))
    again = PostponeSlices(ids_of(gm))
    before = op_names(gm)
    assert again.apply(gm) == 0
    assert op_names(gm) == before


@pytest.mark.parametrize("name", STAYED)
def test_near_misses(name: str) -> None:
    gm, count = rewritten(STAYED[name])
    assert count == 0
    for seed in range(3):
        torch.manual_seed(0)
        expected = STAYED[name](*example(seed))
        torch.manual_seed(0)
        same(gm(*example(seed)), expected)


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "response": lambda x: x[:, 2:],
    "shift": shift,
    "stride": lambda x: x[:, ::2],
    "end": lambda x: x[:, -3:],
    "softmax": lambda x: x.softmax(-1),
    "scaled": lambda x: x * 2 + 1,
    "over tokens": lambda x: x - x.amax(1, keepdim=True),
    "sorted": lambda x: x.sort(-1).values,
    "twice": lambda x: torch.cat([x, x], 1),
    "flipped": lambda x: x.flip(1),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_sampler_keeps_its_values(steps: list[str], seed: int) -> None:
    def sampler(ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        for step in steps:
            logits = STEPS[step](logits)
        return logits.argmax(-1), logits

    gm, _ = rewritten(sampler)
    same(gm(*example(seed)), sampler(*example(seed)))
