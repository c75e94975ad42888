"""`attention` and `attention_with_lse` on CUDA: split over the keys, or torch's SDPA."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from focus_compile.kernels.attention import cpu
from focus_compile.kernels.split_kv import attend

# With more query rows than this the rows alone fill the device, and cuDNN is faster.
MANY_ROWS = 512


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See op.py."""
    if q.shape[2] <= MANY_ROWS:
        return attend(q, k, v, mask, scale)
    with sdpa_kernel(_backends(q), set_priority=True):
        out = cpu.attention(q, k, v, mask, scale)
    if mask is None:
        return out
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return torch.where(seen.any(-1, keepdim=True), out, 0)  # fused backends may give NaN


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return attend(q, k, v, mask, scale, lse=lse), lse


def _backends(q: Tensor) -> list[SDPBackend]:
    """Fastest first; cuDNN's kernels for Hopper are half as fast again as flash attention 2."""
    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0):
        return [SDPBackend.CUDNN_ATTENTION, *flash]
    return flash
