"""The prompt blocks that a sparse layer keeps, chosen by the focus rows' queries.

Where heads are spread over ranks, `block_relevance` is what each knows, and `keep_blocks` chooses
by the sum.
"""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype, check_index, define_op


def select_blocks(
    q: Tensor, weight: Tensor, summaries: Tensor, candidates: Tensor, keep: Tensor
) -> Tensor:
    """Pick, for each sequence, the most relevant key blocks.

    relevance[b, j] = sum_r weight[b, r] * sum_h q[b, h, r] . summaries[b, h // g, j]
                      / (H * sum_r weight[b, r]),   g = H // Hkv

    where "bound" summaries (see `block_summaries`) take (max(q, 0), min(q, 0)) in place of q.

    The `keep[b]` blocks of highest relevance among j < candidates[b] are kept; of equal ones the
    lowest id first. Focus-dLLM (arXiv 2602.02159) does this in every sparse layer of every step
    with Q_focus; there, `weight` is 1 for focus rows and 0 for others. The paper does not say how
    it reduces over rows and heads; here it is the mean.

    Args:
        q: [B, H, R, d], floating, any strides. Rows may repeat: each occurrence counts.
        weight: [B, R] floating, not negative. All zero makes all blocks equal.
        summaries: [B, Hkv, NB, d] ("mean") or [B, Hkv, NB, 2 d] ("bound"), dtype of q; H is a
            multiple of Hkv.
        candidates: [B] int64, the number of blocks that may be chosen, from block 0 on.
        keep: [B] int64, how many to choose; more than there are candidates means all of them.

    Returns:
        [B, NB] int64: the kept ids ascending, then -1. Relevance is computed in float32.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that differ, or indices that are not int64.
    """
    _check(q, weight, summaries, candidates, keep)
    out: Tensor = _OP(q, weight, summaries, candidates, keep)
    return out


def block_relevance(q: Tensor, weight: Tensor, summaries: Tensor) -> Tensor:
    """What `select_blocks` ranks blocks by, up to a factor that all blocks of a sequence share.

    Returns:
        [B, NB] float32: sum_r weight[b, r] * sum_h q[b, h, r] . summaries[b, h // g, j].

    Raises:
        ValueError, TypeError: as `select_blocks`.
    """
    _check_queries("block_relevance", q, weight, summaries)
    out: Tensor = _RELEVANCE(q, weight, summaries)
    return out


def keep_blocks(relevance: Tensor, candidates: Tensor, keep: Tensor) -> Tensor:
    """The second half of `select_blocks`: ids [B, NB] int64 by relevance [B, NB] float32.

    Raises:
        ValueError, TypeError: as `select_blocks`.
    """
    _check_choice(relevance, candidates, keep)
    out: Tensor = _KEEP(relevance, candidates, keep)
    return out


def _check(q: Tensor, weight: Tensor, summaries: Tensor, candidates: Tensor, keep: Tensor) -> None:
    op = "select_blocks"
    _check_queries(op, q, weight, summaries)
    check_index(op, "candidates", candidates, q.shape[0], dim=1)
    check_index(op, "keep", keep, q.shape[0], dim=1)


def _check_choice(relevance: Tensor, candidates: Tensor, keep: Tensor) -> None:
    op = "keep_blocks"
    check(relevance.dim() == 2, op, "relevance must have 2 axes")
    check_dtype(relevance.dtype == torch.float32, op, "relevance must be float32")
    check_index(op, "candidates", candidates, relevance.shape[0], dim=1)
    check_index(op, "keep", keep, relevance.shape[0], dim=1)


def _check_queries(op: str, q: Tensor, weight: Tensor, summaries: Tensor) -> None:
    check(q.dim() == summaries.dim() == 4, op, "q and summaries must have 4 axes")
    check(q.shape[0] == summaries.shape[0], op, "q and summaries differ in batch size")
    widths = (q.shape[3], 2 * q.shape[3])
    check(
        summaries.shape[3] in widths,
        op,
        "summaries must be as wide as the head dimension, or twice",
    )
    check(
        q.shape[1] % summaries.shape[1] == 0, op, "the query heads are no multiple of the kv heads"
    )
    check(weight.dim() == 2, op, "weight must have 2 axes")
    check(weight.shape[0] == q.shape[0], op, "weight and q differ in batch size")
    check(weight.shape[1] == q.shape[2], op, "weight and q differ in rows")
    check_dtype(q.is_floating_point(), op, "q must be floating point")
    check_dtype(q.dtype == summaries.dtype, op, "q and summaries differ in dtype")
    check_dtype(weight.is_floating_point(), op, "weight must be floating point")


def _fake(q: Tensor, weight: Tensor, summaries: Tensor, candidates: Tensor, keep: Tensor) -> Tensor:
    _check(q, weight, summaries, candidates, keep)
    shape = (summaries.shape[0], summaries.shape[2])
    return torch.empty(shape, dtype=torch.int64, device=q.device)


_OP = define_op(
    "select_blocks(Tensor q, Tensor weight, Tensor summaries, Tensor candidates, Tensor keep)"
    " -> Tensor",
    folder="block_selection",
    fake=_fake,
    kernel=True,
)


def _fake_relevance(q: Tensor, weight: Tensor, summaries: Tensor) -> Tensor:
    _check_queries("block_relevance", q, weight, summaries)
    shape = (summaries.shape[0], summaries.shape[2])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


_RELEVANCE = define_op(
    "block_relevance(Tensor q, Tensor weight, Tensor summaries) -> Tensor",
    folder="block_selection",
    fake=_fake_relevance,
    kernel=True,
)


def _fake_keep(relevance: Tensor, candidates: Tensor, keep: Tensor) -> Tensor:
    _check_choice(relevance, candidates, keep)
    return torch.empty(relevance.shape, dtype=torch.int64, device=relevance.device)


_KEEP = define_op(
    "keep_blocks(Tensor relevance, Tensor candidates, Tensor keep) -> Tensor",
    folder="block_selection",
    fake=_fake_keep,
    kernel=True,
)
