"""`ragged_select_blocks` and `ragged_sparse_attention`: fast and in Triton against their equations.

pytest -m gpu tests/kernels/test_ragged_sparse.py
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.block_selection.reference import relevance
from focus_compile.kernels.ragged_attention.op import ragged_attention
from focus_compile.kernels.ragged_selection import reference as selection_reference
from focus_compile.kernels.ragged_selection.op import ragged_select_blocks
from focus_compile.kernels.ragged_sparse_attention import reference
from focus_compile.kernels.ragged_sparse_attention.op import ragged_sparse_attention
from focus_compile.kernels.tiling import Tiling
from tests.kernels.devices import DOT_DTYPES, each_device, few, moved
from tests.kernels.ragged import make_rows
from tests.kernels.strategies import assert_as_accurate, assert_highest, fuzzed
from tests.kernels.test_ragged_attention import Case, cases

SMALL_TILES = (None, Tiling(16, 16, 1, 4, 2), Tiling(16, 32, 3, 4, 3))
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class SparseCase:
    """Arguments of both ops: those of `ragged_attention`, and the choice of keys."""

    dense: Case
    weight: Tensor
    summaries: Tensor
    candidates: Tensor
    keep: Tensor
    sinks: int
    key_block: int

    @property
    def selecting(self) -> tuple[Tensor | int, ...]:
        dense = self.dense
        return (
            *(dense.q, self.weight, self.summaries, dense.slot, dense.rows.starts),
            *(self.candidates, self.keep, self.sinks, dense.rows.max_rows),
        )

    def attending(self, blocks: Tensor) -> tuple[Tensor | int | float, ...]:
        dense = self.dense
        return (
            *(dense.q, dense.k, dense.v, dense.slot, dense.rows.starts, dense.lengths),
            *(blocks, self.candidates, self.key_block, dense.rows.max_rows, dense.scale),
        )

    def poisoned(self, blocks: Tensor) -> "SparseCase":
        """What a sequence does not read is NaN."""
        dense, size = self.dense, self.key_block
        k, v = (torch.full_like(cache, torch.nan) for cache in (dense.k, dense.v))
        for s, slot in enumerate(dense.slot.tolist()):
            tail = int(self.candidates[s]) * size
            for t in range(min(int(dense.lengths[s]), k.shape[2])):
                if t >= tail or t // size in blocks[s].tolist():
                    k[slot, :, t], v[slot, :, t] = dense.k[slot, :, t], dense.v[slot, :, t]
        return replace(self, dense=replace(dense, k=k, v=v))


@st.composite
def sparse_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> SparseCase:
    dense = draw(cases(dtypes=dtypes))
    size, sequences = draw(st.sampled_from((1, 3, 8))), dense.slot.shape[0]
    blocks = dense.k.shape[2] // size
    full = dense.lengths // size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    share = torch.rand(sequences, generator=generator)
    wide = dense.k.shape[3] * draw(st.sampled_from((1, 2)))
    shape = (*dense.k.shape[:2], blocks, wide)
    candidates = (full * torch.rand(sequences, generator=generator).ceil()).long()
    return SparseCase(
        dense=dense,
        weight=torch.randint(2, (dense.q.shape[1],), generator=generator).float(),
        summaries=torch.randn(shape, generator=generator).to(dense.q.dtype),
        candidates=candidates,
        keep=(candidates * share).long() + draw(st.integers(0, 1)),
        sinks=draw(st.sampled_from((0, 1, 3))),
        key_block=size,
    )


def assert_chosen(kept: Tensor, case: SparseCase) -> None:
    """The first blocks, then the most relevant within float32 rounding; then -1."""
    dense = case.dense
    assert kept.dtype == torch.int64
    assert kept.shape == (dense.slot.shape[0], case.summaries.shape[2])
    for s, part in enumerate(dense.rows.slices):
        limit, count = int(case.candidates[s]), int(case.keep[s])
        first = min(case.sinks, limit)
        count = min(max(count, first), limit)
        found = kept[s]
        assert found[:first].tolist() == list(range(first))
        assert (found[count:] == -1).all()
        q, weight = dense.q[None, :, part], case.weight[None, part]
        summaries = case.summaries[dense.slot[s]][None]
        scores = relevance(q, weight, summaries)[0, first:limit]
        sizes = relevance(q.abs(), weight, summaries.abs())[0]
        terms = q.shape[1] * q.shape[2] + 4 * q.shape[3]
        bound = 4 * terms * EPS * float(sizes.max()) if limit else 0.0
        rest = torch.full((limit - first,), -1)
        rest[: count - first] = found[first:count] - first
        assert_highest(rest, scores, count - first, bound)


def assert_attends(found: Tensor, blocks: Tensor, case: SparseCase) -> None:
    """found: of the poisoned case."""
    dense = case.dense
    double = replace(case, dense=dense.double())
    exact = reference.ragged_sparse_attention(*double.attending(blocks))  # type: ignore[arg-type]
    assert found.is_contiguous()
    assert_as_accurate(found, exact, one_by_one(blocks, case), dense.v)


def one_by_one(blocks: Tensor, case: SparseCase) -> Tensor:
    """`ragged_attention`, each sequence's keys gathered into a cache of its own."""
    dense, size = case.dense, case.key_block
    out = torch.zeros_like(dense.q, memory_format=torch.contiguous_format)
    for s, part in enumerate(dense.rows.slices):
        length, tail = min(int(dense.lengths[s]), dense.k.shape[2]), int(case.candidates[s]) * size
        keys = [t for t in range(length) if t >= tail or t // size in blocks[s].tolist()]
        if part.stop > part.start:
            slot = dense.slot[s : s + 1]
            k, v = dense.k[slot][:, :, keys], dense.v[slot][:, :, keys]
            starts = torch.tensor([0, part.stop - part.start])
            out[:, part] = ragged_attention(
                dense.q[:, part], k, v, torch.tensor([0]), starts, torch.tensor([len(keys)]),
                part.stop - part.start, dense.scale,
            )  # fmt: skip
    return out


@fuzzed
@given(sparse_cases(dtypes=(torch.float32, torch.bfloat16)))
def test_chosen_keys_are_read_and_no_others(case: SparseCase) -> None:
    blocks = ragged_select_blocks(*case.selecting)  # type: ignore[arg-type]
    assert_chosen(blocks, case)
    assert_chosen(selection_reference.ragged_select_blocks(*case.selecting), case)  # type: ignore[arg-type]
    poisoned = case.poisoned(blocks).attending(blocks)
    assert_attends(ragged_sparse_attention(*poisoned), blocks, case)  # type: ignore[arg-type]


@fuzzed
@given(sparse_cases(dtypes=(torch.float32,)))
def test_all_blocks_are_all_keys_bit_by_bit(case: SparseCase) -> None:
    case = replace(case, keep=case.candidates)
    blocks = ragged_select_blocks(*case.selecting)  # type: ignore[arg-type]
    found = ragged_sparse_attention(*case.attending(blocks))  # type: ignore[arg-type]
    assert torch.equal(found, ragged_attention(*case.dense.arguments))


@each_device
@few
@given(data=st.data())
def test_in_triton(device: str, data: st.DataObject) -> None:
    pytest.importorskip("triton")
    from focus_compile.kernels.ragged_selection import kernel as selection
    from focus_compile.kernels.ragged_sparse_attention import kernel

    case = data.draw(sparse_cases(dtypes=DOT_DTYPES[device]))
    there = [moved(a, device) if isinstance(a, Tensor) else a for a in case.selecting]
    blocks = selection.ragged_select_blocks(*there).cpu()  # type: ignore[arg-type]
    assert_chosen(blocks, case)
    poisoned = case.poisoned(blocks).attending(blocks)
    there = [moved(a, device) if isinstance(a, Tensor) else a for a in poisoned]
    tiling = data.draw(st.sampled_from(SMALL_TILES))
    found = kernel.ragged_sparse_attention(*there, tiling=tiling).cpu()  # type: ignore[arg-type]
    assert_attends(found, blocks, case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_are_captured_in_a_cuda_graph(dtype: torch.dtype) -> None:
    """And a replay reads what its inputs hold by then."""
    torch.manual_seed(0)
    sequences, length, size = 16, 700, 32
    rows = make_rows([32] * sequences)
    q = torch.randn(8, rows.total, 64, device="cuda").to(dtype)
    k, v = torch.randn(2, sequences, 2, length, 64, device="cuda").to(dtype)
    summaries = torch.randn(sequences, 2, length // size, 128, device="cuda").to(dtype)
    slot, starts = torch.arange(sequences, device="cuda"), rows.starts.cuda()
    lengths, weight = torch.full_like(slot, length), torch.ones(rows.total, device="cuda")
    candidates, keep = torch.full_like(slot, 20), torch.full_like(slot, 7)

    def step() -> list[Tensor]:
        blocks = ragged_select_blocks(
            q, weight, summaries, slot, starts, candidates, keep, 1, rows.max_rows
        )
        return [
            blocks,
            ragged_sparse_attention(
                q, k, v, slot, starts, lengths, blocks, candidates, size, rows.max_rows, 0.125
            ),
        ]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for _ in range(3):
        candidates.copy_(torch.randint(21, (sequences,)))
        keep.copy_((candidates * torch.rand(sequences, device="cuda")).ceil())
        lengths.copy_(candidates * size + torch.randint(1, 33, (sequences,)).cuda())
        q.copy_(torch.randn(q.shape))
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)
