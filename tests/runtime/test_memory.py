"""State is bounded, and freed with the model and by torch.compiler.reset()."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from focus_compile.runtime.latest_rows import MOST_COPIES
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.store import STORE
from tests.compiled import run_call
from tests.runtime.tiny import decided, prompt, shared, tiny_model


def test_state_goes_with_the_model() -> None:
    model = tiny_model()
    focus = shared(model)
    run_call(focus, prompt())
    run_call(focus, decided(prompt()))
    held = STORE.nbytes
    assert held > 0
    gone = weakref.ref(model), weakref.ref(STORE.slot(model.embedding.weight).trajectory)
    del model, focus
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert STORE.nbytes == 0


def test_one_of_two_models_goes() -> None:
    models = [tiny_model(seed) for seed in range(2)]
    focus = [shared(model) for model in models]
    for model in focus:
        run_call(model, prompt())
    both = STORE.nbytes
    del models[0], focus[0], model
    gc.collect()
    assert STORE.nbytes == both // 2
    assert run_call(focus[0], decided(prompt()))[1].program == "step"


def test_torch_compiler_reset_frees_all_state() -> None:
    focus = shared(tiny_model())
    run_call(focus, prompt())
    assert STORE.nbytes > 0
    torch.compiler.reset()
    assert STORE.nbytes == 0
    _, record = run_call(focus, decided(prompt()))
    assert (record.program, record.why) == ("refresh", "new trajectory: first call")


def test_restarts_free_what_they_replace() -> None:
    others = live_bytes_of_tensors()
    focus, live = shared(tiny_model()), []
    for seed in range(12):
        ids = prompt(seed=seed)
        for _ in range(3):
            run_call(focus, ids)
            ids = decided(ids)
        live.append(STORE.nbytes)
    assert len(set(live[1:])) == 1, "the first has one copy of the logits less"
    assert live_bytes_of_tensors() - others < 2**20


def live_bytes_of_tensors() -> int:
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values())


@torch.no_grad()
def test_a_long_decode_holds_a_constant_number_of_bytes() -> None:
    """K/V and summaries, and of the logits the master with at most two copies."""
    model = tiny_model()
    focus: Any = shared(model, block_length=64)
    ids = prompt(masks=20, length=32)
    kept, sizes = [], []
    for _ in range(16):
        kept.append(focus(ids))
        ids = decided(ids)
        sizes.append(STORE.nbytes)
    trajectory = STORE.slot(model.embedding.weight).trajectory
    assert trajectory is not None
    assert len(trajectory.outputs) == 1
    assert len(trajectory.outputs[0].copies) <= MOST_COPIES
    logits = kept[0].untyped_storage().nbytes()
    assert max(sizes) <= sizes[0] + MOST_COPIES * logits
    assert len({tensor.data_ptr() for tensor in kept}) == 16


def test_what_is_replaced_is_gone_before_its_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two trajectories would have to fit at once."""
    model = tiny_model()
    focus = shared(model)
    run_call(focus, prompt())
    old = weakref.ref(STORE.slot(model.embedding.weight).trajectory)
    allocate, alive = Programs.allocate, []

    def noted(programs: Programs, args: Any) -> Any:
        alive.append(old() is not None)
        return allocate(programs, args)

    monkeypatch.setattr(Programs, "allocate", noted)
    run_call(focus, prompt(length=16))
    assert alive == [False]
