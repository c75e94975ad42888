"""An attention mask as Triton kernels read it."""

import torch
from torch import Tensor

__all__ = ["mask_view"]


def mask_view(mask: Tensor | None, q: Tensor, length: int) -> tuple[str, Tensor | None]:
    """("none", "bool" or "float") and the mask as [B, H, R, T], a view; bool as bytes.

    q: [B, H, R, d]. length: T.
    """
    if mask is None:
        return "none", None
    kind = "float"
    if mask.dtype == torch.bool:
        kind, mask = "bool", mask.view(torch.uint8)
    return kind, mask.expand(*q.shape[:3], length)
