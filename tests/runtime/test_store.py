"""The store: a slot per model, gone with its first weight."""

from __future__ import annotations

import gc
import threading

import torch
from torch import nn

from focus_compile.runtime.store import TrajectoryStore
from tests.runtime.test_guard import trajectory_of
from tests.runtime.tiny import prompt


def test_one_slot_per_weight_object() -> None:
    """Equal values do not make two models one."""
    store = TrajectoryStore()
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert store.slot(first) is store.slot(first)
    assert store.slot(first) is not store.slot(second)


def test_a_slot_goes_with_its_weight() -> None:
    store = TrajectoryStore()
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for weight in weights:
        store.slot(weight).trajectory = trajectory_of(prompt())
    one = store.nbytes // 3
    assert one > 0
    del weights[0], weight
    gc.collect()
    assert store.nbytes == 2 * one
    weights.clear()
    gc.collect()
    assert store.nbytes == 0


def test_clear_frees_the_state_and_keeps_the_slots() -> None:
    """A call in flight in another thread holds a slot's lock: it must stay the model's slot."""
    store, weight = TrajectoryStore(), nn.Parameter(torch.ones(2))
    slot = store.slot(weight)
    slot.trajectory = trajectory_of(prompt())
    store.clear()
    assert store.nbytes == 0
    assert store.slot(weight) is slot


def test_threads_get_one_slot() -> None:
    store, weight, found = TrajectoryStore(), nn.Parameter(torch.ones(2)), []
    start = threading.Barrier(8)

    def look() -> None:
        start.wait()
        found.append(store.slot(weight))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(slot) for slot in found}) == 1
