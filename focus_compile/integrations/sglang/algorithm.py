"""`FocusEvict`: FOCUS (arXiv 2601.23278) as an algorithm of SGLang's dLLM runtime.

SGLang hands an algorithm the model runner and a batch of one block per request, and leaves the loop
to it. A step here forwards a batch of fewer rows: those whose K/V are not final, of which after the
cut only those stay that are likely to decode (see `evicting`). A finished block is computed once
more as a whole, so that the K/V that SGLang keeps, and shares by prefix, are the model's own.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from torch import Tensor

from focus_compile.block_diffusion.state import COMMIT, DECODE, IDLE, BlockState, Listing
from focus_compile.errors import FocusError, OptionError
from focus_compile.integrations.sglang.evicting import EvictingModel
from focus_compile.integrations.sglang.rows import BlockBatch
from focus_compile.kernels.confidence.op import confidence
from focus_compile.kernels.ragged import MOST_ROWS

__all__ = ["FocusEvict"]

SETTINGS = {"threshold": 0.9, "alpha": 1.5, "cut": 1}
"""What `--dllm-algorithm-config` may set, and the defaults; see `BatchGenerator`."""
OF_SGLANG = ("block_size", "mask_token_id")


class FocusEvict(DllmAlgorithm):
    """Settings (a YAML file, `--dllm-algorithm-config`): threshold, from which probability on a
    token is decoded; alpha, rows that stay past the cut per token decoded per step so far, `.inf`
    evicts nothing; cut, the layer after whose keys and values rows leave; block_size and
    mask_token_id, where they are not those of SGLang's table."""

    supported_architectures: ClassVar[tuple[str, ...]] = ("SDARForCausalLM",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        given = config.algorithm_config
        for name in given:
            if name not in (*SETTINGS, *OF_SGLANG):
                raise OptionError.unknown(str(name), (*SETTINGS, *OF_SGLANG), kind="setting")
        found = SETTINGS | given
        self.threshold, self.alpha, self.cut = (found[name] for name in SETTINGS)
        self._check()
        self._model: EvictingModel | None = None
        self.history: deque[tuple[int, int, int]] = deque(maxlen=4096)
        """(rows listed, rows past the cut, tokens decoded) of the latest forwards."""

    def _check(self) -> None:
        if not _is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise OptionError.invalid("threshold", self.threshold, "a probability")
        if not _is_number(self.alpha) or not self.alpha >= 1:
            raise OptionError.invalid("alpha", self.alpha, "a number >= 1")
        if not isinstance(self.cut, int) or isinstance(self.cut, bool) or self.cut < 1:
            raise OptionError.invalid("cut", self.cut, "a whole number >= 1")
        if not 2 <= self.block_size <= MOST_ROWS:
            raise OptionError.invalid("block_size", self.block_size, f"2 to {MOST_ROWS} tokens")

    @classmethod
    def configure_server_args(cls, server_args: Any) -> None:
        """Refuse what a step of varying rows cannot run under.

        Raises:
            FocusError: CUDA graphs, or tensor parallelism.
        """
        if not getattr(server_args, "disable_cuda_graph", False):
            raise FocusError(
                "FocusEvict: how many rows a step computes varies from step to step; pass "
                "--disable-cuda-graph"
            )
        if getattr(server_args, "tp_size", 1) != 1:
            raise FocusError(
                "FocusEvict: the heads of a layer are ranked together; pass --tp-size 1"
            )

    @classmethod
    def validate_request(cls, req: Any) -> str | None:
        """What is wrong with a request, if anything."""
        if req.dllm_config is not None and req.dllm_config.mask_id in req.origin_input_ids:
            return "FocusEvict: the prompt holds the mask token"
        return None

    @torch.no_grad()
    def run(
        self, model_runner: Any, forward_batch: Any, algo_states: list[Any] | None = None
    ) -> Any:
        """Blocks of all requests: decoded, or with first-done-first-out scheduling a step further.

        algo_states: by request, what `_Carried` the last step of its block left, or None.
        """
        tokens = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size)
        carried = algo_states or [None] * tokens.shape[0]
        given = (tokens != self.mask_id).sum(1).tolist()
        if all(count == self.block_size for count in given):  # of prompts, or to be committed
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
            done = [True] * tokens.shape[0]
            decided: list[Any] = []
        else:
            if self._model is None:
                self._model = EvictingModel(model_runner.model, self.cut, self.alpha)
            block = BlockBatch(forward_batch, model_runner, tokens)
            state = self._state(tokens, block.begin, carried)
            with block:
                out, done = self._decode(model_runner, block, state)
            forward_batch.input_ids.copy_(state.tokens.flatten())
            carried = [_Carried.of(state, at) for at in range(tokens.shape[0])]
            decided = [row[first:] for row, first in zip(state.tokens, given, strict=True)]
        if not self.fdfo:
            return out.logits_output, decided, None, None, out.can_run_graph
        return (
            out.logits_output,
            tokens.tolist(),
            [self.block_size * ended for ended in done],
            [None if ended else left for ended, left in zip(done, carried, strict=True)],
            out.can_run_graph,
        )

    def _state(self, tokens: Tensor, begin: Tensor, carried: list[_Carried | None]) -> BlockState:
        state = BlockState.allocate(
            tokens.shape[0], self.block_size, int(begin.max()) + self.block_size, self.mask_id,
            tokens.device,
        )  # fmt: skip
        state.enter(tokens, 0)
        state.begin.copy_(begin)
        for at, known in enumerate(carried):
            if known is not None:
                known.put(state, at)
        return state

    def _decode(
        self, model_runner: Any, block: BlockBatch, state: BlockState
    ) -> tuple[Any, list[bool]]:
        """Forwards until all blocks are decided and their final K/V written, or one of them;
        (what the last one returned, which blocks are done)."""
        done = torch.zeros_like(state.begin, dtype=torch.bool)
        while True:
            phase = torch.where(state.masked().any(1), DECODE, COMMIT)
            state.phase.copy_(torch.where(done, IDLE, phase))
            out = self._forward(model_runner, block, state)
            done |= phase == COMMIT
            if self.fdfo or bool(done.all()):
                return out, done.tolist()

    def _forward(self, model_runner: Any, block: BlockBatch, state: BlockState) -> Any:
        """One forward of all that is not done: steps of undecided blocks, commits of others."""
        assert self._model is not None
        commits, whole = state.phase == COMMIT, state.tokens.clone()
        listed = int((state.uncached & (state.phase == DECODE)[:, None]).sum())
        listed += int(commits.sum()) * self.block_size
        listing = state.listing(listed, everything=False, commit_all=True)
        with self._model.step(block, state, listing) as step:
            out = model_runner.forward(block.of(state, listing), pp_proxy_tensors=None)
        decoded = self._advance(state, step.kept, out.logits_output.full_logits)
        # What entered its next block here does so in SGLang with the next batch.
        state.tokens.copy_(torch.where(commits[:, None], whole, state.tokens))
        self.history.append((listed, step.kept.index.shape[0], decoded))
        return out

    def _advance(self, state: BlockState, kept: Listing, logits: Tensor) -> int:
        """Decode by threshold, and the best of every sequence; returns the number of tokens."""
        undecided = state.masked().sum()
        logits = logits.float()
        if self.mask_id < logits.shape[-1]:
            logits[:, self.mask_id] = -math.inf
        probability, token = confidence(logits)
        commits = state.phase == COMMIT
        state.advance(kept, kept, probability, token, self.threshold)
        left = (state.masked() & ~commits[:, None]).sum()
        return int(undecided - left)


@dataclass(frozen=True)
class _Carried:
    """What is known of a request's block between two of its steps: see `BlockState`."""

    uncached: Tensor
    progress: Tensor
    total: Tensor
    steps: Tensor

    @classmethod
    def of(cls, state: BlockState, at: int) -> _Carried:
        known = state.uncached, state.progress, state.decoded.total, state.decoded.steps
        return cls(*(value[at].clone() for value in known))

    def put(self, state: BlockState, at: int) -> None:
        state.uncached[at] = self.uncached
        state.progress[at] = self.progress
        state.decoded.total[at] = self.total
        state.decoded.steps[at] = self.steps


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
