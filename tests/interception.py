"""Every attention call of a model, answered by a function of ours.

Attention is found in two ways: calls of `torch.nn.functional.scaled_dot_product_attention` (stock
transformers models are switched to it for the call), and submodules with a method
`attend(q, k, v, mask=None, scale=None)`, for hand-written models of any other spelling.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Attend", "dense", "run", "softmax", "wide"]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""(q, k, v, mask, scale) -> output; q, k, v [B, H, T, d] with key heads already repeated."""

SDPA = functional.scaled_dot_product_attention


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What the model itself would have computed."""
    return SDPA(q, k, v, attn_mask=mask, scale=scale)


def run(model: nn.Module, ids: Tensor, inputs: dict[str, Any], attend: Attend) -> Tensor:
    """The model's own forward with every attention call answered by `attend`; logits [B, T, V]."""
    with intercepted(model, attend):
        output = model(ids, **inputs)
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


@contextlib.contextmanager
def intercepted(model: nn.Module, attend: Attend) -> Iterator[None]:
    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or dropout_p:
            raise ValueError("the oracle knows neither causal attention nor dropout")
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return attend(query, key, value, attn_mask, scale)

    def method(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        return sdpa(q, k, v, mask, scale=scale)

    spelt = [m for m in model.modules() if callable(getattr(m, "attend", None))]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    stock = [c for c in configs.values() if getattr(c, "_attn_implementation", None) is not None]
    before = [config._attn_implementation for config in stock]
    functional.scaled_dot_product_attention = sdpa
    for module in spelt:
        module.attend = method  # type: ignore[assignment]
    for config in stock:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = SDPA
        for module in spelt:
            del module.attend
        for config, implementation in zip(stock, before, strict=True):
            config._attn_implementation = implementation


def softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, allowed: Tensor) -> Tensor:
    """softmax(q k^T scale + mask) over the allowed keys [B, T]; zeros where none is left."""
    scores = wide(q) @ wide(k).transpose(-1, -2) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~allowed[:, None, None, :], -math.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
