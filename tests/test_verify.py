"""A graph that a pass broke is caught, with the stage and the node named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from focus_compile.errors import PassError
from focus_compile.pipeline import VERIFY, Pipeline
from focus_compile.verify import execute_on_random_inputs, same_results, verify
from tests.graphs import aten_graph

aten = torch.ops.aten


def function(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.mT) * 2).softmax(-1).amax(-1)


def graph() -> fx.GraphModule:
    captured, _ = aten_graph(function, torch.randn(3, 4), torch.randn(5, 4))
    return captured.graph_module


def named(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name)


def wrong_shape(gm: fx.GraphModule) -> None:
    named(gm, "amax").update_arg(1, [0])


def wrong_dtype(gm: fx.GraphModule) -> None:
    named(gm, "softmax").args = (*named(gm, "softmax").args, torch.float64)


def python_function(gm: fx.GraphModule) -> None:
    named(gm, "mul").target = torch.nn.functional.relu
    named(gm, "mul").args = (named(gm, "matmul"),)


def new_input(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(named(gm, "matmul")):
        gm.graph.placeholder("extra")


def wrong_order(gm: fx.GraphModule) -> None:
    named(gm, "matmul").prepend(named(gm, "mul"))


def wrong_value(gm: fx.GraphModule) -> None:
    named(gm, "mul").update_arg(1, 3)


BROKEN: dict[Callable[[fx.GraphModule], None], str] = {
    wrong_shape: r"break: amax is recorded as .*\[3\].* but computes .*\[5\]",
    wrong_dtype: r"break: softmax is recorded as .*float32.* but computes .*float64",
    python_function: r"break: mul calls <function relu.*, which is no operator overload",
    new_input: r"break: the inputs changed from .* to .*extra",
    wrong_order: r"break: the graph does not lint: .*mul",
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_graph_is_caught(break_it: Callable[[fx.GraphModule], None]) -> None:
    gm = graph()
    inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    verify(gm, inputs, "untouched")
    break_it(gm)
    with pytest.raises(PassError, match=BROKEN[break_it]):
        verify(gm, inputs, "break")


def test_a_changed_value_is_caught_by_execution() -> None:
    gm = graph()
    before = execute_on_random_inputs(gm)
    same_results(before, execute_on_random_inputs(gm), "untouched")
    wrong_value(gm)
    with pytest.raises(PassError, match=r"break: the outputs changed by up to 0\.\d+"):
        same_results(before, execute_on_random_inputs(gm), "break")


class Break:
    """A pass that returns a graph with other values."""

    name: ClassVar[str] = "break"

    def __init__(self, break_it: Callable[[fx.GraphModule], None]) -> None:
        self.break_it = break_it

    def apply(self, gm: fx.GraphModule) -> int:
        self.break_it(gm)
        gm.recompile()
        return 1


@pytest.mark.parametrize(
    ("level", "break_it", "caught"),
    [
        ("0", wrong_shape, False),
        ("1", wrong_shape, True),
        ("1", wrong_value, False),
        ("2", wrong_value, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_pipeline_checks_as_much_as_it_is_told(
    level: str,
    break_it: Callable[[fx.GraphModule], None],
    caught: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VERIFY, level)
    graph_pass: Any = Break(break_it)
    if caught:
        with pytest.raises(PassError, match="break: "):
            Pipeline(graph()).run(graph_pass)
    else:
        assert Pipeline(graph()).run(graph_pass) == 1
