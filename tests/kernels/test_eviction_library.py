"""What the ops for token eviction owe torch: schema, fake, compilation; and lazy imports."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from focus_compile.kernels.compaction.op import compact_rows
from focus_compile.kernels.importance.op import importance
from focus_compile.kernels.ragged_attention.op import ragged_attention
from focus_compile.kernels.ragged_selection.op import ragged_select_blocks
from focus_compile.kernels.ragged_sparse_attention.op import ragged_sparse_attention
from focus_compile.kernels.row_selection.op import select_rows

PUBLIC = {
    "importance": importance,
    "select_rows": select_rows,
    "compact_rows": compact_rows,
    "ragged_attention": ragged_attention,
    "ragged_select_blocks": ragged_select_blocks,
    "ragged_sparse_attention": ragged_sparse_attention,
}
FLOATS = (
    "importance",
    "select_rows",
    "ragged_attention",
    "ragged_select_blocks",
    "ragged_sparse_attention",
)  # what their first argument is


def arguments(name: str, rows: int = 11, length: int = 23) -> tuple[Any, ...]:
    """Arguments of one op: 3 sequences, one of them empty, 4 heads on 2, 2 rows of padding."""
    generator = torch.Generator().manual_seed(rows * 100 + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    starts = torch.tensor([0, 4, 4, rows - 2])
    masked = torch.rand(rows, generator=generator) < 0.7
    q = normal(rows, 4, 8).transpose(0, 1)
    caches = normal(2, 5, 2, length, 8)
    slot, lengths = torch.tensor([3, 0, 4]), torch.tensor([length, 0, length - 3])
    target, progress = torch.tensor([2, 1, 3]), torch.tensor([-1, 0, 3])
    return {
        "importance": (q, normal(2, rows, 8), masked, starts, 16, 0.3),
        "select_rows": (normal(rows), masked, torch.arange(rows), starts, target, progress, 16),
        "compact_rows": (masked, starts, rows + 1),
        "ragged_attention": (q, *caches, slot, starts, lengths, 16, 0.3),
        "ragged_select_blocks": (
            q,
            torch.ones(rows),
            caches[0],
            slot,
            starts,
            lengths,
            lengths // 2,
            2,
            16,
        ),
        "ragged_sparse_attention": (
            q,
            *caches,
            slot,
            starts,
            lengths,
            torch.tensor([[0, 3], [-1, -1], [1, -1]]),
            lengths // 4,
            4,
            16,
            0.3,
        ),
    }[name]


def overload(name: str) -> Any:
    return getattr(torch.ops.focus_compile, name).default


def as_list(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize("name", PUBLIC)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(overload(name), arguments(name))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PUBLIC)
def test_opcheck_on_cuda(name: str) -> None:
    there = [a.cuda() if isinstance(a, Tensor) else a for a in arguments(name)]
    torch.library.opcheck(overload(name), there)
    for found, expected in zip(
        as_list(PUBLIC[name](*there)), as_list(PUBLIC[name](*arguments(name))), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PUBLIC)
def test_fake_keeps_symbolic_sizes(name: str) -> None:
    """Sizes of rows and cache stay symbols; dtypes and strides are the real ones."""
    real = as_list(PUBLIC[name](*arguments(name)))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [
            mode.from_tensor(value) if isinstance(value, Tensor) else value
            for value in arguments(name)
        ]
        for fake, expected in zip(as_list(PUBLIC[name](*fakes)), real, strict=True):
            assert fake.dtype == expected.dtype
            assert fake.is_contiguous()
            assert len(fake.shape) == len(expected.shape)


@pytest.mark.parametrize("name", PUBLIC)
def test_one_compilation_serves_all_sizes(name: str) -> None:
    """`capacity` too, which is a size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_wrapped(name), backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for rows, length in ((11, 23), (12, 40), (17, 31)):
        inputs = arguments(name, rows, length)
        expected = as_list(_wrapped(name)(*inputs))
        for out, value in zip(as_list(compiled(*inputs)), expected, strict=True):
            assert torch.equal(out, value)
        counts.add(counter.frame_count)
    assert len(counts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_inductor(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_wrapped(name), fullgraph=True, dynamic=True)
    for rows, length in ((11, 23), (13, 40)):
        inputs = arguments(name, rows, length)
        expected = as_list(_wrapped(name)(*inputs))
        for out, value in zip(as_list(compiled(*inputs)), expected, strict=True):
            torch.testing.assert_close(out, value)


def _wrapped(name: str) -> Callable[..., Any]:
    """The op between computed inputs and outputs, as in a program."""

    def function(first: Tensor, *rest: Any) -> Any:
        first = first * 2 if name in FLOATS else first.logical_not()
        out = PUBLIC[name](first, *rest)
        return tuple(part * 3 for part in out) if isinstance(out, tuple) else out * 3

    return function


def test_the_four_make_one_step() -> None:
    """One graph: score, choose, compact, gather and attend."""

    def step(q: Tensor, k: Tensor, cache: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        masked, positions, starts, slot, lengths, target, progress = rows
        delta = importance(q, k, masked, starts, 16, 0.3)
        keep = select_rows(delta, masked, positions, starts, target, progress, 16)
        index, new_starts = compact_rows(keep, starts, q.shape[1])
        return ragged_attention(q[:, index], cache, cache, slot, new_starts, lengths, 16, 0.3)

    q, k, masked, starts, *_ = arguments("importance")
    _, cache, _, slot, _, lengths, *_ = arguments("ragged_attention")
    _, _, positions, _, target, progress, _ = arguments("select_rows")
    rows = masked, positions, starts, slot, lengths, target, progress
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = compiled(q, k, cache, rows)
    assert torch.equal(found, step(q, k, cache, rows))
    kept = select_rows(
        importance(q, k, masked, starts, 16, 0.3), masked, positions, starts, target, progress, 16
    )
    whole = ragged_attention(q, cache, cache, slot, starts, lengths, 16, 0.3)
    torch.testing.assert_close(found[:, : int(kept.sum())], whole[:, kept])


SCRIPT = """
import importlib, os, sys
import torch
folders = "importance row_selection compaction ragged_attention"
for folder in folders.split():
    importlib.import_module(f"focus_compile.kernels.{folder}.op")
def loaded(kind):
    return sorted(m for m in sys.modules if m.startswith("focus_compile") and m.endswith(kind))
assert "triton" not in sys.modules and not loaded(".cpu") and not loaded(".reference")
keep, starts = torch.ones(3, dtype=torch.bool), torch.tensor([0, 3])
os.environ.pop("FOCUS_COMPILE_REFERENCE", None)
torch.ops.focus_compile.compact_rows(keep, starts, 3)
assert loaded(".cpu") == ["focus_compile.kernels.compaction.cpu"] and not loaded(".reference")
os.environ["FOCUS_COMPILE_REFERENCE"] = "1"
torch.ops.focus_compile.importance(torch.ones(2, 3, 4), torch.ones(1, 3, 4), keep, starts, 3, 1.0)
assert loaded(".reference") == ["focus_compile.kernels.importance.reference"]
"""


def test_implementation_is_imported_when_first_run() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
