"""Decode blocks, and who may use a trajectory."""

from __future__ import annotations

import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_compile.runtime.trajectory import Blocks, first_true
from tests.runtime.test_guard import trajectory_of
from tests.runtime.tiny import prompt

quick = settings(max_examples=200, deadline=None, derandomize=True)


@quick
@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3)
    )
)
def test_first_true(rows: list[list[bool]]) -> None:
    expected = [row.index(True) if any(row) else len(row) for row in rows]
    assert first_true(torch.tensor(rows)).tolist() == expected


@quick
@given(
    data=st.data(),
    length=st.integers(1, 16),
    batch=st.integers(1, 3),
    block_length=st.integers(1, 20),
)
def test_blocks_count_from_the_first_mask_of_the_first_call(
    data: st.DataObject, length: int, batch: int, block_length: int
) -> None:
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    first = [data.draw(flags) for _ in range(batch)]
    later = [[a and b for a, b in zip(row, data.draw(flags), strict=True)] for row in first]
    blocks = Blocks.of(torch.tensor(first), block_length)
    current = blocks.current(torch.tensor(later))
    starts = blocks.start_of(current)
    for b in range(batch):
        start = first[b].index(True) if any(first[b]) else length
        assert int(blocks.response_start[b]) == start
        if not any(later[b]):
            assert int(current[b]) == -1
            continue
        block = (later[b].index(True) - start) // block_length
        assert int(current[b]) == block
        assert int(starts[b]) == start + block * block_length


def test_a_trajectory_belongs_to_the_thread_that_began_it_while_that_lives() -> None:
    made, go = [], threading.Event()

    def make() -> None:
        made.append(trajectory_of(prompt()))
        go.wait()

    thread = threading.Thread(target=make)
    thread.start()
    while not made:
        pass
    assert made[0].belongs_to_another_thread()
    go.set()
    thread.join()
    assert not made[0].belongs_to_another_thread()
    assert not trajectory_of(prompt()).belongs_to_another_thread()
