"""The `focus_compile` operator library: how every kernel folder registers its op.

An op is its schema, a fake (shapes for tracing, and the checks) and implementations of one name:
`cpu.py`, fast in plain torch on any device; `reference.py`, slow and obvious; and, where the folder
has one, `kernel.py`, Triton for CUDA tensors of `KERNEL_DTYPES`. None is imported before the op
first runs; `FOCUS_COMPILE_REFERENCE=1` in the environment at that moment picks the reference. An
op mutates nothing and returns contiguous tensors whatever the strides of its inputs.
"""

import contextlib
import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from focus_compile.torch_tools import call_attention

LIBRARY = torch.library.Library("focus_compile", "DEF")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ATTENTION = (
    "attention",
    "attention_with_lse",
    "sparse_attention",
    "sparse_attention_of_shard",
    "ragged_attention",
    "ragged_sparse_attention",
)
"""Ops of which each layer runs one."""
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

Tap = Callable[[str, tuple[Any, ...], Any], object]
"""Is given the name, the arguments and the result of every op that runs."""
_tap: contextvars.ContextVar[Tap | None] = contextvars.ContextVar("focus_compile_tap", default=None)


@contextlib.contextmanager
def tapped(tap: Tap | None) -> Iterator[None]:
    """Ops that run in this context, but for a replayed CUDA graph's, are shown to `tap`."""
    token = _tap.set(tap)
    try:
        yield
    finally:
        _tap.reset(token)


def define_op(
    schema: str, folder: str, fake: Callable[..., Any], *, kernel: bool = False
) -> OpOverload:
    """Register `focus_compile::<schema>`, implemented in `focus_compile/kernels/<folder>`.

    `fake` takes the op's arguments, checks them and returns empty outputs; tracing runs it instead
    of the implementation. The implementation trusts its arguments: a traced call was checked by
    `fake`, an eager one by the op's public function. kernel: the folder has a `kernel.py`.
    """
    name = schema.partition("(")[0]
    ranged = call_attention if name in ATTENTION else _as_it_is
    plain = _lazy(folder, name, "cpu")
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, ranged(plain), "CompositeExplicitAutograd")
    if kernel:
        LIBRARY.impl(name, ranged(_by_dtype(_lazy(folder, name, "kernel"), plain)), "CUDA")
    torch.library.register_fake(f"focus_compile::{name}", fake, lib=LIBRARY)
    overload: OpOverload = getattr(torch.ops.focus_compile, name).default
    return overload


def _as_it_is(call: Callable[..., Any]) -> Callable[..., Any]:
    return call


def _lazy(folder: str, name: str, fast: str) -> Callable[..., Any]:
    @functools.cache
    def implementation() -> Callable[..., Any]:
        module = "reference" if os.environ.get("FOCUS_COMPILE_REFERENCE") == "1" else fast
        found = importlib.import_module(f"focus_compile.kernels.{folder}.{module}")
        function: Callable[..., Any] = getattr(found, name)
        return function

    def call(*arguments: Any) -> Any:
        result = implementation()(*arguments)
        tap = _tap.get()
        if tap is not None:
            tap(name, arguments, result)
        return result

    return call


def _by_dtype(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` where the first argument's dtype is one that it takes, or no float, else `plain`."""

    def call(first: Tensor, *rest: Any) -> Any:
        taken = first.dtype in KERNEL_DTYPES or not first.is_floating_point()
        return (kernel if taken else plain)(first, *rest)

    return call


def check_attention_inputs(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError or TypeError unless q [B, H, R, d] can attend to k, v [B, Hkv, T, d].

    Also requires H % Hkv == 0, one floating dtype, and a mask that is None, bool or floating and
    broadcastable to [B, H, R, T].
    """
    check(q.dim() == k.dim() == v.dim() == 4, op, "q, k and v must have 4 axes")
    check(q.shape[0] == k.shape[0], op, "q and k differ in batch size")
    check(q.shape[3] == k.shape[3], op, "q and k differ in head dimension")
    check(k.shape[:3] == v.shape[:3], op, "k and v differ in batch, heads or length")
    check(q.shape[1] % k.shape[1] == 0, op, "the query heads are no multiple of the kv heads")
    check_dtype(q.is_floating_point(), op, "q must be floating point")
    check_dtype(q.dtype == k.dtype == v.dtype, op, "q, k and v differ in dtype")
    if mask is None:
        return
    check_dtype(
        mask.dtype == torch.bool or mask.is_floating_point(), op, "mask must be bool or floating"
    )
    check(mask.dim() <= 4, op, "mask has more than 4 axes")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for size, wanted in zip(reversed(mask.shape), reversed(full), strict=False):
        check(size == 1 or size == wanted, op, "mask does not broadcast to [B, H, R, T]")


def check_index(op: str, name: str, index: Tensor, batch: int, dim: int) -> None:
    """Raise unless `index` is int64 with `dim` axes, the first of size `batch`."""
    check_dtype(index.dtype == torch.int64, op, f"{name} must be int64")
    check(index.dim() == dim, op, f"{name} must have {dim} axes")
    check(index.shape[0] == batch, op, f"{name} differs from q in batch size")


def check(condition: bool | torch.SymBool, op: str, message: str) -> None:
    """Raise ValueError(f"{op}: {message}") unless the condition holds; symbols are guarded."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def check_dtype(condition: bool, op: str, message: str) -> None:
    """Raise TypeError(f"{op}: {message}") unless the condition holds."""
    if not condition:
        raise TypeError(f"{op}: {message}")
