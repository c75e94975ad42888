"""Where the tests of Triton kernels run: interpreted on the CPU, or compiled on CUDA."""

import pytest
import torch
from hypothesis import settings
from torch import Tensor

DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted"),
    ),
]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DOT_DTYPES = {"cpu": (torch.float32,), "cuda": FLOATS}  # the interpreter's bfloat16 dot is wrong
each_device = pytest.mark.parametrize("device", DEVICES)
few = settings(deadline=None, max_examples=8)


def moved(tensor: Tensor | None, device: str) -> Tensor | None:
    """The same strides over a copied storage."""
    if tensor is None:
        return None
    storage = tensor.as_strided((tensor.untyped_storage().size() // tensor.itemsize,), (1,), 0)
    copy = storage.to(device)
    return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
