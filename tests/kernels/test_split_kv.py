"""The split-KV kernel against the references: interpreted in float32, or compiled on CUDA.

pytest -m gpu tests/kernels/test_split_kv.py
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.devices import DOT_DTYPES, each_device, moved
from tests.kernels.strategies import (
    Problem,
    assert_as_accurate,
    key_sets,
    lay_out,
    plain_attention,
    problems,
)
from tests.kernels.test_attention import exact, normaliser
from tests.kernels.test_sparse_attention import KeySet, allowed_keys
from tests.kernels.test_sparse_attention import exact as exact_sparse

pytest.importorskip("triton")
from focus_compile.kernels.attention import kernel as dense_kernel
from focus_compile.kernels.attention.op import attention
from focus_compile.kernels.sparse_attention import kernel as sparse_kernel
from focus_compile.kernels.sparse_attention import reference as sparse_reference
from focus_compile.kernels.sparse_attention.op import sparse_attention
from focus_compile.kernels.split_kv import KeyList, attend
from focus_compile.kernels.tiling import H100, Device, Tiling, choose_splits, choose_tiling

SMALL_TILES = (None, Tiling(16, 16, 1, 4, 2), Tiling(16, 32, 3, 4, 3), Tiling(32, 16, 5, 4, 2))
few = settings(deadline=None, max_examples=8)


def on(problem: Problem, device: str) -> Problem:
    return replace(
        problem, **{name: moved(getattr(problem, name), device) for name in ("q", "k", "v", "mask")}
    )


def run(
    problem: Problem, device: str, keys: KeySet | None = None, tiling: Tiling | None = None
) -> tuple[Tensor, Tensor]:
    p = on(problem, device)
    listed = keys and KeyList(*(moved(ids, device) for ids in keys[:3]), keys[3])
    lse = torch.full(p.q.shape[:3], torch.nan, dtype=torch.float32, device=device)
    out = attend(p.q, p.k, p.v, p.mask, p.scale, listed, lse, tiling)
    assert out.is_contiguous()
    return out.cpu(), lse.cpu()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def check_sparse(
    problem: Problem, keys: KeySet, device: str, tiling: Tiling | None = None
) -> Tensor:
    """What is left out of the keys is NaN and must not be read."""
    allowed = allowed_keys(keys, problem.k.shape[2])
    read = allowed[:, None, :, None]
    poisoned = replace(
        problem,
        k=torch.where(read, problem.k, torch.nan),
        v=torch.where(read, problem.v, torch.nan),
    )
    out, _ = run(poisoned, device, keys, tiling)
    plain = plain_attention(problem, allowed)
    assert_as_accurate(out, exact_sparse(problem, keys), plain, problem.v)
    return out


@each_device
@few
@given(data=st.data())
def test_all_keys(device: str, data: st.DataObject) -> None:
    problem = data.draw(problems(dtypes=DOT_DTYPES[device]))
    out, lse = run(problem, device, tiling=data.draw(st.sampled_from(SMALL_TILES)))
    assert_as_accurate(out, exact(problem), plain_attention(problem), problem.v)
    torch.testing.assert_close(lse, normaliser(problem).float(), rtol=1e-5, atol=1e-5)


@each_device
@few
@given(data=st.data())
def test_listed_keys(device: str, data: st.DataObject) -> None:
    problem = data.draw(problems(dtypes=DOT_DTYPES[device]))
    keys = data.draw(key_sets(problem))
    check_sparse(problem, keys, device, data.draw(st.sampled_from(SMALL_TILES)))


@each_device
@few
@given(data=st.data())
def test_listed_keys_of_a_shard(device: str, data: st.DataObject) -> None:
    problem = data.draw(problems(dtypes=DOT_DTYPES[device], masks=("none",)))
    blocks, sinks, candidates, key_block = data.draw(key_sets(problem))
    width = key_block * data.draw(st.integers(1, 4))
    p, lists = on(problem, device), [moved(ids, device) for ids in (blocks, sinks, candidates)]
    for first in range(0, p.k.shape[2], width):
        own = slice(first, first + width)
        rest = (first, key_block, None, p.scale)
        found = sparse_kernel.sparse_attention_of_shard(
            p.q, p.k[:, :, own], p.v[:, :, own], *lists, *rest
        )
        expected = sparse_reference.sparse_attention_of_shard(
            p.q.double(), p.k[:, :, own].double(), p.v[:, :, own].double(), *lists, *rest
        )
        torch.testing.assert_close(found[0].double(), expected[0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@each_device
@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads"])
@pytest.mark.parametrize(("splits", "width"), [(1, 64), (4, 80)])
def test_seven_query_heads_a_kv_head(device: str, mask: str, splits: int, width: int) -> None:
    """Dream's group; a head dimension that is no power of two; several tiles of rows and keys."""
    torch.manual_seed(0)
    for dtype in DOT_DTYPES[device]:
        rows, length = 11, 203
        masks = {
            "none": None,
            "bool": torch.rand(rows, length) < 0.5,
            "float": normal(length),
            "heads": normal(1, 7, rows, length),
        }
        q = lay_out(normal(1, 7, rows, width, dtype=dtype), "heads-inside")
        k = lay_out(normal(1, 1, length, width, dtype=dtype), "heads-inside")
        v = lay_out(normal(1, 1, length, width, dtype=dtype), "window")
        problem = Problem(q, k, v, masks[mask], torch.ones(1, rows), width**-0.5)
        tiling = Tiling(32, 32, splits, 4, 3)
        out, lse = run(problem, device, tiling=tiling)
        assert_as_accurate(out, exact(problem), plain_attention(problem), problem.v)
        torch.testing.assert_close(lse, normaliser(problem).float(), rtol=1e-5, atol=1e-5)
        blocks = torch.full((1, 25), -1)
        blocks[0, :9] = torch.randperm(20)[:9]
        keys = (blocks, torch.randint(length, (1, 21)), torch.tensor([20]), 8)
        check_sparse(problem, keys, device, tiling)


