"""`select_rows` and `targets`: fast against the rule in fractions, ties, and laws."""

import math
from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.row_selection import cpu, reference
from focus_compile.kernels.row_selection.op import select_rows, targets
from tests.kernels.ragged import Rows, make_rows, permuted, ragged_rows, strided
from tests.kernels.strategies import fuzzed

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]


@st.composite
def cases(draw: st.DrawFn, *, most: int = 20) -> Case:
    """select_rows's arguments: deltas normal, with ties, of two values or all equal."""
    rows = draw(ragged_rows(most=most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("normal", "near", "tied", "two", "equal")))
    delta = torch.randn(rows.total, generator=generator)
    if kind == "near":  # a spread of a few units in the last place
        delta = 100 + 1e-5 * delta
    elif kind == "tied":
        delta = delta.round()
    elif kind == "two":
        low, high = torch.randn(2, generator=generator)
        delta = torch.where(delta > 0, high, low)
    elif kind == "equal":
        delta = delta.new_full(delta.shape, float(torch.randn((), generator=generator)))
    sequences = len(rows.slices)
    target = torch.tensor(
        [draw(st.integers(0, count + 1)) for count in rows.hidden], dtype=torch.int64
    )
    progress = torch.randint(-1, 40, (sequences,), generator=generator)
    progress += 1000 * torch.randint(2, (sequences,), generator=generator)
    odd = draw(st.booleans())
    lists = (strided(values, odd) for values in (delta, rows.masked, rows.positions))
    return *lists, rows.starts, strided(target, odd), strided(progress, odd), rows.max_rows


def as_rows(case: Case) -> Rows:
    return Rows(case[3], case[1], case[2], case[6])


@fuzzed
@given(cases())
def test_matches_reference(case: Case) -> None:
    keep = select_rows(*case)
    assert (keep.dtype, keep.is_contiguous()) == (torch.bool, True)
    assert torch.equal(keep, reference.select_rows(*case))


@fuzzed
@given(cases())
def test_laws(case: Case) -> None:
    """Rows that are not masked stay, padding goes, and no hole is left below the last kept row."""
    delta, masked, positions, _, target, progress, _ = case
    rows, keep = as_rows(case), select_rows(*case)
    assert not keep[int(rows.starts[-1]) :].any()
    for s, part in enumerate(rows.slices):
        kept, hidden, position = keep[part], masked[part], positions[part]
        assert kept[~hidden].all()
        assert int((kept & hidden).sum()) >= min(int(target[s]), int(hidden.sum()))
        if hidden.any():
            assert (kept & hidden).any()
            last = position[kept & hidden].max()
            assert kept[hidden & (position < last) & (position > progress[s])].all()
            if target[s] > 0:
                assert kept[hidden & (delta[part] == delta[part][hidden].max())].any()


@fuzzed
@given(cases(), st.randoms())
def test_order_of_sequences_and_scale_of_deltas_do_not_matter(case: Case, random: Random) -> None:
    delta, _, _, _, target, progress, max_rows = case
    rows, keep = as_rows(case), select_rows(*case)
    order = list(range(len(rows.slices)))
    random.shuffle(order)
    moved, source = permuted(rows, order)
    again = select_rows(
        8 * delta[source], moved.masked, moved.positions, moved.starts,
        target[order], progress[order], max_rows,
    )  # fmt: skip
    assert torch.equal(again, keep[source])


def choose(
    deltas: list[float],
    target: int,
    positions: list[int] | None = None,
    progress: int = 10**6,
    masked: list[bool] | None = None,
) -> list[int]:
    """Rows that one sequence keeps; no hole is filled unless `progress` is given."""
    n = len(deltas)
    keep = select_rows(
        torch.tensor(deltas),
        torch.tensor(masked or [True] * n),
        torch.tensor(positions or list(range(0, 2 * n, 2))),
        torch.tensor([0, n]),
        torch.tensor([target]),
        torch.tensor([progress]),
        n,
    )
    return keep.nonzero()[:, 0].tolist()


def test_budget() -> None:
    assert choose([5.0, 0.0, 1.0, 0.0], 1) == [0]
    assert choose([5.0, 0.0, 1.0, 0.0], 2) == [0, 2]  # one outlier is not enough
    assert choose([9.0, 0.0, 8.0, 0.0, 0.0, 0.0], 1) == [0, 2]  # two outliers, both kept
    assert choose([1.0, 2.0, 3.0], 3) == [0, 1, 2]
    assert choose([1.0, 2.0, 3.0], 7) == [0, 1, 2]
    assert choose([0.0, 3.0, 3.0, 3.0, 0.0, 3.0, 0.0], 2) == [1, 2]  # the leftmost of equals


def test_equal_deltas_are_all_outliers() -> None:
    for value in (0.0, 0.1, -1e30, 1e-40, 16777217.0):
        for n in (2, 3, 7, 100, 256):
            assert choose([value] * n, 1) == list(range(n))


@pytest.mark.parametrize("pair", [(0.0, 1.0), (0.1, 0.3), (-7.7, 1e-3), (33.3, 33.300003)])
def test_the_higher_half_are_outliers(pair: tuple[float, float]) -> None:
    """There mean + std is the higher value itself, whatever floats make of it."""
    for n in (2, 6, 22, 254):
        deltas = [pair[i % 2] for i in range(n)]
        assert choose(deltas, 1) == list(range(1, n, 2))


