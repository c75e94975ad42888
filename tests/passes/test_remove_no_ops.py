"""What changes nothing goes, what changes something stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus_compile.passes.remove_no_ops import RemoveNoOps, autocast_is_on
from tests.graphs import aten_graph, op_names


def autocast(enabled: bool) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = x @ x.mT
        return y.float() * 2

    return function


REMOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "same dtype": lambda x: x.to(torch.float32) * 2,
    "type_as itself": lambda x: x.type_as(x.detach()) * 2,
    "contiguous": lambda x: x.contiguous() * 2,
    "dropout off": lambda x: F.dropout(x, 0.5, training=False) * 2,
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True) * 2,
    "whole slice": lambda x: x[:, :] * 2,
    "slice of the exact size": lambda x: x[:, :4] * 2,
    "expand to itself": lambda x: x.expand(3, 4) * 2,
    "identity permute": lambda x: x.permute(0, 1) * 2,
    "detach": lambda x: x.detach() * 2,
    "concatenated with nothing": lambda x: torch.cat([x.new_zeros(0), x, x[:, 4:]], -1) * 2,
}
KEPT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cast": (lambda x: x.to(torch.float64) * 2, "_to_copy"),
    "part of an axis": (lambda x: x[:, 1:] * 2, "slice"),
    "prefix": (lambda x: x[:, :3] * 2, "slice"),
    "every other": (lambda x: x[:, ::2] * 2, "slice"),
    "dropout on": (lambda x: F.dropout(x, 0.5, training=True) * 2, "dropout"),
    "real permute": (lambda x: x.permute(1, 0) * 2, "permute"),
    "concatenated with itself": (lambda x: torch.cat([x, x[:0], x]) * 2, "cat"),
    "concatenated with nothing wider": (
        lambda x: torch.cat([x.new_zeros(0, dtype=torch.float64), x]) * 2, "cat"
    ),
    "real expand": (lambda x: x[:1].expand(3, 4) * 2, "expand"),
}  # fmt: skip


def cleaned(function: Callable[[Tensor], Tensor]) -> tuple[Any, int, tuple[Any, ...]]:
    captured, args = aten_graph(function, torch.arange(12.0).view(3, 4))
    gm = captured.graph_module
    done = RemoveNoOps().apply(gm)
    gm.graph.lint()
    assert RemoveNoOps().apply(gm) == 0, "a second run must find nothing"
    return gm, done, args


@pytest.mark.parametrize("name", REMOVED)
def test_no_ops_are_removed(name: str) -> None:
    gm, _, args = cleaned(REMOVED[name])
    assert op_names(gm) == ["mul.Tensor"]
    assert torch.equal(gm(*args)[0], REMOVED[name](args[0]))


@pytest.mark.parametrize("name", KEPT)
def test_what_changes_something_stays(name: str) -> None:
    function, op = KEPT[name]
    gm, _, args = cleaned(function)
    assert any(op in found for found in op_names(gm))
    if name != "dropout on":
        assert torch.equal(gm(*args)[0], function(args[0]))


def test_views_become_reshapes() -> None:
    gm, done, args = cleaned(lambda x: x.view(4, 3).mT.reshape(2, 6))
    assert op_names(gm) == ["reshape.default", "transpose.int", "clone.default", "reshape.default"]
    assert done == 2
    assert torch.equal(gm(*args)[0], args[0].view(4, 3).mT.reshape(2, 6))


def test_autocast_that_is_off_is_removed() -> None:
    gm, done, _ = cleaned(autocast(enabled=False))
    assert done >= 2
    assert not autocast_is_on(gm.graph)
    assert not any("autocast" in str(node.target) for node in gm.graph.nodes)


def test_autocast_that_is_on_stays_and_is_seen() -> None:
    gm, _, _ = cleaned(autocast(enabled=True))
    assert autocast_is_on(gm.graph)
    assert sum("autocast" in str(node.target) for node in gm.graph.nodes) == 2
