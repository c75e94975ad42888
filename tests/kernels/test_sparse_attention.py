"""`sparse_attention`: fast against reference, sets of keys of every shape, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.attention.op import attention
from focus_compile.kernels.sparse_attention import reference
from focus_compile.kernels.sparse_attention.op import sparse_attention, sparse_attention_of_shard
from tests.kernels.strategies import (
    Problem,
    assert_as_accurate,
    fuzzed,
    key_sets,
    plain_attention,
    problems,
)

KeySet = tuple[Tensor, Tensor, Tensor, int]


def run(problem: Problem, keys: KeySet) -> Tensor:
    p = problem
    return sparse_attention(p.q, p.k, p.v, *keys, p.mask, p.scale)


def exact(problem: Problem, keys: KeySet) -> Tensor:
    p = problem.double()
    return reference.sparse_attention(p.q, p.k, p.v, *keys, p.mask, p.scale)


def allowed_keys(keys: KeySet, length: int) -> Tensor:
    """[B, T] bool, written with comparisons only."""
    blocks, sinks, candidates, key_block = keys
    position = torch.arange(length)
    of_block = (position[:, None] // key_block == blocks[:, None]).any(2)
    sink = (position[:, None] == sinks[:, None]).any(2)
    return of_block | sink | (position >= candidates[:, None] * key_block)


@st.composite
def sparse_problems(draw: st.DrawFn) -> tuple[Problem, KeySet]:
    problem = draw(problems())
    return problem, draw(key_sets(problem))


@fuzzed
@given(sparse_problems())
def test_is_as_accurate_as_plain_masked_attention(case: tuple[Problem, KeySet]) -> None:
    problem, keys = case
    out = run(problem, keys)
    plain = plain_attention(problem, allowed_keys(keys, problem.k.shape[2]))
    assert out.is_contiguous()
    assert_as_accurate(out, exact(problem, keys), plain, problem.v)


@fuzzed
@given(sparse_problems())
def test_reference_is_attention_under_a_key_mask(case: tuple[Problem, KeySet]) -> None:
    problem, keys = case
    hidden = plain_attention(problem.double(), allowed_keys(keys, problem.k.shape[2]))
    torch.testing.assert_close(exact(problem, keys), hidden, rtol=1e-11, atol=1e-11)


@fuzzed
@given(problems(), st.integers(1, 12), st.data())
def test_everything_kept_is_attention(
    problem: Problem, key_block: int, data: st.DataObject
) -> None:
    batch, length = problem.k.shape[0], problem.k.shape[2]
    total = length // key_block
    candidates = torch.tensor(
        data.draw(st.lists(st.integers(0, total), min_size=batch, max_size=batch))
    )
    ids = torch.arange(total)
    blocks = torch.where(ids < candidates[:, None], ids, -1)
    sinks = torch.arange(min(3, length)).expand(batch, -1)
    out = run(problem, (blocks, sinks, candidates, key_block))
    assert torch.equal(out, attention(problem.q, problem.k, problem.v, problem.mask, problem.scale))


@fuzzed
@given(sparse_problems(), st.randoms(use_true_random=False))
def test_order_of_keys_and_repetition_of_sinks_do_not_matter(
    case: tuple[Problem, KeySet], random: object
) -> None:
    problem, (blocks, sinks, candidates, key_block) = case
    shuffled = blocks.clone()
    for row in shuffled:
        kept = int((row >= 0).sum())
        row[:kept] = row[_shuffled(kept, random)]
    twice = torch.cat([sinks, sinks], 1)
    twice = twice[:, _shuffled(twice.shape[1], random)]
    out = run(problem, (shuffled, twice, candidates, key_block))
    assert torch.equal(out, run(problem, (blocks, sinks, candidates, key_block)))


def _shuffled(count: int, random: object) -> list[int]:
    order = list(range(count))
    random.shuffle(order)  # type: ignore[attr-defined]
    return order


@fuzzed
@given(sparse_problems(), st.data())
def test_keys_left_out_are_never_read(case: tuple[Problem, KeySet], data: st.DataObject) -> None:
    problem, keys = case
    read = allowed_keys(keys, problem.k.shape[2])[:, None, :, None]
    poisoned = Problem(
        problem.q,
        torch.where(read, problem.k, torch.nan),
        torch.where(read, problem.v, torch.nan),
        problem.mask,
        problem.weight,
        problem.scale,
    )
    counts = read.sum((1, 2, 3))
    if counts.min() == counts.max():  # otherwise padding reads, and masks, any position
        assert not run(poisoned, keys).isnan().any()
    assert not exact(poisoned, keys).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_key_at_all_gives_zeros(dtype: torch.dtype, batch: int) -> None:
    """All of a whole-block sequence is prompt, and nothing of it is kept."""
    q, k = torch.randn(batch, 4, 5, 8, dtype=dtype), torch.randn(batch, 2, 12, 8, dtype=dtype)
    blocks, sinks = torch.full((batch, 3), -1), torch.full((batch, 2), -1)
    candidates = torch.full((batch,), 3)
    for mask in (None, torch.ones(5, 12, dtype=torch.bool), torch.zeros(12, dtype=dtype)):
        out = sparse_attention(q, k, k, blocks, sinks, candidates, 4, mask, 1.0)
        assert torch.equal(out, torch.zeros_like(q))


def test_one_sequence_without_keys_beside_others() -> None:
    problem = Problem(
        torch.randn(3, 4, 5, 8),
        torch.randn(3, 2, 12, 8),
        torch.randn(3, 2, 12, 8),
        None,
        torch.ones(3, 5),
        1.0,
    )
    blocks = torch.tensor([[-1, -1, -1], [2, 0, -1], [1, -1, -1]])
    keys = (blocks, torch.tensor([[-1], [4], [5]]), torch.tensor([3, 3, 2]), 4)
    out = run(problem, keys)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    plain = plain_attention(problem, allowed_keys(keys, 12))
    assert_as_accurate(out, exact(problem, keys), plain, problem.v)


def test_key_block_longer_than_the_cache() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 7, 8)
    none = torch.empty(1, 0, dtype=torch.int64)
    out = sparse_attention(q, k, k, none, none, torch.tensor([0]), 32, None, 1.0)
    assert torch.equal(out, attention(q, k, k, None, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_sized_call(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 2048, 64, dtype=dtype)
    q = torch.randn(1, 32, 4, 64, dtype=dtype).transpose(1, 2)
    problem = Problem(q, k, v, None, torch.ones(1, 32), 0.125)
    blocks = torch.full((1, 64), -1)
    blocks[0, :31] = torch.randperm(62)[:31].sort().values
    keys = (blocks, torch.randint(1984, (1, 16)), torch.tensor([62]), 32)
    plain = plain_attention(problem, allowed_keys(keys, 2048))
    assert_as_accurate(run(problem, keys), exact(problem, keys), plain, v)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks": torch.zeros(2, 3)}, TypeError, "blocks must be int64"),
        ({"sinks": torch.zeros(1, 3).long()}, ValueError, "sinks differs"),
        ({"candidates": torch.zeros(2, 1).long()}, ValueError, "candidates must have 1 axes"),
        ({"key_block": 0}, ValueError, "key_block"),
        ({"v": torch.zeros(2, 2, 9, 8)}, ValueError, "k and v"),
        ({"mask": torch.zeros(11)}, ValueError, "broadcast"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 12, 8),
        "v": torch.zeros(2, 2, 12, 8),
        "blocks": torch.zeros(2, 3).long(),
        "sinks": torch.zeros(2, 1).long(),
        "candidates": torch.zeros(2).long(),
        "key_block": 4,
        "mask": None,
        "scale": 1.0,
    }
    with pytest.raises(error, match=f"sparse_attention: .*{message}"):
        sparse_attention(**{**good, **change})  # type: ignore[arg-type]


def of_shards(problem: Problem, keys: KeySet, shard_blocks: int) -> Tensor:
    """The mean over shards of so many key blocks each, weighted by their normalisers."""
    p, width = problem, shard_blocks * keys[3]
    outs, sums = [], []
    for first in range(0, p.k.shape[2], width):
        own = slice(first, first + width)
        mask = p.mask[..., own] if p.mask is not None and p.mask.shape[-1] > 1 else p.mask
        key, value = p.k[:, :, own], p.v[:, :, own]
        out, lse = sparse_attention_of_shard(
            p.q, key, value, *keys[:3], first, keys[3], mask, p.scale
        )
        exact_out, exact_lse = reference.sparse_attention_of_shard(
            p.q.double(), key.double(), value.double(), *keys[:3], first, keys[3],
            mask if mask is None or mask.dtype == torch.bool else mask.double(), p.scale,
        )  # fmt: skip
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert not out.isnan().any()
        torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.double(), exact_out, rtol=0.05, atol=0.05)
        outs.append(exact_out)
        sums.append(exact_lse.double())
    whole = torch.stack(sums).logsumexp(0)
    whole = whole.where(whole > -torch.inf, 0.0)
    return sum((lse - whole).exp()[..., None] * out for lse, out in zip(sums, outs, strict=True))  # type: ignore[return-value]


@fuzzed
@given(sparse_problems(), st.integers(1, 4))
def test_shards_joined_are_the_whole(case: tuple[Problem, KeySet], shard_blocks: int) -> None:
    problem, keys = case
    torch.testing.assert_close(
        of_shards(problem, keys, shard_blocks), exact(problem, keys), rtol=1e-5, atol=1e-5
    )


def test_a_shard_begins_at_a_block() -> None:
    q = torch.zeros(1, 1, 1, 8)
    k = torch.zeros(1, 1, 4, 8)
    lists = torch.zeros((1, 1), dtype=torch.int64)
    with pytest.raises(ValueError, match="first must be a multiple of key_block"):
        sparse_attention_of_shard(q, k, k, lists, lists, lists[0], 3, 2, None, 1.0)
