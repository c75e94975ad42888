"""Masks known before any call: all-True ones are dropped, causal ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_compile.passes import constant_masks
from focus_compile.passes.constant_masks import FoldConstantMasks
from focus_compile.passes.match_attention import MatchAttention
from focus_compile.passes.remove_no_ops import RemoveNoOps
from tests.graphs import aten_graph

Mask = Callable[[nn.Module, Tensor, int], Tensor]
MOST = 16


class Masked(nn.Module):
    """One SDPA over [1, 2, T, 4] with the mask that `make(module, padding, T)` gives."""

    tril: Tensor

    def __init__(self, make: Mask) -> None:
        super().__init__()
        self.make = make
        self.bias = nn.Parameter(torch.zeros(MOST, MOST))
        self.register_buffer("tril", torch.ones(MOST, MOST).tril().bool())
        self.register_buffer("all", torch.ones(MOST, MOST).bool())
        self.register_buffer("added", torch.ones(MOST, MOST).triu(1) * -1e9)

    def forward(self, q: Tensor, padding: Tensor) -> Tensor:
        mask = self.make(self, padding, q.shape[2])
        return F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=mask)


def materialised(_: nn.Module, padding: Tensor, length: int) -> Tensor:
    """The all-True mask that transformers 5.17 makes of unpadded bidirectional attention."""
    positions = torch.arange(length)
    keep = torch.ones((), dtype=torch.bool)
    keep = keep & (positions[None, None, :, None] >= 0) & (positions[None, None, None, :] >= 0)
    return keep.expand(1, 1, length, length)


TRIVIAL: dict[str, Mask] = {
    "ones": lambda m, p, t: torch.ones(t, t, dtype=torch.bool),
    "zeros added": lambda m, p, t: torch.zeros(1, 1, t, t),
    "materialised": materialised,
    "materialised, added": lambda m, p, t: torch.where(materialised(m, p, t), 0.0, -1e30),
    "own distance": lambda m, p, t: (torch.arange(t)[:, None] - torch.arange(t)).abs() < t,
}
KEPT: dict[str, Mask] = {
    "window": lambda m, p, t: (torch.arange(t)[:, None] - torch.arange(t)).abs() < 3,
    "added constant": lambda m, p, t: torch.full((t, t), 0.5),
    "distances": lambda m, p, t: -(torch.arange(t)[:, None] - torch.arange(t)).abs().float(),
    "later keys only": lambda m, p, t: torch.arange(t)[:, None] <= torch.arange(t),
    "padding": lambda m, p, t: p[:, None, None].bool().expand(1, 1, t, t),
    "parameter": lambda m, p, t: m.bias[:t, :t],
    "buffer that may change": lambda m, p, t: m.all[:t, :t],
}
CAUSAL: dict[str, Mask] = {
    "tril": lambda m, p, t: torch.ones(t, t, dtype=torch.bool).tril(),
    "arange": lambda m, p, t: torch.arange(t)[:, None] >= torch.arange(t),
    "added": lambda m, p, t: torch.full((t, t), float("-inf")).triu(1),
    "with padding": lambda m, p, t: torch.ones(t, t).tril().bool() & p[:, None, None].bool(),
    "causal window": lambda m, p, t: materialised(m, p, t).tril().triu(-3),
    "buffer": lambda m, p, t: m.tril[:t, :t],
    "added buffer": lambda m, p, t: m.added[:t, :t],
}


def folded(mask: Mask, dynamic: bool = False) -> tuple[Any, FoldConstantMasks, int]:
    q, padding = torch.randn(1, 2, 7, 4), torch.ones(1, 7, dtype=torch.long)
    if dynamic:
        torch._dynamo.mark_dynamic(q, 2)
        torch._dynamo.mark_dynamic(padding, 1)
    model = Masked(mask)
    captured, args = aten_graph(model, q, padding)
    gm, folding = captured.graph_module, FoldConstantMasks(captured.buffers())
    for earlier in (RemoveNoOps(), MatchAttention()):
        earlier.apply(gm)
    dropped = folding.apply(gm)
    gm.graph.lint()
    torch.testing.assert_close(gm(*args)[0], model(q, padding))
    return gm, folding, dropped


def mask_of(gm: Any) -> Any:
    (site,) = [n for n in gm.graph.nodes if "focus_compile" in str(n.target)]
    return site.args[3]


@pytest.mark.parametrize("name", TRIVIAL)
def test_masks_that_keep_everything_are_dropped(name: str) -> None:
    gm, folding, dropped = folded(TRIVIAL[name])
    assert dropped == 1
    assert mask_of(gm) is None
    assert not folding.causal
    assert FoldConstantMasks().apply(gm) == 0


@pytest.mark.parametrize("name", KEPT)
def test_other_masks_stay(name: str) -> None:
    gm, folding, dropped = folded(KEPT[name])
    assert dropped == 0
    assert mask_of(gm) is not None
    assert not folding.causal


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks_are_reported(name: str) -> None:
    _, folding, dropped = folded(CAUSAL[name])
    assert dropped == 0
    (refusal,) = folding.causal
    assert refusal.reason == "causal attention (explicit mask)"
    assert "test_constant_masks.py" in refusal.where


BY_RANGE = ["ones", "zeros added", "materialised"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", BY_RANGE)
def test_values_that_are_one_value_at_every_length_need_no_evaluation(
    monkeypatch: pytest.MonkeyPatch, name: str, dynamic: bool
) -> None:
    """Long contexts: a mask of 32K x 32K is never made."""
    monkeypatch.setattr(constant_masks, "LARGEST", 0)
    gm, _, dropped = folded(TRIVIAL[name], dynamic)
    assert dropped == 1
    assert mask_of(gm) is None


@pytest.mark.parametrize("name", KEPT)
def test_ranges_never_drop_a_mask_that_hides(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(constant_masks, "LARGEST", 0)
    assert folded(KEPT[name])[2] == 0


@pytest.mark.parametrize("mask", [TRIVIAL["own distance"], KEPT["window"]], ids=["all", "window"])
def test_a_mask_that_depends_on_the_length_is_known_for_one_length_only(mask: Mask) -> None:
    gm, folding, dropped = folded(mask, dynamic=True)
    assert dropped == 0
    assert mask_of(gm) is not None
    assert not folding.causal


def test_a_causal_mask_of_symbolic_length_is_seen() -> None:
    _, folding, _ = folded(CAUSAL["tril"], dynamic=True)
    assert folding.causal


UNKNOWN: dict[str, Mask] = {
    "rounded when filled": lambda m, p, t: torch.full((t, t), 0.5, dtype=torch.long) > 0,
    "lost when filled": lambda m, p, t: torch.full((t, t), 1e-60) > 0,
    "wrapped by a cast": lambda m, p, t: torch.full((t, t), -1).to(torch.uint8) < 0,
    "rounded by a cast": lambda m, p, t: torch.full((t, t), 0.5).to(torch.long) > 0,
    "other bits": lambda m, p, t: torch.ones(t, t).view(torch.int32) <= 1,
}
MIXED: dict[str, Mask] = {
    "bools compared": lambda m, p, t: torch.ones(t, t, dtype=torch.bool) >= 1,
    "bools added": lambda m, p, t: (
        torch.ones(t, t, dtype=torch.bool) + torch.ones(t, t, dtype=torch.bool)
    ),
    "not of numbers": lambda m, p, t: torch.zeros(t, t, dtype=torch.long).logical_not(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_casts_are_not_looked_through(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Their ranges would say that all is kept; the masks hide everything."""
    monkeypatch.setattr(constant_masks, "LARGEST", 0)
    q, padding = torch.randn(1, 2, 7, 4), torch.ones(1, 7, dtype=torch.long)
    captured, _ = aten_graph(Masked(UNKNOWN[name]), q, padding)
    gm = captured.graph_module
    for earlier in (RemoveNoOps(), MatchAttention()):
        earlier.apply(gm)
    assert FoldConstantMasks().apply(gm) == 0


@pytest.mark.parametrize("name", MIXED)
def test_kinds_that_torch_mixes_are_evaluated(name: str) -> None:
    assert folded(MIXED[name])[2] == 1