@each_device
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "sinks",
    [
        [],
        [-1, -1],
        [7, 7, 7],  # repeated
        [8, 9, 12],  # in kept blocks
        [39, 40, 41],  # in the tail, which starts at 40
        [0, -1, 39, 8, 0, 45, -1, 1, 39],
        list(range(40)),  # several tiles, every prompt token
        [3] * 150 + [5],  # further apart than one chunk
    ],
)
def test_sinks_count_once(device: str, splits: int, sinks: list[int]) -> None:
    torch.manual_seed(0)
    problem = Problem(
        normal(1, 2, 3, 16), normal(1, 1, 47, 16), normal(1, 1, 47, 16), None, torch.ones(1, 3), 0.3
    )
    keys = (torch.tensor([[2, 3, -1, -1]]), torch.tensor([sinks]).long(), torch.tensor([10]), 4)
    check_sparse(problem, keys, device, Tiling(16, 16, splits, 4, 2))


@each_device
@pytest.mark.parametrize("key_block", [1, 3, 32])
def test_many_blocks(device: str, key_block: int) -> None:
    """More ids than are counted at once, where blocks are single tokens."""
    torch.manual_seed(0)
    length = 1100 * key_block // 8 if key_block > 1 else 1100
    problem = Problem(
        normal(2, 2, 3, 16),
        normal(2, 1, length, 16),
        normal(2, 1, length, 16),
        None,
        torch.ones(2, 3),
        0.3,
    )
    total = length // key_block
    blocks = torch.full((2, total), -1)
    for b, kept in enumerate((total - 9, total // 2)):
        blocks[b, :kept] = torch.randperm(total - 8)[:kept]
    keys = (blocks, torch.randint(length, (2, 3)), torch.tensor([total - 8, total - 8]), key_block)
    check_sparse(problem, keys, device, Tiling(16, 64, 2, 4, 3))


@each_device
@pytest.mark.parametrize("splits", [1, 2])
def test_nothing_to_read(device: str, splits: int) -> None:
    tiling = Tiling(16, 16, splits, 4, 2)
    q, k = normal(2, 4, 5, 8), normal(2, 2, 12, 8)
    problem = Problem(q, k, k, None, torch.ones(2, 5), 1.0)
    none = torch.full((2, 0), -1)
    keys = (none, none, torch.tensor([3, 3]), 4)
    for listed, kv in ((keys, k), (None, k[:, :, :0])):
        out, lse = run(replace(problem, k=kv, v=kv), device, listed, tiling)
        assert torch.equal(out, torch.zeros_like(q))
        assert (lse == -torch.inf).all()
    some = (torch.tensor([[1], [-1]]), none, torch.tensor([3, 3]), 4)
    assert (check_sparse(problem, some, device, tiling)[1] == 0).all()
    out, lse = run(replace(problem, q=q[:, :, :0]), device, keys, tiling)
    assert (out.shape, lse.shape) == ((2, 4, 0, 8), (2, 4, 0))


@each_device
@pytest.mark.parametrize("splits", [1, 2])
def test_masks_that_hide_everything(device: str, splits: int) -> None:
    """-inf and False leave zeros; the lowest finite number leaves the mean, as in torch."""
    torch.manual_seed(0)
    q, k, v = normal(1, 2, 5, 16), normal(1, 1, 40, 16), normal(1, 1, 40, 16)
    tiling = Tiling(16, 16, splits, 4, 2)
    for mask in (torch.zeros(5, 40, dtype=torch.bool), torch.full((40,), -torch.inf)):
        out, lse = run(Problem(q, k, v, mask, torch.ones(1, 5), 1.0), device, tiling=tiling)
        assert torch.equal(out, torch.zeros_like(q))
        assert (lse == -torch.inf).all()
    lowest = torch.full((1, 1, 1, 40), torch.finfo(torch.float32).min)
    out, _ = run(Problem(q, k, v, lowest, torch.ones(1, 5), 1.0), device, tiling=tiling)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(q.shape))


@each_device
@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_scale(device: str, scale: float) -> None:
    problem = Problem(
        20 * normal(1, 2, 3, 16),
        20 * normal(1, 1, 40, 16),
        normal(1, 1, 40, 16),
        None,
        torch.ones(1, 3),
        scale,
    )
    out, _ = run(problem, device, tiling=Tiling(16, 16, 2, 4, 2))
    assert_as_accurate(out, exact(problem), plain_attention(problem), problem.v)


@each_device
def test_the_ops_functions(device: str) -> None:
    """The three functions of the kernel files, and their default tiling."""
    torch.manual_seed(0)
    problem = Problem(
        normal(2, 4, 5, 16), normal(2, 2, 300, 16), normal(2, 2, 300, 16), None, torch.ones(2), 0.3
    )
    p = on(problem, device)
    keys = (torch.tensor([[4, 2], [-1, -1]]), torch.tensor([[9], [-1]]), torch.tensor([8, 9]), 32)
    there = tuple(ids.to(device) for ids in keys[:3])
    out, lse = dense_kernel.attention_with_lse(p.q, p.k, p.v, None, p.scale)
    assert torch.equal(out, dense_kernel.attention(p.q, p.k, p.v, None, p.scale))
    assert_as_accurate(out.cpu(), exact(problem), plain_attention(problem), problem.v)
    torch.testing.assert_close(lse.cpu(), normaliser(problem).float())
    out = sparse_kernel.sparse_attention(p.q, p.k, p.v, *there, keys[3], None, p.scale)
    plain = plain_attention(problem, allowed_keys(keys, 300))
    assert_as_accurate(out.cpu(), exact_sparse(problem, keys), plain, problem.v)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "rows"])
