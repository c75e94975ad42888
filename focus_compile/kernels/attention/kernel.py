"""`attention` and `attention_with_lse` on CUDA: split over the keys, or torch's SDPA."""

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from focus_compile.kernels.attention import cpu
from focus_compile.kernels.split_kv import attend

_CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
# With more query rows than this the rows alone fill the device, and cuDNN is faster.
MANY_ROWS = 512


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See op.py."""
    if q.shape[2] <= MANY_ROWS:
        return attend(q, k, v, mask, scale)
    with fastest_sdpa(q.device):
        out = cpu.attention(q, k, v, mask, scale)
    if mask is None:
        return out
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return torch.where(seen.any(-1, keepdim=True), out, 0)  # fused backends may give NaN


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    if q.shape[2] > MANY_ROWS and mask is None and q.is_cuda:
        packed = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        if _cudnn_takes(packed, k, v):
            out, lse = _CUDNN(packed, k, v, None, True, scale=scale)[:2]
            return out.reshape(q.shape).contiguous(), lse.reshape(q.shape[:3]).contiguous()
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return attend(q, k, v, mask, scale, lse=lse), lse


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    asked = SDPAParams(q, k, v, None, 0.0, False, False)
    return torch.cuda.get_device_capability(q.device) >= (9, 0) and can_use_cudnn_attention(asked)


@contextlib.contextmanager
def fastest_sdpa(device: torch.device) -> Iterator[None]:
    """torch's SDPA with its backends by speed; cuDNN's kernels for Hopper are half as fast again as
    flash attention 2. Other attention of the process is left as it was."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type == "cuda":
        _let_torch_decide(device)
        if torch.cuda.get_device_capability(device) >= (9, 0):
            backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(backends, set_priority=True):
        yield


@cache
def _let_torch_decide(device: torch.device) -> None:
    """Have torch settle its own order of backends, which it does in the process's first attention:
    `sdpa_kernel` would restore the unsettled one, without cuDNN in front, for good."""
    row = torch.zeros((1, 1, 1, 64), dtype=torch.bfloat16, device=device)
    torch._fused_sdp_choice(row, row, row)
