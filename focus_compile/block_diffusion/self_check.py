"""The first blocks of every compiled block-diffusion model, held against its own forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from focus_compile.block_diffusion.programs import BlockPrograms, KeyChoice, RowList
from focus_compile.block_diffusion.tracing import ModelCall, TracedModel
from focus_compile.errors import RefusalError
from focus_compile.passes.block_causality import block_causal_mask
from focus_compile.runtime.self_check import row_errors, tolerance

__all__ = ["FirstBlocks"]

MOST_TOKENS = 256
"""Ids that the blocks are drawn from, as far as the vocabulary has so many."""
SHARE = 0.25
"""Of rows that may differ: the scores by which a row's experts are chosen may be nearly equal."""


class FirstBlocks:
    """Two blocks of one sequence, computed by the programs and by the model.

    The programs hold the tables of the longest sequence, the model makes those of two blocks: a
    model whose angles depend on how long the sequence is (dynamic RoPE scaling) shows here.
    """

    def __init__(self, model: nn.Module, call: ModelCall, traced: TracedModel) -> None:
        self._model, self._call = model, call
        self._block = traced.block_length
        outputs: Any = traced.graph.graph.output_node().args[0]
        assert traced.plan.logits is not None
        self._tokens = min(MOST_TOKENS, outputs[traced.plan.logits].meta["val"].shape[-1])

    @torch.no_grad()
    def check(self, programs: BlockPrograms, arguments: Sequence[Any]) -> None:
        """Raise RefusalError where they differ."""
        plan, block = programs.plan, self._block
        length = 2 * block
        device = arguments[plan.ids.position].device
        places = torch.arange(length, device=device)
        ids = (places * 7 + 3) % self._tokens
        owners = torch.zeros(2, dtype=torch.int64, device=device)
        starts = torch.tensor([0, block, length], device=device)
        keys = None
        if programs.key_block is not None:
            candidates = torch.arange(2, device=device) * block // programs.key_block
            keys = KeyChoice(torch.zeros((1, length), device=device), candidates, candidates)
        listed = RowList(
            ids[None], places[None], torch.zeros_like(places), places, owners, starts,
            starts[1:], keys,
        )  # fmt: skip
        caches = programs.allocate(1, length, device)
        outputs = programs.run_whole(arguments, caches, listed, places[None], starts)
        assert plan.logits is not None
        ours = outputs[plan.logits]
        mask = block_causal_mask(length, block, device)
        theirs = self._call(self._model, ids[None], mask, places[None])
        errors = row_errors(ours, theirs)
        share = float((~(errors <= tolerance(theirs, plan))).double().mean())
        if share > SHARE:
            raise RefusalError(
                f"focus_compile: no block-diffusion program: {share:.0%} of the rows of two blocks "
                f"differ from the model's own forward, by {float(errors.median()):.2g} in the "
                "median. Do the model's positions depend on how long the sequence is, as with "
                "dynamic RoPE scaling? Use a scaling of one length; else please report it."
            )
