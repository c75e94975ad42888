"""`importance`: fast against reference, that against the written-out tensor, and laws."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.importance import reference
from focus_compile.kernels.importance.op import importance
from tests.kernels.ragged import Rows, laid_out, make_rows, permuted, ragged_rows, strided
from tests.kernels.strategies import LAYOUTS, fuzzed

EPS = torch.finfo(torch.float32).eps
Case = tuple[Rows, Tensor, Tensor, float]


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64),
    most: int = 20,
) -> Case:
    """(rows, q [H, T, d], k [Hkv, T, d], scale), in odd strides; masked may be strided too."""
    rows = draw(ragged_rows(most=most))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    width, dtype = draw(st.sampled_from((8, 16, 20))), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(heads: int) -> Tensor:
        values = torch.randn((heads, rows.total, width), generator=generator).to(dtype)
        return laid_out(values, draw(st.sampled_from(LAYOUTS)))

    q, k = normal(kv_heads * group), normal(kv_heads)
    odd = draw(st.booleans())
    rows = Rows(rows.starts, strided(rows.masked, odd), rows.positions, rows.max_rows)
    return rows, q, k, draw(st.sampled_from((width**-0.5, 1.0, -0.3)))


def run(case: Case) -> Tensor:
    rows, q, k, scale = case
    return importance(q, k, rows.masked, rows.starts, rows.max_rows, scale)


def exact(case: Case) -> Tensor:
    rows, q, k, scale = case
    return reference.exact(q, k, rows.masked, rows.starts, scale)


def assert_accurate(found: Tensor, case: Case) -> None:
    """Within what float32 rounding of the scores and of the sums can make of weights below 1."""
    rows, q, k, scale = case
    assert (found.dtype, found.shape) == (torch.float32, (rows.total,))
    assert found.is_contiguous()
    if rows.total == 0:
        return
    largest = abs(scale) * float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    expected = exact(case)
    allowed = 4 * EPS * (largest * q.shape[-1] ** 0.5 + rows.max_rows + q.shape[0] + 8)
    assert ((found.double() - expected).abs() <= allowed * expected).all()


@fuzzed
@given(cases())
def test_matches_reference(case: Case) -> None:
    """Inputs of any dtype: bfloat16 ones are scored in float32, as the reference scores them."""
    assert_accurate(run(case), case)


@fuzzed
@given(cases())
def test_reference_is_the_pooled_softmax(case: Case) -> None:
    """Torch's pooling over the list of masked rows, all heads and queries at once."""
    rows, q, k, scale = case
    expected = torch.zeros(rows.total, dtype=torch.float64)
    for part in rows.slices:
        chosen = torch.arange(part.start, part.stop)[rows.masked[part]]
        if chosen.shape[0] == 0:
            continue
        keys = k[:, chosen].double().repeat_interleave(q.shape[0] // k.shape[0], 0)
        scores = scale * q[:, chosen].double() @ keys.mT
        pooled = F.max_pool1d(scores, 3, stride=1, padding=1)
        expected[chosen] = pooled.softmax(-1).sum((0, 1))
    torch.testing.assert_close(exact(case), expected, rtol=1e-11, atol=1e-11)


@fuzzed
@given(cases())
def test_sums_to_heads_times_masked_rows(case: Case) -> None:
    rows, q, _, _ = case
    found = run(case)
    for part, count in zip(rows.slices, rows.hidden, strict=True):
        torch.testing.assert_close(
            found[part].sum(), torch.tensor(float(q.shape[0] * count)), rtol=1e-5, atol=0
        )
    assert (found[~rows.masked] == 0).all()
    assert (found[int(rows.starts[-1]) :] == 0).all()


@fuzzed
@given(cases(), st.randoms())
def test_order_of_sequences_does_not_matter(case: Case, random: Random) -> None:
    rows, q, k, scale = case
    order = list(range(len(rows.slices)))
    random.shuffle(order)
    moved, source = permuted(rows, order)
    again = run((moved, q[:, source], k[:, source], scale))
    torch.testing.assert_close(again, run(case)[source], rtol=1e-5, atol=0)


@fuzzed
@given(cases())
def test_reads_masked_rows_only(case: Case) -> None:
    """Other rows and padding may hold anything."""
    rows, q, k, scale = case
    counts = rows.masked & (torch.arange(rows.total) < rows.starts[-1])
    poisoned = [values.where(counts[:, None], torch.nan) for values in (q, k)]
    assert torch.equal(run((rows, *poisoned, scale)), run(case))


@fuzzed
@given(cases())
def test_other_rows_between_masked_ones_do_not_matter(case: Case) -> None:
    """Neighbours are those of the compacted list: dropping all other rows changes nothing."""
    rows, q, k, scale = case
    kept = (rows.masked & (torch.arange(rows.total) < rows.starts[-1])).nonzero()[:, 0]
    dense = Rows(
        starts=torch.tensor([0, *rows.hidden]).cumsum(0),
        masked=torch.ones(kept.shape[0], dtype=torch.bool),
        positions=rows.positions[kept],
        max_rows=rows.max_rows,
    )
    alone = run((dense, q[:, kept], k[:, kept], scale))
    torch.testing.assert_close(alone, run(case)[kept], rtol=1e-5, atol=0)


def test_none_one_and_two_masked_rows() -> None:
    """One row gets all of itself; two pool to the same score, and share; equal keys share too."""
    torch.manual_seed(0)
    rows = make_rows([3, 1, 2, 5], share=1.0)
    rows.masked[:3] = False
    q, k = torch.randn(4, 11, 8), torch.randn(2, 11, 8)
    k[:, 6:] = k[:, 6:7]
    found = run((rows, q, k, 0.3))
    expected = torch.tensor([0.0] * 3 + [4.0] * 8)
    torch.testing.assert_close(found, expected)


def test_a_neighbour_lends_its_score() -> None:
    """One strong key among weak ones: it and its two neighbours share, the others get nothing."""
    rows = make_rows([5], share=1.0)
    q, k = torch.ones(1, 5, 4), torch.zeros(1, 5, 4)
    k[0, 2] = 20.0
    found = run((rows, q, k, 1.0))
    torch.testing.assert_close(found, torch.tensor([0.0, 5 / 3, 5 / 3, 5 / 3, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_rows", [128, 256])
def test_whole_blocks(dtype: torch.dtype, max_rows: int) -> None:
    torch.manual_seed(max_rows)
    rows = make_rows([max_rows, 33, max_rows], padding=7)
    q, k = torch.randn(2, rows.total, 64), torch.randn(1, rows.total, 64)
    case = rows, q.to(dtype), k.to(dtype), 0.125
    assert_accurate(run(case), case)


@pytest.mark.parametrize("sequences", [0, 2])
def test_nothing(sequences: int) -> None:
    starts = torch.zeros(sequences + 1, dtype=torch.int32)
    for rows in (0, 3):
        q, masked = torch.ones(2, rows, 4), torch.ones(rows, dtype=torch.bool)
        assert torch.equal(importance(q, q, masked, starts, 4, 1.0), torch.zeros(rows))


BAD = {
    "k": (torch.ones(2, 4, 8), ValueError),
    "heads": (torch.ones(3, 5, 8), ValueError),
    "dtype": (torch.ones(2, 5, 8).double(), TypeError),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_keys(name: str) -> None:
    k, error = BAD[name]
    masked, starts = torch.ones(5, dtype=torch.bool), torch.tensor([0, 5])
    with pytest.raises(error, match="importance: "):
        importance(torch.ones(4, 5, 8), k, masked, starts, 5, 1.0)


@pytest.mark.parametrize(
    ("masked", "starts", "max_rows", "error"),
    [
        (torch.ones(4, dtype=torch.bool), torch.tensor([0, 5]), 5, ValueError),
        (torch.ones(5), torch.tensor([0, 5]), 5, TypeError),
        (torch.ones(5, dtype=torch.bool), torch.tensor([0.0, 5.0]), 5, TypeError),
        (torch.ones(5, dtype=torch.bool), torch.tensor([[0, 5]]), 5, ValueError),
        (torch.ones(5, dtype=torch.bool), torch.tensor([0, 5])[:0], 5, ValueError),
        (torch.ones(5, dtype=torch.bool), torch.tensor([0, 5]), 0, ValueError),
        (torch.ones(5, dtype=torch.bool), torch.tensor([0, 5]), 257, ValueError),
    ],
)
def test_bad_lists(masked: Tensor, starts: Tensor, max_rows: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="importance: "):
        importance(torch.ones(4, 5, 8), torch.ones(2, 5, 8), masked, starts, max_rows, 1.0)
