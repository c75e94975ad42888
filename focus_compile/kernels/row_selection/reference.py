"""The rule of `select_rows`, one sequence at a time, on lists and in fractions.

The fractions make the comparison delta_j >= mean + std exact: no root is taken.
"""

from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor


def select_rows(
    delta: Tensor,
    masked: Tensor,
    positions: Tensor,
    starts: Tensor,
    target: Tensor,
    progress: Tensor,
    max_rows: int,
) -> Tensor:
    """See op.py."""
    keep = torch.zeros_like(masked, memory_format=torch.contiguous_format)
    bounds = starts.tolist()
    for s, (first, end) in enumerate(pairwise(bounds)):
        rows = range(first, end)
        hidden = [t for t in rows if masked[t]]
        kept = kept_rows(
            [float(delta[t]) for t in hidden],
            [int(positions[t]) for t in hidden],
            int(target[s]),
            int(progress[s]),
        )
        for t in rows:
            keep[t] = not masked[t] or hidden.index(t) in kept
    return keep


def kept_rows(deltas: list[float], positions: list[int], target: int, progress: int) -> set[int]:
    """Which of a sequence's n masked rows are kept, as numbers below n."""
    n = len(deltas)
    chosen = set(range(n)) if n <= target else budgeted(deltas, target)
    kept = set(chosen)
    for i in range(n - 1):
        if i + 1 in chosen and positions[i + 1] - positions[i] == 1:
            kept.add(i)
    if not kept:
        kept = set(range(n))
    last = max((positions[i] for i in kept), default=0)
    return kept | {i for i in range(n) if progress < positions[i] < last}


def budgeted(deltas: list[float], target: int) -> set[int]:
    """The outliers if there are `target` of them, else the `target` highest."""
    outliers = {i for i, is_one in enumerate(outlying(deltas)) if is_one}
    if len(outliers) >= target:
        return outliers
    best_first = sorted(range(len(deltas)), key=lambda i: (-deltas[i], i))
    return set(best_first[:target])


def outlying(deltas: list[float]) -> list[bool]:
    """delta >= mean + std, of each."""
    values = [Fraction(delta) for delta in deltas]
    n = len(values)
    mean = sum(values, Fraction(0)) / n
    variance = sum(((value - mean) ** 2 for value in values), Fraction(0)) / n
    return [value >= mean and (value - mean) ** 2 >= variance for value in values]
