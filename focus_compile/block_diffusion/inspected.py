"""What a step of a `BatchGenerator` computed, for whoever inspects calls.

A step is told of as a call on [slots, max_length]: ids are those of each slot's sequence, masks
where its response is undecided, zeros behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from focus_compile.block_diffusion.state import BlockState, Listing
from focus_compile.errors import RecordError
from focus_compile.runtime.inspection import CallInspection, Inspector, Source, hash_of
from focus_compile.runtime.record import StepRecord

if TYPE_CHECKING:
    from focus_compile.block_diffusion.batch_generator import BatchGenerator, BlockStep

__all__ = ["StepInspection", "settings_of"]

IDS = "ids"
"""What the slots' ids are called in a record."""


def settings_of(generator: BatchGenerator) -> dict[str, Any]:
    """The arguments that make such a generator again, as JSON types.

    Raises:
        RecordError: `rank` or `call` are functions of the caller's, which no file can hold.
    """
    from focus_compile.block_diffusion.tracing import call_with_block_mask

    if generator.rank is not torch.sub or generator.call is not call_with_block_mask:
        raise RecordError(
            "recording: a BatchGenerator with a rank= or call= of its own cannot be made again "
            "from a file; record it without"
        )
    counts = generator.decode_counts
    config = generator.config
    return {
        "policy": generator.policy,
        "block_length": generator.block_length,
        "max_length": generator.max_length,
        "max_batch": generator.max_batch,
        "mask_token_id": generator.state.mask_token_id,
        "threshold": generator.threshold,
        "alpha": None if math.isinf(generator.alpha) else generator.alpha,
        "commit": generator.commit,
        "eos_token_id": sorted(generator.eos),
        "cut": generator.model.cut,
        "evict_if_faster": generator.costs is not None,
        "merge_projections": config.merge_projections,
        "lowering": config.lowering,
        "cuda_graphs": config.cuda_graphs,
        "key_options": generator.key_options,
        "decode_counts": None if counts is None else counts.tolist(),
    }


@dataclass
class StepInspection:
    """One step that somebody looks at. ids int64 [slots, max_length], before the step; begins:
    where the slots' blocks are."""

    inspector: Inspector
    ids: Tensor
    begins: Sequence[int]
    submitted: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    _fields: dict[str, Any] = field(default_factory=dict)
    _listed: Tensor | None = None

    @classmethod
    def begin(cls, inspector: Inspector, generator: BatchGenerator) -> StepInspection:
        """Before a step, when what waited was admitted.

        Raises:
            RecordError: see `settings_of`.
        """
        settings = settings_of(generator)
        slots = generator.sequences()
        ids = torch.zeros((generator.max_batch, generator.max_length), dtype=torch.int64)
        for row, (_, tokens) in zip(ids, slots, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        inspector.begin(ids)
        known = inspector.requests.setdefault(id(generator), set())
        new = [each for each in generator.requests() if each["request"] not in known]
        known.update(each["request"] for each in new)
        return cls(inspector, ids, [begin for begin, _ in slots], new, settings)

    def listed(self, state: BlockState, listing: Listing) -> None:
        """These rows were computed up to the cut."""
        with self.inspector.looking():
            self._listed = state.spread(listing)

    def computed(
        self,
        state: BlockState,
        computed: Listing,
        scored: Listing,
        logits: Tensor,
        probability: Tensor,
        token: Tensor,
    ) -> None:
        """These rows went through all layers, and those that were scored have logits [rows, V]."""
        with self.inspector.looking():
            self._note(state.spread(computed), scored.masked, logits, probability, token)

    def _note(
        self, kept: Tensor, masked: Tensor, logits: Tensor, probability: Tensor, token: Tensor
    ) -> None:
        rows = self._listed
        self._fields["rows"] = self._placed(kept if rows is None else rows)
        if rows is not None:
            self._fields["kept"] = self._placed(kept)
        values = logits[masked].detach().cpu()
        self._fields |= {
            "confidence": probability[masked].float().cpu(),
            "token": token[masked].cpu(),
            "logits": hash_of(values),
            "values": values if self.inspector.keeps_values else None,
        }

    def _placed(self, flags: Tensor) -> Tensor:
        """Flags of blocks [slots, B] in their sequences [slots, max_length]."""
        placed = torch.zeros(self.ids.shape, dtype=torch.bool)
        for row, begin, block in zip(placed, self.begins, flags.cpu(), strict=True):
            row[begin : begin + block.shape[0]] = block
        return placed

    def finish(self, generator: BatchGenerator, step: BlockStep, padded: int) -> None:
        """The step is over."""
        why = "rows may leave" if step.evicting else "no rows leave"
        entry = StepRecord(
            program="step",
            why=why,
            rows=step.listed,
            bucket=padded,
            kept=step.kept,
            milliseconds=step.milliseconds - 1e3 * self.inspector.waited(),
            compile_seconds=step.compile_seconds,
        )
        plan = generator.programs.plan
        source = Source(
            config=generator.config,
            plan=plan,
            weights=[generator.model.arguments[at] for at in plan.positions("weight")],
            memory={"kv": sum(cache.nbytes for cache in generator.caches)},
            generator=self.settings,
        )
        seen = CallInspection(
            ids=self.ids,
            ids_name=IDS,
            inputs={},
            started=self.inspector.started,
            source=source,
            submitted=tuple(self.submitted),
            **self._fields,
        )
        self.inspector.hand_over(entry, seen)
