"""Models that somebody changed: dropout, hooks, adapters, quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from tests.compiled import compiled, run_call
from tests.graphs import trace
from tests.models import build_stock
from tests.test_families import OPTIONS, assert_exact, assert_follows_oracle, trajectory

torch.set_num_threads(1)

DROPOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "attention": ("llama", "sdpa", {"attention_dropout": 0.1}),
    "attention probabilities": ("llama", "eager", {"attention_dropout": 0.1}),
    "hidden states": ("bert", "sdpa", {"attention_probs_dropout_prob": 0.0}),
}


@pytest.mark.parametrize("case", DROPOUTS)
def test_dropout_is_refused_where_it_is_on(case: str) -> None:
    name, implementation, options = DROPOUTS[case]
    model = build_stock(name, implementation, num_hidden_layers=1, **options)
    for training in (True, False):
        (graph,) = trace(model.train(training), trajectory()[0])
        assert ("model.eval()" in graph.reason) == training, graph.reason


def mlp_of(model: Any) -> Any:
    return model.model.layers[1].mlp


def test_a_hook_is_part_of_the_graph() -> None:
    def hooked() -> nn.Module:
        model = build_stock("llama")
        mlp_of(model).register_forward_hook(lambda module, inputs, output: 1.5 * output)
        return model

    assert_follows_oracle(hooked(), hooked())


def test_a_hook_that_mixes_rows_is_refused() -> None:
    model = build_stock("llama")
    mlp_of(model).register_forward_pre_hook(lambda module, inputs: (inputs[0].roll(1, 1),))
    reason = "roll.default is not token-wise: works along the token axis"
    assert_exact(model, trajectory()[0], reason=reason)


def test_a_hook_that_counts_makes_a_graph_of_every_call() -> None:
    model, calls = build_stock("llama", num_hidden_layers=1), [0]

    def count(*_: object) -> None:
        calls[0] += 1

    mlp_of_first: Any = model.model.layers[0].mlp  # type: ignore[union-attr]
    mlp_of_first.register_forward_hook(count)
    focus = compiled(model, **OPTIONS)
    for number, ids in enumerate(trajectory()[:2], 1):
        logits, record = run_call(focus, ids)
        assert calls == [number]
        assert record.program == "refresh"
        assert torch.equal(logits, model(ids).logits)
        calls[0] -= 1
    assert record.why == "new trajectory: another compiled graph ran this model"


class LowRank(nn.Module):
    """A linear layer and an update of rank 4, with the dropout that training has."""

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(0.1)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        for layer in (self.down, self.up):
            layer.weight.data = 0.3 * torch.randn(layer.weight.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(self.dropout(x)))


class Int8Weights(nn.Module):
    """int8 weights and a scale a row; multiplied as floats."""

    def __init__(self, base: nn.Linear, generator: torch.Generator | None = None) -> None:
        super().__init__()
        weight = base.weight.detach()
        scale = weight.abs().amax(1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))

    scale: Tensor
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Int8Products(Int8Weights):
    """Rows are rounded to int8 as well, each by its own largest value."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        largest = rows.abs().amax(-1, keepdim=True) / 127
        product = torch._int_mm((rows / largest).round().to(torch.int8), self.weight.t())
        return (product * largest * self.scale).to(x.dtype).view(*x.shape[:-1], -1)


def replaced(make: Callable[..., nn.Module], part: str) -> nn.Module:
    """Llama with `make` of every linear layer whose name holds `part`."""
    model, generator = build_stock("llama"), torch.Generator().manual_seed(1)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and part in name:
                setattr(parent, name, make(child, generator))
    return model.eval()


@pytest.mark.parametrize(("make", "part"), [(LowRank, "_proj"), (Int8Weights, "_proj")])
def test_adapters_and_int8_weights_follow_the_oracle(make: Any, part: str) -> None:
    assert_follows_oracle(replaced(make, part), replaced(make, part))


@pytest.mark.parametrize("merge_projections", [False, True])
def test_int8_products_are_row_wise(merge_projections: bool) -> None:
    """Every row is scaled by itself: a step of all keys equals dense where nothing is stale."""
    model = replaced(Int8Products, "_proj")
    options = {**OPTIONS, "policy": "prefix-cache", "block_length": 16, "strict": True}
    focus = compiled(model, **options, merge_projections=merge_projections)
    first, ids = trajectory()[0], trajectory()[0].clone()
    ids[:, 12] = 5
    run_call(focus, first)
    logits, record = run_call(focus, ids)
    assert record.program == "step", record.why
    assert logits.isfinite().all()


def test_tensor_subclasses_say_what_makes_them_plain() -> None:
    model = build_stock("llama", num_hidden_layers=1)
    head: Any = model.lm_head
    head.weight = nn.Parameter(TwoTensor(head.weight.data, head.weight.data), requires_grad=False)
    graphs = trace(model, trajectory()[0])
    assert "tensor subclasses (TwoTensor)" in graphs[0].reason
    assert "torchao.utils.unwrap_tensor_subclass(model)" in graphs[0].reason


def test_peft_lora_follows_the_oracle() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(
            target_modules=["q_proj", "v_proj", "gate_proj"], r=4, lora_dropout=0.1,
            init_lora_weights=False,
        )  # fmt: skip
        return peft.get_peft_model(build_stock("llama"), config).eval()

    assert_follows_oracle(adapted(), adapted())


def test_torchao_weights_step_once_they_are_plain() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    utils = pytest.importorskip("torchao.utils")

    def quantized() -> nn.Module:
        model = build_stock("llama")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    (graph,) = trace(quantized(), trajectory()[0])
    assert "unwrap_tensor_subclass" in graph.reason
    plain = utils.unwrap_tensor_subclass(quantized())
    assert_follows_oracle(plain, plain)
