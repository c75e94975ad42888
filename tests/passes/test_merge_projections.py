"""Linear layers of one input become one, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from focus_compile.passes.merge_projections import MergeProjections
from tests.compiled import compiled, run_call
from tests.graphs import op_names
from tests.runtime.tiny import OPTIONS, decided, prompt, tiny_model

linear = torch.ops.aten.linear.default


def graph_of(biases: bool) -> fx.GraphModule:
    """x -> three linears of x and two of what they give, all weights placeholders."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = [graph.placeholder(f"w{number}") for number in range(5)]
    bias = [graph.placeholder(f"b{number}") for number in range(3)] if biases else []
    first = [graph.call_function(linear, (x, weights[n], *bias[n : n + 1])) for n in range(3)]
    total = graph.call_function(torch.ops.aten.cat.default, (first, -1))
    second = [graph.call_function(linear, (total, weight)) for weight in weights[3:]]
    alone = graph.call_function(linear, (second[0], weights[0]))
    graph.output((*first, *second, alone))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("biases", [False, True])
def test_layers_of_one_input_become_one(biases: bool) -> None:
    widths = {"w0": 4, "w1": 2, "w2": 3, "w3": 4, "w4": 7}
    inputs = {"w0": 4, "w1": 4, "w2": 4, "w3": 9, "w4": 9}
    weights = {name: torch.randn(widths[name], inputs[name]) for name in widths}
    weights |= {f"b{number}": torch.randn(widths[f"w{number}"]) for number in range(3 * biases)}
    x = torch.randn(2, 5, 4)
    gm = graph_of(biases)
    expected = gm(x, *weights.values())
    merged = MergeProjections({name: len(weight) for name, weight in weights.items()}).apply(gm)
    assert [item.parts for item in merged] == [
        ("w0", "w1", "w2"), *([("b0", "b1", "b2")] if biases else []), ("w3", "w4"),
    ]  # fmt: skip
    assert op_names(gm).count("linear.default") == 3
    stacked = [torch.cat([weights[part] for part in item.parts]) for item in merged]
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert names[-len(merged) :] == [item.name for item in merged]
    for found, value in zip(gm(x, *weights.values(), *stacked), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_weights_that_are_computed_are_left_alone() -> None:
    gm = graph_of(False)
    assert MergeProjections({}).apply(gm) == ()
    assert op_names(gm).count("linear.default") == 6


@torch.no_grad()
def test_a_new_trajectory_sees_weights_that_changed() -> None:
    """Even through `.data`, which nothing counts."""
    model = tiny_model()
    everything: dict[str, Any] = OPTIONS | {"window": 64, "keep_ratio": 1.0}
    focus = compiled(model, **everything, merge_projections=True)
    for seed in range(3):
        ids = prompt(seed=seed)
        run_call(focus, ids)
        ids = decided(ids)
        logits, record = run_call(focus, ids)
        assert record.program == "step"
        torch.testing.assert_close(logits, model(ids), rtol=1e-4, atol=1e-4)
        for weight in model.parameters():
            if weight.dim() == 2 and seed:
                weight.data.mul_(1.1)
            elif weight.dim() == 2:
                weight.mul_(0.9)
