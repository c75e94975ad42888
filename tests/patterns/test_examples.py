"""Each pattern's examples: hits keep their results, near misses stay and say what failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from focus_compile.passes.match_attention import PATTERNS, MatchAttention
from focus_compile.passes.remove_no_ops import RemoveNoOps
from focus_compile.patterns import grouped_query
from focus_compile.patterns.match import DROPOUT
from focus_compile.patterns.softmax import MatmulSoftmaxMatmul
from tests.graphs import aten_graph, op_names

SITE = "focus_compile.attention.default"
MISSED = {
    "dropout": DROPOUT,
    "wide values": "keys and values differ in width (8 and 16)",
    "three axes": "query has 3 axes, expected [batch, heads, rows, d]",
    "softcap": "the scores come from tanh.default, expected a matrix product",
    "over queries": "softmax is not over the last axis",
    "probabilities reused": "the attention probabilities have 2 users, expected one",
}
"""The condition that each near miss fails."""


def operands(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


def matched(
    function: Callable[..., Any], *examples: torch.Tensor, random: bool = False
) -> tuple[fx.GraphModule, MatchAttention, int]:
    """The canonical graph of `function` after matching, the pass, and the sites it found.

    The graph must compute what `function` does, unless that is random.
    """
    captured, args = aten_graph(function, *examples)
    gm, matching = captured.graph_module, MatchAttention()
    RemoveNoOps().apply(gm)
    found = matching.apply(gm)
    if not random:
        (result,) = gm(*args)
        torch.testing.assert_close(result, function(*examples), rtol=1e-5, atol=1e-5)
    return gm, matching, found


CASES = [(p, *example) for p in PATTERNS for example in p.examples()]


@pytest.mark.parametrize(
    ("pattern", "what", "function", "hit"), CASES, ids=[f"{c[0].name}-{c[1]}" for c in CASES]
)
def test_examples_match_as_they_say(
    pattern: Any, what: str, function: Callable[..., Any], hit: bool
) -> None:
    q, k, v = operands(2, 4, 6, 8)
    gm, matching, found = matched(function, q, k, v, random=what == "dropout")
    if hit:
        assert found == 1
        assert not matching.misses
        assert op_names(gm).count(SITE) == 1
        (node,) = [n for n in gm.graph.nodes if SITE in str(n.target)]
        assert node.meta["spelling"].startswith(pattern.name)
    else:
        assert found == 0
        assert SITE not in op_names(gm)
        (miss,) = matching.misses
        assert miss.reason == f"{pattern.name}: {MISSED[what]}"
        assert ".py:" in miss.where


GROUPED = list(grouped_query.examples())


@pytest.mark.parametrize(
    ("what", "repeat", "hit"), GROUPED, ids=[example[0] for example in GROUPED]
)
def test_repeated_heads_are_stripped_only_in_order(
    what: str, repeat: Callable[..., Any], hit: bool
) -> None:
    """Tiled heads (0 1 0 1) are not the repeated ones (0 0 1 1) of grouped queries."""
    q, k, v = operands(2, 4, 6, 8)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return (q @ repeat(k).mT).softmax(-1) @ repeat(v)

    gm, _, found = matched(attend, q, k[:, :2], v[:, :2])
    (node,) = [n for n in gm.graph.nodes if SITE in str(n.target)]
    assert found == 1
    assert node.args[1].meta["val"].shape[1] == (2 if hit else 4)


def masked_twice(q: Any, k: Any, v: Any) -> Any:
    hidden = torch.ones(6, 6).tril().bool()
    scores = (q @ k.mT).masked_fill(hidden, -1e9) + torch.ones(6, 6)
    return scores.softmax(-1) @ v


NEAR_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "weak fill": (
        lambda q, k, v: (q @ k.mT).masked_fill(torch.eye(6).bool(), -5.0).softmax(-1) @ v,
        "masked scores are filled with -5, which still counts in the softmax",
    ),
    "mask, then scale": (
        lambda q, k, v: ((q @ k.mT + torch.eye(6)) * 0.5).softmax(-1) @ v,
        "the mask is scaled with the scores",
    ),
    "two masks": (masked_twice, "the scores are masked twice"),
    "multiple of a mask": (
        lambda q, k, v: torch.add(q @ k.mT, torch.eye(6), alpha=3).softmax(-1) @ v,
        "a multiple of the mask is added to the scores",
    ),
    "two products": (
        lambda q, k, v: (q @ k.mT + k @ q.mT).softmax(-1) @ v,
        "cannot tell scores from mask in a sum",
    ),
    "number added": (
        lambda q, k, v: (q @ k.mT + 1).softmax(-1) @ v,
        "a number is added to the scores",
    ),
    "learned scale": (
        lambda q, k, v: (q @ k.mT * v[0, 0, 0, 0]).softmax(-1) @ v,
        "the scale is a tensor",
    ),
    "value first": (
        lambda q, k, v: (v.mT @ (q @ k.mT).softmax(-1)).mT,
        "the attention probabilities are consumed by matmul.default",
    ),
    "probabilities masked": (
        lambda q, k, v: ((q @ k.mT).softmax(-1) * torch.eye(6)) @ v,
        "the attention probabilities are consumed by mul.Tensor",
    ),
    "part of the keys": (
        lambda q, k, v: (q @ k[:, :, :3].mT).softmax(-1) @ v[:, :, :3],
        "6 queries and 3 keys: only self-attention over all tokens",
    ),
    "half baddbmm": (
        lambda q, k, v: (
            torch.baddbmm(torch.ones(6, 6), q[0], k[0].mT, beta=0.5).softmax(-1).bmm(v[0])
        ),
        "baddbmm adds a bias that is scaled or masked again",
    ),
    "mixed dtypes": (
        lambda q, k, v: (q.double() @ k.double().mT).softmax(-1).float() @ v,
        "query, key and value are float64, float64 and float32",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_of_softmax_say_what_failed(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    q, k, v = operands(2, 4, 6, 8)
    gm, matching, found = matched(function, q, k, v)
    assert found == 0
    assert SITE not in op_names(gm)
    assert [miss.reason for miss in matching.misses] == [f"{MatmulSoftmaxMatmul.name}: {reason}"]