def test_many_rows(device: str, mask: str) -> None:
    """Torch's attention, and still zeros for a row without keys."""
    torch.manual_seed(0)
    for dtype in DOT_DTYPES[device]:
        rows, length = dense_kernel.MANY_ROWS + 8, 64
        masks = {
            "none": None,
            "bool": torch.rand(2, 1, 1, length) < 0.5,
            "float": normal(length),
            "rows": torch.rand(rows, length) < 0.5,
        }
        if mask == "bool":
            masks["bool"][1] = False
        if mask == "rows":
            masks["rows"][5:9] = False
        q = normal(2, 4, rows, 16, dtype=dtype)
        k, v = normal(2, 2, 2, length, 16, dtype=dtype)
        problem = Problem(q, k, v, masks[mask], torch.ones(2, rows), 0.25)
        p = on(problem, device)
        out = dense_kernel.attention(p.q, p.k, p.v, p.mask, p.scale)
        assert out.is_contiguous()
        rough = 0.02 if device == "cuda" else 1e-5  # there a mask is rounded to the dtype of q
        torch.testing.assert_close(out.cpu().double(), exact(problem), rtol=rough, atol=rough)


@each_device
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 128), (6, 2, 64), (3, 1, 40)])
def test_many_rows_and_their_normaliser(device: str, heads: int, kv_heads: int, width: int) -> None:
    torch.manual_seed(0)
    for dtype in DOT_DTYPES[device]:
        rows, length = dense_kernel.MANY_ROWS + 8, 150
        q = normal(2, heads, rows, width, dtype=dtype)
        k, v = (
            lay_out(normal(2, kv_heads, length, width, dtype=dtype), "heads-inside")
            for _ in range(2)
        )
        problem = Problem(q, k, v, None, torch.ones(2, rows), width**-0.5)
        p = on(problem, device)
        out, lse = dense_kernel.attention_with_lse(p.q, p.k, p.v, None, p.scale)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert_as_accurate(out.cpu(), exact(problem), plain_attention(problem), problem.v)
        torch.testing.assert_close(lse.cpu(), normaliser(problem).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 512])
