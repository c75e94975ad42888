"""LatestRows: the latest value of every row, in tensors that never change under their holder."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.runtime.latest_rows import MOST_COPIES, LatestRows

LENGTH, WIDTH = 6, 3


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(latest: LatestRows, rows: Tensor, values: Tensor) -> Tensor:
    """One step: new values of some rows; all rows for the caller."""
    latest.write(rows, values)
    latest.missed(rows)
    return latest.hand_out()


updates = st.lists(
    st.tuples(
        st.sampled_from(["hold", "drop", "write", "view", "replace"]),
        st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=4),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    first=st.integers(0, LENGTH - 1),
    history=updates,
    inference=st.booleans(),
)
def test_every_tensor_handed_out_is_right_and_stays(
    batch: int, first: int, history: list[tuple[str, list[int]]], inference: bool
) -> None:
    """Whatever callers keep, drop, view or overwrite; duplicate rows carry equal values."""

    def all_rows(seed: int) -> Tensor:
        values = some(seed, batch, LENGTH, WIDTH)
        values[:, :first] = 0.0
        return values

    expected = all_rows(0)
    latest = LatestRows(expected[:, first:], first)
    held: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(inference):
        for number, (what, chosen) in enumerate(history):
            if what == "replace":
                expected = all_rows(number)
                latest.replace(expected[:, first:])
                continue
            rows = torch.tensor([chosen]).clamp(min=first).expand(batch, -1)
            values = some(number, batch, LENGTH, WIDTH)[torch.arange(batch)[:, None], rows]
            expected = expected.clone()
            expected[torch.arange(batch)[:, None], rows] = values
            found = update(latest, rows, values)
            assert torch.equal(found, expected)
            if what == "write":
                found.fill_(7.0)
            if what == "hold":
                held.append((found, expected))
            if what == "view":
                held.append((found[:, 1:, :1], expected[:, 1:, :1]))
            del found
            assert all(torch.equal(kept, value) for kept, value in held)
    assert latest.nbytes <= (1 + MOST_COPIES) * expected.untyped_storage().nbytes()


def test_a_tensor_nobody_holds_is_handed_out_again() -> None:
    latest = LatestRows(some(0, 1, LENGTH, WIDTH))
    addresses = set()
    for number in range(8):
        found = update(latest, torch.tensor([[number % LENGTH]]), some(number, 1, 1, WIDTH))
        addresses.add(found.data_ptr())
        del found
    assert len(addresses) <= MOST_COPIES


def test_alternating_holders_need_two_copies() -> None:
    """A loop that drops its previous logits only after it has the next."""
    latest = LatestRows(some(0, 1, LENGTH, WIDTH))
    addresses, found = set(), None
    for number in range(8):
        found = update(latest, torch.tensor([[number % LENGTH]]), some(number, 1, 1, WIDTH))
        addresses.add(found.data_ptr())
    assert len(addresses) == MOST_COPIES


def test_copies_that_callers_keep_are_theirs_alone() -> None:
    """Held logits are not counted or kept by us: at most the master and two copies are."""
    latest = LatestRows(some(0, 1, LENGTH, WIDTH))
    one = latest.nbytes
    kept = [update(latest, torch.tensor([[n % LENGTH]]), some(n, 1, 1, WIDTH)) for n in range(10)]
    gc.collect()
    assert latest.nbytes <= (1 + MOST_COPIES) * one
    assert len({tensor.data_ptr() for tensor in kept}) == 10


def test_an_autograd_graph_keeps_its_logits() -> None:
    """A tensor saved for backward is in use, though no name refers to it."""
    latest = LatestRows(some(0, 1, LENGTH, WIDTH))
    weight = torch.ones(WIDTH, requires_grad=True)
    rows = torch.tensor([[1]])
    first = update(latest, rows, some(1, 1, 1, WIDTH))
    expected = first.sum((0, 1)).clone()
    loss = (first * weight).sum()
    del first
    for number in range(4):
        update(latest, rows, some(number + 2, 1, 1, WIDTH))
    loss.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_a_copy_that_is_kept_for_long_is_forgotten() -> None:
    """What it would have to catch up on is not collected for ever."""
    latest = LatestRows(some(0, 1, LENGTH, WIDTH))
    kept = update(latest, torch.tensor([[0]]), some(1, 1, 1, WIDTH))
    expected = kept.clone()
    for number in range(20):
        update(latest, torch.tensor([[number % LENGTH]]), some(number, 1, 1, WIDTH))
        assert all(len(copy.behind) <= LENGTH for copy in latest.copies)
    assert torch.equal(kept, expected)
