"""With gradients the compiled model is the model: forward, backward, and whatever wraps it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import focus_compile
from focus_compile.backend import focus
from focus_compile.fallback import FocusWarning, forget
from focus_compile.runtime.store import STORE
from tests.compiled import run_call
from tests.models import build, build_stock, logits_of
from tests.models.network import Dllm
from tests.runtime.tiny import MASK, SPEC, assert_own, decided, prompt, shared, tiny_model


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    forget()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy at the masked positions, as dLLMs are trained."""
    hidden = ids == MASK
    return nn.functional.cross_entropy(logits[hidden].float(), torch.ones_like(ids)[hidden])


def gradients(
    call: Callable[[Tensor], Any], model: nn.Module, ids: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(loss, every parameter's gradient) of one training step."""
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FocusWarning)
        loss = loss_of(logits_of(call(ids)), ids)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_trains_as_itself(
    focused: Callable[[Tensor], Any], model: nn.Module, ids: Tensor, bound: float = 1e-4
) -> None:
    """Twice, since the second call finds everything compiled; no state is held meanwhile."""
    for given in (ids, decided(ids)):
        with focus_compile.record() as history:
            found = gradients(focused, model, given)
        assert {entry.program for entry in history} == {"exact"}
        assert STORE.nbytes == 0
        expected = gradients(model, model, given)
        assert found[1]
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def test_forward_and_backward_are_the_models() -> None:
    model = tiny_model().train()
    assert_trains_as_itself(shared(model), model, prompt(batch=2))


def test_training_graphs_go_to_inductor_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """To its own entry point, which compiles forward and backward; here AOTAutograd stands in."""
    from torch._dynamo.backends.debugging import aot_eager
    from torch._inductor import compile_fx

    seen: list[torch.fx.GraphModule] = []

    def noting(gm: torch.fx.GraphModule, inputs: Any, config_patches: Any = None) -> Any:
        seen.append(gm)
        return aot_eager(gm, inputs)

    monkeypatch.setattr(compile_fx, "compile_fx", noting)
    model = tiny_model().train()
    assert_trains_as_itself(shared(model, lowering="inductor"), model, prompt(batch=2))
    (graph,) = seen
    assert any("scaled_dot_product" in str(node.target) for node in graph.graph.nodes)


def test_it_is_said_once_that_gradients_are_on_and_strict_raises() -> None:
    focused: Any = shared(tiny_model())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(3):
            focused(prompt(seed=seed))
    assert sum("gradients are enabled" in str(w.message) for w in said) == 1
    strict: Any = shared(tiny_model(), strict=True)
    with pytest.raises(Exception, match="gradients are enabled"):
        strict(prompt())


class Checkpointed(Dllm):
    """Recomputes each layer's activations in the backward pass."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.embedding(input_ids)
        rotation = None if self.rotation is None else self.rotation(hidden)
        for layer in self.layers:
            again = self.training and torch.is_grad_enabled()
            given = (hidden, input_ids, None, rotation)
            hidden = checkpoint(layer, *given, use_reentrant=False) if again else layer(*given)
        return self.head(self.norm(hidden))


def test_gradient_checkpointing() -> None:
    model = Checkpointed(SPEC, 0).train()
    focused = shared(model)
    assert_trains_as_itself(focused, model, prompt(batch=2))
    model.eval()
    assert run_call(focused, prompt())[1].program == "refresh"
    assert run_call(focused, decided(prompt()))[1].program == "step"


def test_gradient_checkpointing_of_a_stock_model() -> None:
    model: Any = build_stock("eurobert").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    focused = focus_compile.compile(model, lowering="eager", mask_token_id=MASK)
    assert_trains_as_itself(focused, model, prompt(batch=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    model = tiny_model().train()
    focused: Any = shared(model)

    def under_autocast(call: Any) -> Callable[[Tensor], Any]:
        def called(ids: Tensor) -> Any:
            with torch.autocast("cpu", dtype):
                return call(ids)

        return called

    ids = prompt(batch=2)
    found = gradients(under_autocast(focused), model, ids)
    expected = gradients(under_autocast(model), model, ids)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("order", ["compiled inside", "compiled outside"])
def test_distributed_data_parallel(order: str) -> None:
    """DDP around the compiled model, and the compiled model around DDP."""
    model = tiny_model().train()
    if order == "compiled inside":
        focused: Any = DistributedDataParallel(shared(model))
    else:
        focused = shared(DistributedDataParallel(model))
    ids = prompt(batch=2)
    found = gradients(focused, model, ids)
    torch.testing.assert_close(found, gradients(model, model, ids), rtol=1e-4, atol=1e-4)
    model.eval()
    first, later = run_call(focused, prompt()), run_call(focused, decided(prompt()))
    assert_own(first[0], model, prompt())
    assert (first[1].program, later[1].program) in (("refresh", "step"), ("exact", "exact"))


def test_evaluation_between_training_steps() -> None:
    """Each response starts from the weights as they are, and training finds nothing of it."""
    model = tiny_model()
    focused = shared(model)
    plain = copy.deepcopy(model)
    for step in range(3):
        ids = prompt(batch=2, seed=step)
        for trained, call in ((model, focused), (plain, plain)):
            trained.train()
            _, given = gradients(call, trained, ids)
            with torch.no_grad():
                for parameter, gradient in zip(
                    (p for p in trained.parameters() if p.grad is not None), given, strict=True
                ):
                    parameter.sub_(0.1 * gradient)
        model.eval()
        logits, record = run_call(focused, prompt(seed=step))
        assert record.program == "refresh"
        assert_own(logits, plain.eval(), prompt(seed=step))
        assert run_call(focused, decided(prompt(seed=step)))[1].program == "step"


def test_dropout_is_drawn_as_the_model_draws_it() -> None:
    model = build(replace(SPEC, near_miss="dropout")).train()
    focused = shared(model)
    torch.manual_seed(0)
    found = gradients(focused, model, prompt(batch=2))
    torch.manual_seed(0)
    torch.testing.assert_close(found, gradients(model, model, prompt(batch=2)))


def test_frozen_weights_still_count_as_training() -> None:
    """An adapter alone has gradients: the first weight that a graph sees need not."""
    model = tiny_model().train()
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(False)
    assert_trains_as_itself(shared(model), model, prompt(batch=2))
    focus.reset()  # type: ignore[attr-defined]
