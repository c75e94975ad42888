"""The key blocks that a sparse layer keeps for each sequence of a ragged list of rows."""

import torch
from torch import Tensor

from focus_compile.kernels.library import check, check_dtype, define_op
from focus_compile.kernels.ragged import check_max_rows, check_rows, check_sequences, check_starts


def ragged_select_blocks(
    q: Tensor,
    weight: Tensor,
    summaries: Tensor,
    slot: Tensor,
    starts: Tensor,
    candidates: Tensor,
    keep: Tensor,
    sinks: int,
    max_rows: int,
) -> Tensor:
    """`select_blocks` for the rows of each sequence, its first blocks kept before any other.

    For a sequence s and the blocks j < candidates[s], with g = H // Hkv and its own
    summary = summaries[slot[s]]:

    relevance[s, j] = sum over its rows t of weight[t] * sum_h q[h, t] . summary[h // g, j]

    where "bound" summaries (see `block_summaries`) take (max(q, 0), min(q, 0)) in place of q. The
    blocks j < sinks are kept first, then the most relevant, keep[s] in all; of equal ones the
    lowest id first. Focus-dLLM (arXiv 2602.02159) keeps the positions that attract attention beside
    the relevant blocks; in models that were causal once they are the first ones (StreamingLLM,
    arXiv 2309.17453).

    Args:
        q: [H, T, d] float32, float16, bfloat16 or float64, any strides.
        weight: [T] float32, not negative. Where all of a sequence's are zero, its blocks are equal.
        summaries: [slots, Hkv, NB, d] ("mean") or [slots, Hkv, NB, 2 d] ("bound"), dtype of q, any
            strides, H % Hkv == 0.
        slot: [S] int64, whose summaries each sequence reads; not checked.
        starts: [S + 1] int32 or int64, where sequences start (see `ragged`); starts[S] <= T.
        candidates: [S] int64, the number of blocks that may be chosen, from block 0 on.
        keep: [S] int64, how many to choose, the first ones included: fewer than `sinks` means
            those, more than there are candidates all of them.
        sinks: blocks that are kept whatever their relevance, from block 0 on; at least 0.
        max_rows: rows of the longest sequence, or more; at least 1. What a longer sequence gets is
            not defined.

    Returns:
        [S, NB] int64: the kept ids ascending, then -1. Relevance is computed in float32 (float64
        for float64 inputs).

    Raises:
        ValueError: shapes that do not fit together, sinks < 0 or max_rows < 1.
        TypeError: dtypes that differ, weight not float32, indices that are not int64.
    """
    _check(q, weight, summaries, slot, starts, candidates, keep, sinks, max_rows)
    out: Tensor = _OP(q, weight, summaries, slot, starts, candidates, keep, sinks, max_rows)
    return out


def _check(
    q: Tensor,
    weight: Tensor,
    summaries: Tensor,
    slot: Tensor,
    starts: Tensor,
    candidates: Tensor,
    keep: Tensor,
    sinks: int,
    max_rows: int,
) -> None:
    op = "ragged_select_blocks"
    check(q.dim() == 3, op, "q must have 3 axes")
    check(summaries.dim() == 4, op, "summaries must have 4 axes")
    widths = (q.shape[2], 2 * q.shape[2])
    check(
        summaries.shape[3] in widths,
        op,
        "summaries must be as wide as the head dimension, or twice",
    )
    check(
        q.shape[0] % summaries.shape[1] == 0, op, "the query heads are no multiple of the kv heads"
    )
    check_dtype(q.is_floating_point(), op, "q must be floating point")
    check_dtype(q.dtype == summaries.dtype, op, "q and summaries differ in dtype")
    check_rows(op, "weight", weight, q.shape[1], torch.float32)
    check_starts(op, starts)
    for name, values in (("slot", slot), ("candidates", candidates), ("keep", keep)):
        check_sequences(op, name, values, starts)
    check(sinks >= 0, op, "sinks must not be negative")
    check_max_rows(op, max_rows, 2**31 - 1)


def _fake(
    q: Tensor,
    weight: Tensor,
    summaries: Tensor,
    slot: Tensor,
    starts: Tensor,
    candidates: Tensor,
    keep: Tensor,
    sinks: int,
    max_rows: int,
) -> Tensor:
    _check(q, weight, summaries, slot, starts, candidates, keep, sinks, max_rows)
    shape = (starts.shape[0] - 1, summaries.shape[2])
    return torch.empty(shape, dtype=torch.int64, device=q.device)


_OP = define_op(
    "ragged_select_blocks(Tensor q, Tensor weight, Tensor summaries, Tensor slot, Tensor starts,"
    " Tensor candidates, Tensor keep, int sinks, int max_rows) -> Tensor",
    folder="ragged_selection",
    fake=_fake,
    kernel=True,
)
