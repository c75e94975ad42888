"""Monte Carlo likelihoods of masked diffusion models.

The log-likelihood of L tokens is bounded from below by the mean, over a number l of masked tokens
drawn uniformly from 1 to L and a random set of that size, of L / l times the log probabilities of
the masked tokens given the others (LLaDA, arXiv 2502.09992, eq. 6). In a block-diffusion model the
bound is the sum over blocks, each given the clean blocks before it (arXiv 2503.09573).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["Likelihood", "random_masks"]


def random_masks(length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(masks [count, length] bool, their sizes [count] int64).

    Sizes are uniform in 1 to `length`, one from each of `count` equal shares of that range.
    """
    share = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    sizes = 1 + (share * length).long().clamp(max=length - 1)
    rank = torch.rand(count, length, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank < sizes[:, None], sizes


@dataclass(frozen=True)
class Likelihood:
    """Scores continuations with a dense model."""

    call: Any
    """ids [batch, tokens] to `.logits` [batch, tokens, vocabulary], in place."""
    mask_token_id: int
    device: torch.device
    mc_num: int = 128
    batch_size: int = 1
    seed: int = 0
    block_length: int | None = None
    """Of a model that attends block-causally."""

    @torch.no_grad()
    def score(self, context: Sequence[int], target: Sequence[int]) -> float:
        """The estimated bound of log p(target | context), in nats.

        Random masks depend on the tokens and the seed alone, and their number not on the batch.
        """
        ids = torch.tensor([*context, *target])
        generator = torch.Generator().manual_seed(_hash(ids.tolist(), len(context), self.seed))
        return sum(
            self._score_segment(ids, begin, end, generator)
            for begin, end in self._segments(len(context), len(ids))
        )

    @torch.no_grad()
    def is_greedy(self, context: Sequence[int], target: Sequence[int]) -> bool:
        """Whether decoding the most probable position at a time, among all of a segment, gives the
        target. Ends at the first token that differs."""
        ids = torch.tensor([*context, *target], device=self.device)[None]
        for begin, end in self._segments(len(context), ids.shape[1]):
            given = ids[:, :end].clone()
            given[:, begin:] = self.mask_token_id
            for _ in range(end - begin):
                logits = self._logits(given)[0, begin:].float()
                logits[:, self.mask_token_id] = -torch.inf
                probability, token = logits.softmax(dim=-1).max(dim=-1)
                probability[given[0, begin:] != self.mask_token_id] = -1
                best = int(probability.argmax())
                if token[best] != ids[0, begin + best]:
                    return False
                given[0, begin + best] = token[best]
        return True

    def _segments(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """What is masked together: all, or what lies in one block."""
        block = self.block_length or end
        while begin < end:
            stop = min(end, (begin // block + 1) * block)
            yield begin, stop
            begin = stop

    def _score_segment(
        self, ids: Tensor, begin: int, end: int, generator: torch.Generator
    ) -> float:
        """Of the tokens from begin to end, given all before."""
        length = end - begin
        masks, sizes = random_masks(length, self.mc_num if length > 1 else 1, generator)
        total = 0.0
        for some, count in zip(
            masks.split(self.batch_size), sizes.split(self.batch_size), strict=True
        ):
            given = ids[:end].repeat(len(some), 1)
            given[:, begin:][some] = self.mask_token_id
            logits = self._logits(given.to(self.device))[:, begin:].float().cpu()
            loss = cross_entropy(
                logits.transpose(1, 2), ids[begin:end].expand(len(some), -1), reduction="none"
            )
            total += float(((loss * some).sum(dim=1) * length / count).sum())
        return -total / len(masks)

    def _logits(self, ids: Tensor) -> Tensor:
        return self.call(ids).logits


def _hash(ids: Sequence[int], context: int, seed: int) -> int:
    digest = hashlib.sha256(repr((seed, context, ids)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
