"""What every op owes torch: schema, fake, compilation; and lazy imports."""

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

from focus_compile.kernels.attention.op import attention, attention_with_lse
from focus_compile.kernels.block_selection.op import select_blocks
from focus_compile.kernels.block_summaries.op import block_summaries
from focus_compile.kernels.confidence.op import confidence
from focus_compile.kernels.sink_capture.op import capture_sinks
from focus_compile.kernels.sparse_attention.op import sparse_attention

PUBLIC = {
    "attention": attention,
    "attention_with_lse": attention_with_lse,
    "block_summaries": block_summaries,
    "select_blocks": select_blocks,
    "capture_sinks": capture_sinks,
    "sparse_attention": sparse_attention,
    "confidence": confidence,
}


def arguments(name: str, rows: int = 5, length: int = 23, masked: bool = True) -> tuple[Any, ...]:
    """Arguments of one op for a batch of 2, 4 heads on 2, key blocks of 4."""
    generator = torch.Generator().manual_seed(rows * 100 + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = normal(2, rows, 4, 8).transpose(1, 2)
    k, v = normal(2, 2, length, 8), normal(2, 2, length, 8)
    mask = normal(2, 1, rows, length) if masked else None
    total = length // 4
    candidates, keep = torch.tensor([total - 1, total - 2]), torch.tensor([2, 1])
    blocks = torch.full((2, total), -1)
    blocks[:, 0] = 1
    sinks = torch.tensor([[0, 9, -1], [2, 3, -1]])
    weight = normal(2, rows).abs()
    logits = 0.3 * q @ k.repeat_interleave(2, 1).mT
    lse = (logits if mask is None else logits + mask).logsumexp(-1)
    return {
        "attention": (q, k, v, mask, 0.3),
        "attention_with_lse": (q, k, v, mask, 0.3),
        "block_summaries": (k, 4, "bound"),
        "select_blocks": (q, weight, normal(2, 2, total, 8), candidates, keep),
        "capture_sinks": (q, k, lse, weight, mask, candidates * 4, 3, 0.3),
        "sparse_attention": (q, k, v, blocks, sinks, candidates, 4, mask, 0.3),
        "confidence": (normal(2, rows, length),),
    }[name]


def overload(name: str) -> Any:
    return getattr(torch.ops.focus_compile, name).default


def as_list(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(name: str, masked: bool) -> None:
    torch.library.opcheck(overload(name), arguments(name, masked=masked))


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
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_wrapped(name), backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for rows, length in ((6, 23), (7, 40), (11, 31)):
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
    for rows, length in ((5, 23), (7, 40)):
        inputs = arguments(name, rows, length)
        expected = as_list(_wrapped(name)(*inputs))
        for out, value in zip(as_list(compiled(*inputs)), expected, strict=True):
            torch.testing.assert_close(out, value)


def _wrapped(name: str) -> Callable[..., Any]:
    """The op between computed inputs and outputs, as in a program."""

    def function(first: Tensor, *rest: Any) -> Any:
        out = PUBLIC[name](first * 2, *rest)
        return tuple(part + 1 for part in out) if isinstance(out, tuple) else out + 1

    return function


SCRIPT = """
import importlib, os, sys
import torch
folders = "attention block_summaries block_selection sink_capture sparse_attention confidence"
for folder in folders.split():
    importlib.import_module(f"focus_compile.kernels.{folder}.op")
def loaded(kind):
    return sorted(m for m in sys.modules if m.startswith("focus_compile") and m.endswith(kind))
assert "triton" not in sys.modules and not loaded(".cpu") and not loaded(".reference")
os.environ.pop("FOCUS_COMPILE_REFERENCE", None)
torch.ops.focus_compile.block_summaries(torch.ones(1, 1, 8, 2), 4, "mean")
assert loaded(".cpu") == ["focus_compile.kernels.block_summaries.cpu"] and not loaded(".reference")
os.environ["FOCUS_COMPILE_REFERENCE"] = "1"
torch.ops.focus_compile.confidence(torch.ones(3, 4))
assert loaded(".reference") == ["focus_compile.kernels.confidence.reference"]
"""


def test_implementation_is_imported_when_first_run() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
