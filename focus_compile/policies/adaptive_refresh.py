"""Which prompt rows a block entry renews, where not all of them are worth it.

Nearest in the literature: Elastic-Cache refreshes when the most-attended token drifts, dLLM-Cache
at intervals. Here the rows are those read most, the oldest, and a random draw that the error of
leaving the rest is estimated from (`kernels/staleness`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Renewal", "likely_read", "rows_to_renew"]

DRAWN = 0.5
"""Share of the budget that is drawn at random."""
FEWEST_DRAWN = 16


@dataclass(frozen=True)
class Renewal:
    """Rows of the prompt, [batch, length].

    rows bool: to renew. weight fp32: the inverse of the probability that a row was drawn, of those
    that were; else 0.
    """

    rows: Tensor
    weight: Tensor


def rows_to_renew(
    received: Tensor,
    age: Tensor,
    prompt: Tensor,
    share: float,
    max_age: int,
    most_drawn: int,
    generator: torch.Generator,
) -> Renewal:
    """The oldest rows, so that none is left out of `max_age` renewals in a row; of the others those
    read most; and of the rest some at random, those read more the likelier.

    A draw without replacement by exponential races (Efraimidis and Spirakis 2006): the rows of the
    least arrival times -log(u) / received. Given the arrival time s of the first row that is not
    drawn, each was drawn with probability 1 - exp(-s received).

    Args:
        received: fp32 [batch, length], attention that each position draws.
        age: int64 [batch, length], renewals since the row was last among the rows.
        prompt: bool [batch, length], the rows in question.
        share: of each sequence's prompt, how much to renew, from 0 to 1.
        max_age: at least 1.
        most_drawn: rows of a sequence drawn at random, at most.
        generator: of the draw, on the CPU.
    """
    total = prompt.sum(1)
    budget = (total.double() * share).ceil().long()
    old = (total + max_age - 1) // max_age
    drawn = (budget.double() * DRAWN).ceil().long().clamp(FEWEST_DRAWN, most_drawn)
    read = (budget - old - drawn).clamp(min=0)
    oldest = _highest(age, prompt, old)
    most_read = _highest(received, prompt & ~oldest, read)
    rest = prompt & ~oldest & ~most_read
    rate = received.double().clamp(min=1e-12)
    uniform = torch.rand(prompt.shape, generator=generator, dtype=torch.float64)
    arrival = -uniform.clamp(min=1e-300).log().to(prompt.device) / rate
    arrival = torch.where(rest, arrival, torch.inf)
    in_order = arrival.sort(1).values
    after = in_order.gather(1, drawn.clamp(max=prompt.shape[1] - 1)[:, None])
    sample = rest & (arrival < after)
    weight = torch.where(sample, 1 / -torch.expm1(-after * rate), 0.0)
    return Renewal(oldest | most_read | sample, weight.float())


def likely_read(prompt: Tensor, response_start: Tensor, sink_tokens: int) -> Tensor:
    """What is read most before anything was measured: the first positions, then those nearest to
    the response. fp32 [batch, length]."""
    positions = torch.arange(prompt.shape[1], device=prompt.device)
    distance = (response_start[:, None] - positions).clamp(min=1).float()
    return torch.where(prompt & (positions < sink_tokens), 2.0, 1.0 / distance)


def _highest(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` [batch] positions of highest score among some; of equal ones the first."""
    lowest = scores.min() - 1
    order = torch.where(among, scores, lowest).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return (rank < count[:, None]) & among
