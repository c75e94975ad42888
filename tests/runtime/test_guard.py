"""The guard: continues only where ids went from mask to token and nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from focus_compile.policies.focus_dllm import FocusDllm
from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.guard import (
    CallInputs,
    compare_inputs,
    why_not_comparable,
    why_not_continued,
)
from focus_compile.runtime.observe import Flags, Observed, observe
from focus_compile.runtime.trajectory import Blocks, Trajectory
from tests.runtime.tiny import MASK, prompt

OWNER = object()


def call_of(ids: Tensor, weights: Any, guarded: Any, numbers: Any) -> CallInputs:
    return CallInputs(ids, tuple(guarded), tuple(numbers), tuple(weights))


def trajectory_of(ids: Tensor, *, weights: Any = (), guarded: Any = (), numbers: Any = ()) -> Any:
    """A trajectory whose last call had these inputs."""
    call = call_of(ids, weights, guarded, numbers)
    graphs = DeviceGraphs(False, pytest.fail)
    held = Trajectory.allocate(OWNER, call, 0, [torch.zeros(8)], graphs, MASK)
    held.begin(call, Blocks.of(ids == MASK, 4), 4, 0.5)
    held.ids.copy_(held.incoming)
    return held


def flags_of(held: Any, ids: Tensor) -> Flags:
    held.incoming.copy_(ids)
    return Flags(*observe(Observed.of(held), FocusDllm(2, 3), MASK, 4).tolist())


def why(held: Any, ids: Tensor, *, weights: Any = (), guarded: Any = (), numbers: Any = ()) -> Any:
    call = call_of(ids, weights, guarded, numbers)
    reason = why_not_comparable(held, OWNER, call, 0)
    if reason is not None:
        return reason
    compare_inputs(held, call)
    return why_not_continued(held.weights.are(call.weights), flags_of(held, ids))


def test_decoding_continues() -> None:
    before = prompt()
    after = before.clone()
    after[0, -1] = 3
    assert why(trajectory_of(before), after) is None
    assert why(trajectory_of(before), before) is None


@pytest.mark.parametrize("change", ["prompt", "remask", "token again"])
def test_any_other_change_of_ids_starts_anew(change: str) -> None:
    before = prompt()
    before[0, -1] = 5
    after = before.clone()
    if change == "prompt":
        after[0, 0] = before[0, 0] % 5 + 1
    else:
        after[0, -1] = MASK if change == "remask" else 6
    expected = "ids changed other than from mask to token"
    if change == "prompt":
        expected = "ids changed before the response"
    assert why(trajectory_of(before), after) == expected


def test_the_first_call_and_another_graph() -> None:
    ids = prompt()
    assert why(None, ids) == "first call"
    held = trajectory_of(ids)
    held.owner = object()
    assert why(held, ids) == "another compiled graph ran this model"


@pytest.mark.parametrize("shape", [(1, 11), (1, 13), (2, 12)])
def test_another_shape(shape: tuple[int, int]) -> None:
    other = torch.full(shape, MASK)
    assert why(trajectory_of(prompt()), other) == "the shape of the ids changed"


def test_other_inputs() -> None:
    ids, mask = prompt(), torch.ones(1, 12)
    held = trajectory_of(ids, guarded=[mask], numbers=[3])
    assert why(held, ids, guarded=[mask.clone()], numbers=[3]) is None
    changed = mask.clone()
    changed[0, 2] = 0
    for guarded in (changed, mask[:, :11], mask[None]):
        assert why(held, ids, guarded=[guarded], numbers=[3]) == "another input changed"
    assert why(held, ids, guarded=[mask], numbers=[4]) == "another input changed"
    assert why(held, ids, guarded=[mask], numbers=[3]) is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_are_kept_in_the_dtype_that_programs_were_compiled_for(dtype: torch.dtype) -> None:
    """Inductor does not look at dtypes again: steps read the trajectory's own ids."""
    ids = prompt().to(dtype)
    held = trajectory_of(ids)
    assert held.ids.dtype == held.incoming.dtype == dtype
    assert held.fits(call_of(ids, (), (), ()), 0)
    assert not held.fits(call_of(ids.to(torch.int16), (), (), ()), 0)


def write(weight: Tensor) -> None:
    with torch.no_grad():
        weight.add_(1.0)


def write_through_a_view(weight: Tensor) -> None:
    with torch.no_grad():
        weight.view(-1)[0] = 1.0


def half_and_back(weight: Tensor) -> None:
    weight.data = weight.data.half()
    weight.data = weight.data.float()


def other_memory(weight: Tensor) -> None:
    weight.data = weight.data.clone()


@pytest.mark.parametrize("change", [write, write_through_a_view, half_and_back, other_memory])
def test_changed_weights(change: Any) -> None:
    ids, weights = prompt(), [nn.Parameter(torch.rand(3, 4)) for _ in range(3)]
    held = trajectory_of(ids, weights=weights)
    assert why(held, ids, weights=weights) is None
    change(weights[1])
    assert why(held, ids, weights=weights) == "the weights changed"


def test_a_new_weight_at_the_address_of_a_freed_one() -> None:
    """Neither its id, address nor version need differ from the old one's."""
    ids, old = prompt(), nn.Parameter(torch.empty(2**26))
    held = trajectory_of(ids, weights=[old])
    name, address = id(old), old.data_ptr()
    del old
    values = [torch.empty(2**26) for _ in range(2)]
    at_address = [value for value in values if value.data_ptr() == address]
    assert at_address, "the allocator reused nothing, so that this test shows nothing"
    weights = [nn.Parameter(at_address[0]) for _ in range(100)]
    weights.sort(key=lambda weight: id(weight) != name)
    for weight in weights[:3]:
        assert why(held, ids, weights=[weight]) == "the weights changed"


def test_the_guard_keeps_no_weight_alive() -> None:
    weight = nn.Parameter(torch.zeros(1000))
    held = trajectory_of(prompt(), weights=[weight])
    storage = weight.untyped_storage()
    count = torch._C._storage_Use_Count(storage._cdata)
    del held
    assert torch._C._storage_Use_Count(storage._cdata) == count


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), length=st.integers(1, 8))
def test_masks_became_tokens_by_element(data: st.DataObject, batch: int, length: int) -> None:
    count = batch * length
    values = st.lists(st.sampled_from([1, 2, MASK]), min_size=count, max_size=count)
    before, after = data.draw(values), data.draw(values)
    expected = all(a == b or b == MASK for a, b in zip(after, before, strict=True))
    tensors = [torch.tensor(values).view(batch, length) for values in (before, after)]
    flags = flags_of(trajectory_of(tensors[0]), tensors[1])
    assert flags.decoded_only == expected
    assert flags.masked == (MASK in after)
    assert flags.decided == sum(a != b for a, b in zip(after, before, strict=True))
