"""`staleness` in Triton: interpreted in float32, or compiled on CUDA in every dtype.

pytest -m gpu tests/kernels/test_staleness_kernel.py
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.kernels.staleness import reference
from tests.kernels.devices import DOT_DTYPES, each_device, few, moved
from tests.kernels.strategies import Problem, lay_out
from tests.kernels.test_sink_capture import log_sum_exp
from tests.kernels.test_staleness import attend, judgements

pytest.importorskip("triton")
from focus_compile.kernels.staleness import kernel


def check(given_: tuple[Any, ...], device: str, dtype: torch.dtype) -> None:
    """Against the reference of the same numbers."""
    there = [moved(x, device) if isinstance(x, Tensor) else x for x in given_]
    error, received = kernel.staleness(*there)
    expected, expected_received = reference.staleness(*given_)
    assert error.dtype == received.dtype == torch.float32
    # Interpreted or not, sums run in another order; what moved is a difference.
    size = expected.amax(1, keepdim=True).clamp_min(1e-6)
    torch.testing.assert_close(error.cpu() / size, expected / size, rtol=5e-3, atol=2e-4)
    torch.testing.assert_close(received.cpu(), expected_received, rtol=2e-3, atol=1e-5)


@each_device
@given(data=st.data())
@few
def test_equals_the_reference(device: str, data: st.DataObject) -> None:
    given_ = data.draw(judgements())
    dtype = data.draw(st.sampled_from(DOT_DTYPES[device]))
    check(cast(given_, dtype), device, dtype)


def cast(given_: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Queries, keys, values and outputs in a dtype; lse and what else is float32 as they are."""
    return tuple(x.to(dtype) if at in (0, 1, 2, 7, 8, 9, 10) else x for at, x in enumerate(given_))


@each_device
@pytest.mark.parametrize(
    ("heads", "kv_heads", "readers", "length", "probes", "width", "mask"),
    [
        (7, 1, 32, 300, 128, 80, "none"),
        (4, 4, 40, 131, 70, 128, "key"),  # two tiles of readers, and of probes
        (6, 2, 3, 70, 5, 8, "bool"),
        (2, 1, 16, 2000, 33, 16, "row"),
    ],
)
def test_over_many_tiles(
    device: str,
    heads: int,
    kv_heads: int,
    readers: int,
    length: int,
    probes: int,
    width: int,
    mask: str,
) -> None:
    for dtype in DOT_DTYPES[device]:
        torch.manual_seed(length)
        rows = 2 * readers
        q = torch.randn(2, heads, rows, width).to(dtype)
        k = lay_out(torch.randn(2, kv_heads, length, width).to(dtype), "heads-inside")
        v = torch.randn(2, kv_heads, length, width).to(dtype)
        hidden = torch.rand(rows, length) < 0.3
        hidden[0] = True  # a row without a key
        shown = {
            "none": None,
            "key": torch.randn(2, 1, 1, length),
            "bool": ~hidden,  # [rows, length]: broadcast from the right
            "row": torch.randn(1, heads, rows, length).masked_fill(hidden, -torch.inf),
        }[mask]
        p = Problem(q, k, v, shown, torch.ones(2, rows), width**-0.5)
        positions = torch.stack([torch.randperm(length)[:probes] for _ in range(2)])
        positions = torch.nn.functional.pad(positions, (0, max(0, probes - length)))
        at = positions[:, None, :, None].expand(-1, kv_heads, -1, width)
        old_k, old_v = k.gather(2, at), v.gather(2, at)
        new_k, new_v = (x + 0.5 * torch.randn_like(x) for x in (old_k, old_v))
        given_ = (
            q, k, attend(p).to(dtype), log_sum_exp(p).float(), torch.randint(rows, (2, readers)),
            torch.randint(2, (2, readers)).float(), torch.rand(2, length) < 0.6,
            old_k, new_k, old_v, new_v, positions, torch.rand(positions.shape), shown, p.scale,
        )  # fmt: skip
        check(given_, device, dtype)


@each_device
def test_nothing_moved_is_no_error(device: str) -> None:
    """To the bit: both halves of the difference are the same sums."""
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 90, 16)
    p = Problem(q, k, k, None, torch.ones(2, 3), 0.3)
    positions = torch.tensor([[1, 5], [2, 2]])
    at = k.gather(2, positions[:, None, :, None].expand(-1, 2, -1, 16))
    given_ = (
        q, k, attend(p).float(), log_sum_exp(p).float(), torch.zeros(2, 1).long(), torch.ones(2, 1),
        torch.ones(2, 90).bool(), at, at, at, at, positions, torch.ones(2, 2), None, 0.3,
    )  # fmt: skip
    error, _ = kernel.staleness(*(moved(x, device) if isinstance(x, Tensor) else x for x in given_))
    assert error[:, 0].cpu().abs().max() < 1e-10
    assert (error[:, 1] > 0).all()