def test_a_captured_graph_follows_the_ids(dtype: torch.dtype, width: int) -> None:
    """One capture serves other kept blocks, counts and sinks; the op runs the kernel."""
    torch.manual_seed(0)
    q, k, v = (
        normal(1, heads, rows, width, dtype=dtype).cuda()
        for heads, rows in ((14, 32), (2, 4001), (2, 4001))
    )
    blocks, sinks = torch.full((1, 125), -1).cuda(), torch.full((1, 16), -1).cuda()
    candidates = torch.tensor([120]).cuda()

    def step() -> tuple[Tensor, Tensor]:
        return (
            sparse_attention(q, k, v, blocks, sinks, candidates, 32, None, 0.088),
            attention(q, k, v, None, 0.088),
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dense = step()
    problem = Problem(q.cpu(), k.cpu(), v.cpu(), None, torch.ones(1, 32), 0.088)
    for kept in (0, 1, 60, 120):
        blocks.fill_(-1)
        blocks[0, :kept] = torch.randperm(120)[:kept].cuda()
        sinks.copy_(torch.randint(4001, (1, 16)))
        graph.replay()
        keys = (blocks.cpu(), sinks.cpu(), candidates.cpu(), 32)
        plain = plain_attention(problem, allowed_keys(keys, 4001))
        assert_as_accurate(out.cpu(), exact_sparse(problem, keys), plain, problem.v)
    assert_as_accurate(dense.cpu(), exact(problem), plain_attention(problem), problem.v)


@pytest.mark.parametrize("limits", [H100, Device(108, 166912), Device(128, 101376)])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_tilings_fit(limits: Device, width: int, itemsize: int, masked: bool) -> None:
    for packed in (1, 16, 64, 65, 128, 129, 448, 3000):
        for length in (0, 1, 100, 8192, 2**20):
            t = choose_tiling(32, packed, length, width, itemsize, masked, limits)
            padded = 1 << max(4, (width - 1).bit_length())
            shared = (t.block_m + 2 * t.stages * t.block_n) * padded * itemsize
            result = 4 * t.block_m * padded  # float32, through the same memory when stored
            assert max(shared, result) <= limits.shared_memory
            assert t.splits == 1 or t.splits * 64 <= length
            assert t.block_n >= 16
            assert t.stages >= 1


@pytest.mark.parametrize(
    ("programs", "slots", "most", "splits"),
    [
        (32, 132, 32, 4),
        (16, 132, 32, 8),
        (100, 132, 32, 5),
        (132, 132, 32, 1),
        (4000, 132, 32, 1),
        (1, 132, 32, 32),
        (32, 132, 1, 1),
    ],
)
def test_splits_fill_the_device(programs: int, slots: int, most: int, splits: int) -> None:
    assert choose_splits(programs, slots, most) == splits
