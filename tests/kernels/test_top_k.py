"""`choose_highest`: against sorting, over ties, limits, infinities and segments.

pytest -m gpu tests/kernels/test_top_k.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.block_selection.reference import highest
from tests.kernels.devices import each_device, few, moved

pytest.importorskip("triton")
from focus_compile.kernels import top_k


def lowest_first(scores: Tensor, count: int, width: int) -> list[int]:
    chosen = highest(scores.tolist(), count)
    return chosen + [-1] * (width - len(chosen))


@each_device
@given(data=st.data())
@few
def test_chooses_the_highest_sums(device: str, data: st.DataObject) -> None:
    """Small integers, so that many tie; counts for each sequence or for all."""
    batch, parts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    length, most = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    scores = torch.randint(-most, most, (batch, parts, length), generator=generator).float()
    if data.draw(st.booleans()):
        scores[torch.rand(scores.shape, generator=generator) < 0.2] = -torch.inf
    limit = torch.randint(0, length + 3, (batch,), generator=generator)
    many = torch.randint(-1, length + 3, (batch,), generator=generator)
    one = data.draw(st.integers(0, 20))
    given = moved(scores, device), moved(limit, device)
    by_sequence = top_k.choose_highest(*given, moved(many, device), length)
    for_all = top_k.choose_highest(*given, one, one)
    for b in range(batch):
        inside = scores[b].sum(0)[: limit[b]]
        assert by_sequence[b].tolist() == lowest_first(inside, int(many[b]), length)
        assert for_all[b].tolist() == lowest_first(inside, one, one)


@each_device
@pytest.mark.parametrize(
    ("length", "count"), [(4096, 4096), (4097, 9), (9000, 16), (9000, 2500), (70000, 3000)]
)
@pytest.mark.parametrize("kinds", [2, 10**6])
def test_chooses_from_more_scores_than_one_program_holds(
    device: str, length: int, count: int, kinds: int
) -> None:
    """Segments end inside runs of equal scores; past half a segment torch sorts."""
    if device == "cpu" and length > 9000 and kinds == 2:
        pytest.skip("the reference is slow")
    generator = torch.Generator().manual_seed(length)
    scores = torch.randint(-kinds, kinds, (2, 2, length), generator=generator).float()
    limit = torch.tensor([length, length - 4097 if length > 8192 else 5])
    given = moved(scores, device), moved(limit, device)
    found = top_k.choose_highest(*given, count, count)
    counts = torch.tensor([count, 3])
    by_sequence = top_k.choose_highest(*given, moved(counts, device), length)
    for b in range(2):
        inside = scores[b].sum(0)[: limit[b]]
        assert found[b].tolist() == lowest_first(inside, count, count)
        assert by_sequence[b].tolist() == lowest_first(inside, int(counts[b]), length)


@each_device
@pytest.mark.parametrize("length", [24, 5000])
def test_zeros_tie_and_nan_counts_as_infinity(device: str, length: int) -> None:
    scores = torch.full((1, 1, length), -1.0)
    scores[0, 0, [3, 7, 11]] = torch.tensor([-0.0, 0.0, -0.0])
    scores[0, 0, 13], scores[0, 0, 15] = torch.nan, -torch.nan
    scores[0, 0, 5] = torch.inf
    limit = torch.tensor([length], device=device)
    for count, expected in ((2, [5, 13]), (4, [3, 5, 13, 15]), (5, [3, 5, 7, 13, 15])):
        found = top_k.choose_highest(scores.to(device), limit, count, count)
        assert found.tolist() == [expected]
        many = torch.tensor([count], device=device)
        found = top_k.choose_highest(scores.to(device), limit, many, length)
        assert found.tolist() == [expected + [-1] * (length - count)]


@each_device
def test_nothing_but_nan_stays_in_bounds(device: str) -> None:
    scores = torch.full((2, 3, 40), torch.nan, device=device)
    limit, keep = torch.tensor([40, 7], device=device), torch.tensor([5, 9], device=device)
    found = top_k.choose_highest(scores, limit, keep, 40)
    assert found.tolist() == [[*range(5)] + [-1] * 35, [*range(7)] + [-1] * 33]
