"""Deep programs run as a chain of segments: what the graph computes, each kind compiled once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import focus_compile
from focus_compile.lowering import program as lowering
from focus_compile.lowering.layer_chain import FEWEST_LAYERS
from focus_compile.lowering.program import InputSpec, Program
from tests.compiled import run_call
from tests.models import ModelSpec, build
from tests.runtime.tiny import MASK, assert_own, decided, prompt, shared

ROWS = sympy.Symbol("rows", integer=True, positive=True)
WIDTH = 4


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def layered(pattern: list[int], observed: int, passed: int) -> fx.GraphModule:
    """(x [rows, 4], then a weight and a cache [rows, 4] a layer) -> the last hidden state, and the
    attention of layer `observed`. Every layer writes its keys; `pattern` scales its product; the
    input is read again by layer `passed`."""

    def forward(x: Tensor, weights: list[Tensor], caches: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows = x.size(0)
        first, seen = x.sin(), x
        hidden = x.cos()
        for layer, (kind, weight, cache) in enumerate(zip(pattern, weights, caches, strict=True)):
            key = torch.nn.functional.linear(hidden, weight)
            cache.copy_(key)
            heads = [part.reshape(1, 1, rows, WIDTH) for part in (hidden, cache, key)]
            out = torch.ops.focus_compile.attention.default(*heads, None, 0.5)
            out = out.reshape(rows, WIDTH)
            if layer == observed:
                seen = out
            if layer == passed:
                out = out + first
            hidden = hidden + torch.nn.functional.linear(out * (kind + 1), weight).tanh()
        return hidden.tanh() @ weights[0], seen

    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = [graph.placeholder(f"weight_{at}") for at in range(len(pattern))]
    caches = [graph.placeholder(f"cache_{at}") for at in range(len(pattern))]
    tracer = fx.proxy.GraphAppendingTracer(graph)
    given = [[fx.Proxy(n, tracer) for n in nodes] for nodes in ([x], weights, caches)]
    hidden, seen = forward(given[0][0], *given[1:])
    graph.output((hidden.node, seen.node))
    return fx.GraphModule({}, graph)


def program_of(graph: fx.GraphModule, layers: int) -> Program:
    four = sympy.Integer(WIDTH)
    inputs = [InputSpec("x", (ROWS, four))]
    inputs += [InputSpec(f"weight_{at}", (four, four), static=True) for at in range(layers)]
    inputs += [InputSpec(f"cache_{at}", (ROWS, four), static=True) for at in range(layers)]
    return Program("layered", graph, inputs)


def arguments(layers: int, rows: int) -> list[Tensor]:
    weights = [torch.randn(WIDTH, WIDTH) for _ in range(layers)]
    return [torch.randn(rows, WIDTH), *weights, *(torch.zeros(rows, WIDTH) for _ in weights)]


def check(program: Program, graph: fx.GraphModule, layers: int, rows: int) -> None:
    args = arguments(layers, rows)
    expected_args = [arg.clone() for arg in args]
    torch.testing.assert_close(program(*args), graph(*expected_args))
    torch.testing.assert_close(args, expected_args)


@given(
    pattern=st.lists(st.integers(0, 2), min_size=FEWEST_LAYERS, max_size=12),
    observed=st.integers(0, 11),
    passed=st.integers(0, 11),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_chain_is_its_graph(
    monkeypatch: pytest.MonkeyPatch, pattern: list[int], observed: int, passed: int
) -> None:
    """For any number of rows, caches included; layers of the same code share a segment."""
    compiled = []
    monkeypatch.setattr(
        lowering, "compile_fx", lambda graph, fakes, **_: compiled.append(graph) or graph
    )
    graph = layered(pattern, observed, passed)
    program = program_of(graph, len(pattern))
    for rows in (5, 3, 8):
        check(program, graph, len(pattern), rows)
    assert program.compilations == 1
    middle = [(k, at == observed, at == passed) for at, k in enumerate(pattern)][1:-1]
    assert len(program.segments) == len(pattern)
    assert len(compiled) == len(set(middle)) + 2  # the first layer and the last are of no kind
    assert len(set(program.segments)) == len(compiled)


def test_what_no_region_reads_again_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(graph: Any, fakes: list[Any], **_: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal most
            outputs = graph(*args)
            made.extend(weakref.ref(v) for v in outputs if isinstance(v, Tensor))
            most = max(most, sum(seen() is not None for seen in made))
            return outputs

        return run

    monkeypatch.setattr(lowering, "compile_fx", watched)
    layers = 12
    program = program_of(layered([0] * layers, 0, 0), layers)
    program(*arguments(layers, 4))
    assert len(made) >= 2 * layers
    assert most <= 6


@pytest.mark.parametrize("why", ["shallow", "context", "constant"])
def test_compiled_whole(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    compiled = []
    monkeypatch.setattr(
        lowering, "compile_fx", lambda graph, fakes, **_: compiled.append(graph) or graph
    )
    layers = FEWEST_LAYERS - (why == "shallow")
    gm = layered([0] * layers, 0, 0)
    first = next(node for node in gm.graph.nodes if node.op == "call_function")
    with gm.graph.inserting_before(first):
        if why == "context":
            gm.graph.call_function(torch._C._set_grad_enabled, (False,))
        if why == "constant":
            gm.register_buffer("one", torch.ones(WIDTH))
            (x,) = (node for node in gm.graph.nodes if node.name == "x")
            first.replace_input_with(
                x, gm.graph.call_function(torch.add, (x, gm.graph.get_attr("one")))
            )
    gm.recompile()
    program = program_of(gm, layers)
    with torch.no_grad():  # puts back what the context leaves behind
        check(program, gm, layers, 4)
    assert len(compiled) == 1
    assert program.segments == (0,)


@torch._dynamo.config.patch(specialize_float=True)
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_deep_model_by_inductor(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    """Refreshes are the model's own; steps are those of the graph run op by op."""
    torch.set_num_threads(1)
    compiled, compile_fx = [], lowering.compile_fx

    def counted(graph: Any, fakes: list[Any], **options: Any) -> Any:
        compiled.append(graph)
        return compile_fx(graph, fakes, **options)

    monkeypatch.setattr(lowering, "compile_fx", counted)
    model = build(ModelSpec(layers=10, output="tensor", vocab=24, hidden=16))
    options = {"dynamic": dynamic, "dense_layers": 2}
    by_inductor = shared(model, lowering="inductor", **options)
    op_by_op = shared(model, lowering="eager", **options)
    lengths = (24, 28) if dynamic else (24,)
    for length in lengths:
        ids = prompt(masks=8, length=length, seed=length)
        logits, record = run_call(by_inductor, ids)
        assert record.program == "refresh", record.why
        assert_own(logits, model, ids)
        calls = [decided(ids, count) for count in (1, 2, 3)]
        found = [run_call(by_inductor, call) for call in calls]
        assert [record.program for _, record in found] == ["step"] * 3
        expected = [run_call(op_by_op, call)[0] for call in (ids, *calls)]
        for (logits, _), theirs in zip(found, expected[1:], strict=True):
            torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)
    assert len(compiled) <= 12  # of 20 layers in two programs


@pytest.mark.slow
def test_explain_lists_every_layer_of_a_chain() -> None:
    torch.set_num_threads(1)
    model = build(ModelSpec(layers=9, norm="functional_rmsnorm", mlp="gelu", hidden=16))
    ids = prompt(masks=4, length=16)
    found = focus_compile.explain(
        model, ids, quiet=True, kernels=True, mask_token_id=MASK, dense_layers=2, key_block=4
    )
    (graph,) = found.to_dict()["graphs"]
    for name in ("refresh", "step"):
        launches = graph["kernels"][name]["launches"]
        attentions = sum("attention" in launch["name"] for launch in launches)
        assert attentions == 9, name
        linear = sum(launch["kind"] == "linear" for launch in launches)
        assert linear == dict(found.graphs[0].plan.operations)["linear"], name
    assert graph["kernels"]["step"]["layers"].keys() == {
        "dense-prefix", "sink-capture", "sparse-suffix",
    }  # fmt: skip
