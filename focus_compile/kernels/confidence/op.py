"""How sure the model is of a row: the highest softmax probability and its token."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype, define_op


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Highest softmax probability of each row of logits, and the token that has it.

    token = argmax_v logits[..., v]   (of equal logits the lowest v)
    probability = exp(logits[..., token]) / sum_v exp(logits[..., v])

    Ranks the masked rows for the focus set of the next step (Focus-dLLM, arXiv 2602.02159: the
    confidence c_i(t - 1)) and for the samplers' choice of what to decode.

    Args:
        logits: [..., V], floating, any strides, V >= 1.

    Returns:
        (probability [...] float32, token [...] int64), contiguous; computed in float32 (float64 for
        float64 logits). A row without a finite logit has no probability: NaN.

    Raises:
        ValueError: no vocabulary axis, or an empty one.
        TypeError: logits are not floating point.
    """
    _check(logits)
    probability, token = _OP(logits)
    return probability, token


def _check(logits: Tensor) -> None:
    check(logits.dim() >= 1, "confidence", "logits must have a vocabulary axis")
    check(logits.shape[-1] >= 1, "confidence", "the vocabulary is empty")
    check_dtype(logits.is_floating_point(), "confidence", "logits must be floating point")


def _fake(logits: Tensor) -> tuple[Tensor, Tensor]:
    _check(logits)
    shape = logits.shape[:-1]
    probability = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return probability, torch.empty(shape, dtype=torch.int64, device=logits.device)


_OP = define_op(
    "confidence(Tensor logits) -> (Tensor probability, Tensor token)",
    folder="confidence",
    fake=_fake,
    kernel=True,
)