def test_left_neighbour_is_kept_once() -> None:
    """Not that one's neighbour, and only where the positions touch."""
    assert choose([0.0, 0.0, 0.0, 9.0], 1, [0, 1, 2, 3]) == [2, 3]
    assert choose([0.0, 0.0, 0.0, 9.0], 1, [0, 1, 2, 4]) == [3]
    between = [True, True, False, True]  # row 2 is decoded and lies between
    assert choose([0.0, 0.0, 0.0, 9.0], 1, [0, 1, 2, 3], masked=between) == [2, 3]


def test_nothing_kept_keeps_all() -> None:
    """A budget of 0 and no outliers: infinite deltas have none."""
    assert choose([math.inf, 0.0, 1.0], 0) == [0, 1, 2]
    assert choose([math.inf, 0.0, 1.0], 1) == [0]


def test_holes_are_filled_beyond_progress() -> None:
    deltas, positions = [0.0, 0.0, 0.0, 9.0, 0.0], [10, 20, 30, 40, 50]
    assert choose(deltas, 1, positions, progress=-1) == [0, 1, 2, 3]
    assert choose(deltas, 1, positions, progress=10) == [1, 2, 3]
    assert choose(deltas, 1, positions, progress=29) == [2, 3]
    assert choose(deltas, 1, positions, progress=30) == [3]


@fuzzed
@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(1, 64), st.integers(1, 64)), max_size=9),
    st.sampled_from(("1", "1.5", "1.25", "2", "3.7", "100")),
    st.sampled_from((torch.float32, torch.float64)),
)
def test_targets(cases: list[tuple[int, int, int]], alpha: str, dtype: torch.dtype) -> None:
    """Of fractions, exactly: rows decoded over steps, in floats."""
    counts = torch.tensor([n for n, _, _ in cases], dtype=torch.int32)
    decoded = torch.tensor([a for _, a, _ in cases]).to(dtype)
    means = decoded / torch.tensor([b for _, _, b in cases]).to(dtype)
    found = targets(counts, means, float(alpha))
    assert found.dtype == torch.int64
    expected = [
        min(n, max(1, math.ceil(Fraction(alpha) * max(Fraction(a, b), 1)))) for n, a, b in cases
    ]
    assert found.tolist() == expected


def test_targets_of_an_unbounded_budget() -> None:
    found = targets(torch.tensor([0, 1, 50]), torch.ones(3), math.inf)
    assert found.tolist() == [0, 1, 50]


def test_whole_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = make_rows([256, 200, 256], padding=50, gap=1)
    case = (
        torch.randn(rows.total, generator=generator), rows.masked, rows.positions, rows.starts,
        torch.tensor([4, 9, 100]), torch.tensor([-1, 1150, 60]), 256,
    )  # fmt: skip
    assert torch.equal(select_rows(*case), reference.select_rows(*case))


def test_unknown_deltas_spoil_their_own_sequence_only() -> None:
    rows = make_rows([5, 5], share=1.0, gap=2)
    delta = torch.tensor([torch.nan, 1.0, 2.0, 3.0, 4.0] * 2)
    case = [delta, rows.masked, rows.positions, rows.starts, torch.ones(2).long(),
            torch.full((2,), 5000), 5]  # fmt: skip
    delta[5:] = torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0])
    keep = select_rows(*case)
    assert keep[5:].tolist()[1]
    delta[0] = 0.0
    assert torch.equal(select_rows(*case)[5:], keep[5:])


@pytest.mark.parametrize("sequences", [0, 2])
def test_nothing(sequences: int) -> None:
    starts, none = torch.zeros(sequences + 1).int(), torch.zeros(sequences).long()
    for rows in (0, 3):
        masked = torch.ones(rows, dtype=torch.bool)
        keep = select_rows(torch.ones(rows), masked, masked.long(), starts, none, none, 4)
        assert torch.equal(keep, torch.zeros(rows, dtype=torch.bool))


GOOD = {
    "delta": torch.ones(5),
    "masked": torch.ones(5, dtype=torch.bool),
    "positions": torch.arange(5),
    "starts": torch.tensor([0, 5]),
    "target": torch.tensor([1]),
    "progress": torch.tensor([-1]),
    "max_rows": 5,
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("delta", torch.ones(5).double(), TypeError),
        ("delta", torch.tensor(1.0), ValueError),
        ("masked", torch.ones(4, dtype=torch.bool), ValueError),
        ("masked", torch.ones(5), TypeError),
        ("positions", torch.arange(5).int(), TypeError),
        ("positions", torch.arange(6), ValueError),
        ("starts", torch.tensor([0.0, 5.0]), TypeError),
        ("target", torch.tensor([1, 1]), ValueError),
        ("target", torch.tensor([1.0]), TypeError),
        ("progress", torch.tensor([[1]]), ValueError),
        ("max_rows", 0, ValueError),
        ("max_rows", 257, ValueError),
    ],
)
def test_bad_input(name: str, value: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="select_rows: "):
        select_rows(**(GOOD | {name: value}))


def test_the_slack_is_far_below_a_float32() -> None:
    assert 1 - cpu.SHORT < torch.finfo(torch.float32).eps ** 1.5
