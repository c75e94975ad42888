"""Dispatch for block-causal models: what stands in for the user's graph in a block-diffusion loop.

The loop calls the model on a prefix that ends with the block being decoded, again and again, and
then on one block more. Rows of finished blocks never change, so a call computes rows of the last
block only: those whose K/V are not final, and of these, past the cut, those that will decode.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.block_diffusion.programs import BlockPrograms
from focus_compile.block_diffusion.state import COMMIT, BlockState, Listing
from focus_compile.capture import Capture
from focus_compile.config import COMBINED, EVICTING_POLICIES, FocusConfig
from focus_compile.fallback import warn_once
from focus_compile.passes.block_causality import mask_inputs, why_not_block_causal
from focus_compile.passes.length_dependence import LengthTables
from focus_compile.pipeline import Pipeline
from focus_compile.plan import Plan
from focus_compile.policies.focus_evict import keep_rows
from focus_compile.runtime.buckets import bucket_for
from focus_compile.runtime.continuity import NEVER_CONTINUED
from focus_compile.runtime.dispatch import (
    CONTINUES,
    EDITED,
    NO_MASKS,
    REPEATED,
    Dispatcher,
    Outcome,
)
from focus_compile.runtime.guard import CallInputs
from focus_compile.runtime.inspection import TOP_TOKENS, active_inspector
from focus_compile.runtime.latest_rows import LatestRows
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.self_check import rows_differ
from focus_compile.runtime.store import Slot
from focus_compile.runtime.trajectory import OwnedTrajectory, SeenWeights, current_stream
from focus_compile.runtime.warm_up import WarmUp, asked_for

__all__ = ["BlockDispatcher"]

SPARE_BLOCKS = 8
"""Blocks that fit in the caches beyond those of the call that made them."""
FAINT = 2.0**-10
"""Factor of the latest logits of an evicted row: nearly uniform, so never the most probable, and
with the token that it last predicted."""
_CHOSE_EVICTED = (
    "the caller decoded a row that was evicted; eviction is off for the rest of the response. "
    "Decode by confidence, or raise evict_alpha"
)


@dataclass(eq=False)
class BlockTrajectory(OwnedTrajectory):
    """State of a run of calls: everything before the last block is final.

    ids, guarded: of the last call. evicted bool [batch, B]: masked positions of the last block that
    the last call did not compute; faint: those of them whose logits were made faint. tables: what
    rows read beside tokens, as of the last length. least, most: tokens decoded per step and
    sequence so far.
    """

    ids: Tensor
    guarded: tuple[Tensor, ...]
    caches: list[Tensor]
    state: BlockState
    outputs: list[LatestRows]
    evicted: Tensor
    faint: Tensor
    tables: list[Any]
    least: int | None = None
    most: int = 0
    evicts: bool = True
    fresh: bool = True
    """Whether no step ran since all rows were computed."""

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of K/V and logits held."""
        held = sum(tensor.untyped_storage().nbytes() for tensor in self.caches)
        return held + sum(output.nbytes for output in self.outputs)

    def observe(self, decoded: int) -> None:
        """A step decoded so many tokens of one sequence."""
        self.least = decoded if self.least is None else min(self.least, decoded)
        self.most = max(self.most, decoded)

    @property
    def fixed_yield(self) -> int:
        """Tokens that a loop with a fixed number per step decodes, 1 where it has none."""
        return self.most if self.least is not None and self.most - self.least <= 1 else 1


@dataclass(frozen=True)
class _Seen:
    """What the host learns of a call.

    masked: anywhere; earlier_masked: before the last block. The rest is about a trajectory's call:
    same_prefix, only_decoded, changed: what was before the block, and how and whether the block
    changed; chose_evicted: a row that was not computed was decoded; decoded, listed: tokens decoded
    since the last call, and rows whose K/V are not final, per sequence.
    """

    masked: bool
    earlier_masked: bool
    same_prefix: bool = False
    only_decoded: bool = False
    changed: bool = False
    chose_evicted: bool = False
    decoded: tuple[int, ...] = ()
    listed: tuple[int, ...] = ()


class BlockDispatcher(Dispatcher):
    """`Dispatcher` for the policies of `BLOCK_POLICIES`.

    A row that was evicted returns its latest logits, made so faint that no sampler takes it for
    sure of anything. The first step of a response evicts nothing: its yield is not known.
    """

    def __init__(
        self,
        captured: Capture,
        pipeline: Pipeline,
        plan: Plan,
        programs: Programs,
        config: FocusConfig,
    ) -> None:
        super().__init__(captured, plan, programs, config)
        self.gm = pipeline.gm
        self.block = config.block_length
        self.blocks = BlockPrograms.build(
            captured, pipeline, plan, config.block_length, config.evict_layer, config.lowering
        )
        at = {node.name: i for i, node in enumerate(self.gm.graph.find_nodes(op="placeholder"))}
        self.key_block = self.blocks.key_block
        self.keep_ratio = config.keep_ratio if config.policy == COMBINED else 1.0
        self.masks = {name: at[name] for name in mask_inputs(self.gm, plan)}
        self.tables = LengthTables(self.gm, plan)

    @property
    def _compile_seconds(self) -> float:
        return self.programs.compile_seconds + self.blocks.compile_seconds

    def _incremental(self, slot: Slot, args: Sequence[Any]) -> Outcome | str:
        call = CallInputs.of(self.plan, args)
        held = slot.trajectory if isinstance(slot.trajectory, BlockTrajectory) else None
        inspector, begun = active_inspector(), time.perf_counter()
        self._require_agreement(call)
        why = self._why_not_comparable(held, call)
        seen = self._see(held if why is None else None, call.ids)
        if why is None and held is not None:
            why = self._why_not_continued(held, call, seen, args)
        if inspector is not None:
            inspector.guard_seconds = time.perf_counter() - begun
        finishing = why is None and held is not None and call.ids.shape[1] == held.length
        if not seen.masked and not finishing:
            return NO_MASKS
        slot.trajectory = None
        reason = self._why_not_blocks(call.ids, seen)
        if reason is not None:
            return self._refuse(reason)
        if why is None and held is not None:
            outcome = self._continue_block(held, call, seen, args)
            slot.trajectory = held
            if seen.changed:
                slot.continuity.continued()
            return outcome
        held = None  # what is replaced must be gone before its successor is made
        reason = self._why_not_begun(slot, call, args)
        if reason is not None:
            return self._refuse(reason)
        held, outputs, entry = self._begin_blocks(call, args, f"new trajectory: {why}")
        if self._refused is not None:
            return self._refused
        prepared = asked_for()
        if prepared is not None:
            prepared.append(self._prepare(held, args))
        else:
            slot.continuity.refreshed()
            slot.trajectory = held
        return outputs, entry

    def _why_not_begun(self, slot: Slot, call: CallInputs, args: Sequence[Any]) -> str | None:
        if asked_for() is None:
            first = slot.continuity.first_ids(call.ids, self._mask_token_id, self.block)
            if first is None:
                return NEVER_CONTINUED
        reason = self._why_cannot_begin(call) or self._why_no_masks(args)
        if reason is None:
            plan = self.programs.memory_plan(args, self._first_row(call.ids))
            reason = plan.why_no_room(call.ids.device)
        return self._anywhere(reason, call.ids.device)

    def _why_not_blocks(self, ids: Tensor, seen: _Seen) -> str | None:
        length = ids.shape[1]
        if length % self.block:
            return f"{length} tokens are no multiple of block_length={self.block}"
        if seen.earlier_masked:
            return (
                f"masks before the last block of {self.block} tokens: call the model on the prefix "
                "that ends with the block being decoded"
            )
        return None

    def _why_not_comparable(self, held: BlockTrajectory | None, call: CallInputs) -> str | None:
        if held is None:
            return "first call"
        if held.owner is not self:
            return "another compiled graph ran this model"
        if held.ids.shape[0] != call.ids.shape[0] or held.ids.device != call.ids.device:
            return "the shape of the ids changed"
        if call.ids.shape[1] not in (held.length, held.length + self.block):
            return "the ids grew by other than one block"
        if held.stream != current_stream(call.ids):
            return "the CUDA stream changed"
        return None if held.weights.are(call.weights) else "the weights changed"

    def _see(self, held: BlockTrajectory | None, ids: Tensor) -> _Seen:
        """Compare the call with the trajectory; the one read of the device before a step."""
        begin = max(0, ids.shape[1] - self.block)
        masked = ids == self._mask_token_id
        flags = [masked.any(), masked[:, :begin].any()]
        if held is None:
            some, earlier = map(bool, torch.stack(flags).tolist())
            return _Seen(some, earlier)
        at = held.length - self.block
        was, now = held.ids[:, at:], ids[:, at : held.length]
        undecided = was == self._mask_token_id
        decoded = undecided & (now != self._mask_token_id)
        flags += [
            (ids[:, :at] == held.ids[:, :at]).all(),
            ((was == now) | undecided).all(),
            (was != now).any() | (ids.shape[1] > held.length),
            (decoded & held.evicted).any(),
        ]
        counts = [decoded.sum(1), held.state.uncached.sum(1)]
        values = torch.cat([torch.stack(flags).long(), *counts]).tolist()
        batch = ids.shape[0]
        some, earlier, prefix, only, changed, chose = map(bool, values[:6])
        return _Seen(
            some, earlier, prefix, only, changed, chose,
            tuple(values[6 : 6 + batch]), tuple(values[6 + batch :]),
        )  # fmt: skip

    def _why_not_continued(
        self, held: BlockTrajectory, call: CallInputs, seen: _Seen, args: Sequence[Any]
    ) -> str | None:
        if not seen.same_prefix:
            return "ids changed before the block being decoded"
        grew = call.ids.shape[1] > held.length
        if grew and self._why_no_masks(args) is not None:
            return "the mask changed"
        positions = self.plan.positions("guarded")
        for mine, given, at in zip(held.guarded, call.guarded, positions, strict=True):
            if at in self.masks.values() and grew:
                continue  # just proven
            if not _extends(mine, given, held.length, call.ids.shape[1]):
                return "another input changed"
        if not grew:
            return None
        was, held.tables = held.tables, self.tables.values(args, call.ids)
        changed = self.tables.why_changed(was, held.tables)
        if changed is not None:
            warn_once(f"focus_compile: {changed}")
        return None if changed is None else str(changed)

    def _why_no_masks(self, args: Sequence[Any]) -> str | None:
        """Why the masks of this call are not block-causal, if they are not."""
        values = {name: args[at] for name, at in self.masks.items()}
        refusal = why_not_block_causal(self.gm, self.plan, values, self.block)
        return None if refusal is None else str(refusal)

    def _begin_blocks(
        self, call: CallInputs, args: Sequence[Any], why: str
    ) -> tuple[BlockTrajectory, tuple[Tensor, ...], dict[str, Any]]:
        """Compute all rows, and keep the K/V of all and the logits of the response's."""
        ids = call.ids
        batch, length = ids.shape
        first = self._first_row(ids)
        fresh = self.programs.allocate(args)
        rows = torch.arange(first, length, device=ids.device).repeat(batch, 1)
        outputs = self._run_all(args, rows, fresh)
        capacity = length + SPARE_BLOCKS * self.block
        caches = self.blocks.allocate(batch, capacity, ids.device)
        self.blocks.copy(fresh, caches, length)
        del fresh
        self.blocks.merge(args)
        with torch.inference_mode(False):
            state = self._state(batch, capacity, ids.device)
            held = BlockTrajectory(
                self, SeenWeights(call.weights), current_stream(ids), ids.clone(),
                tuple(tensor.clone() for tensor in call.guarded), caches, state,
                [LatestRows(values, first) for values in outputs],
                torch.zeros_like(state.uncached), torch.zeros_like(state.uncached),
                self.tables.values(args, ids),
            )  # fmt: skip
        state.enter(ids[:, length - self.block :], length - self.block)
        if not self._checked:
            self._checked = True
            self._check_rows(held, args, outputs)
        state.computed_at(torch.ones_like(state.uncached))
        returned = tuple(
            latest.hand_out() if first else latest.lend(values)
            for latest, values in zip(held.outputs, outputs, strict=True)
        )
        keys = self.calls.keys_read(length, None)
        return held, returned, {"program": "refresh", "why": why, "rows": ids.numel(), "keys": keys}

    def _run_all(
        self, args: Sequence[Any], rows: Tensor, state: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """A forward of all rows: the outputs at `rows`, K/V into the state."""
        inspector = active_inspector()
        if inspector is None:
            return self.programs.refresh(*args, rows, *state)
        ids = args[self.plan.ids.position]
        masked = ids.eq(self._mask_token_id)
        start = ids.shape[1] - self.block
        return inspector.refresh(
            lambda: self.programs.refresh(*args, rows, *state),
            masked & (torch.arange(ids.shape[1], device=ids.device) >= start),
            torch.full((ids.shape[0],), start, device=ids.device),
            self.plan.sink_tokens or TOP_TOKENS,
        )

    def _state(self, batch: int, capacity: int, device: torch.device) -> BlockState:
        """Of a trajectory with room for `capacity` tokens."""
        return BlockState.allocate(
            batch, self.block, capacity, self._mask_token_id, device, padded=True,
            key_block=self.key_block,
        )  # fmt: skip

    def _prepare(self, held: BlockTrajectory, args: Sequence[Any]) -> WarmUp:
        """Run a step of each kind; the trajectory is of no use afterwards."""
        compiled = self._compile_seconds
        for least in (None, 1):
            held.least = least
            held.state.enter(held.ids[:, -self.block :], held.length - self.block)
            self._step_rows(held, args, self.block, held.ids.shape[0] * self.block)
        return WarmUp((self.block,), 0, self._compile_seconds - compiled)

    def _first_row(self, ids: Tensor) -> int:
        """The first row whose outputs are computed."""
        return 0 if self.plan.logits_rows == "all" else ids.shape[1] - self.block

    def _check_rows(
        self, held: BlockTrajectory, args: Sequence[Any], dense: Sequence[Tensor]
    ) -> None:
        """The last block's rows computed alone must be those of the whole forward."""
        listing = held.state.listing(self.block, everything=True, commit_all=True)
        chosen = torch.arange(self.block, device=held.ids.device).repeat(held.ids.shape[0], 1)
        ours = self.blocks.run_whole(args, held.caches, listing.rows, chosen, listing.rows.starts)
        problem = rows_differ(ours, [values[:, -self.block :] for values in dense], self.plan)
        problem = self._anywhere(problem, held.ids.device)
        if problem is not None:
            self._refuse_plan(problem)

    def _listing(
        self, state: BlockState, rows: int, *, everything: bool = False, all_keys: bool = False
    ) -> Listing:
        keep_ratio = 1.0 if all_keys else self.keep_ratio
        return state.listing(rows, everything=everything, commit_all=True, keep_ratio=keep_ratio)

    def _continue_block(
        self, held: BlockTrajectory, call: CallInputs, seen: _Seen, args: Sequence[Any]
    ) -> Outcome:
        """A step of the last block, after the one before it was committed if it is new.

        Where decided tokens of the block changed, or none of it is masked any more, all its rows
        are computed anew, from all keys.
        """
        if held.fresh and not seen.changed:
            again = tuple(latest.hand_out() for latest in held.outputs)
            return again, {"program": "step", "why": REPEATED, "rows": 0}
        held.fresh = False
        if seen.only_decoded:
            self._learn(held, seen)
        state, listed = held.state, seen.listed
        entered = call.ids.shape[1] > held.length
        whole = not entered and not (seen.only_decoded and seen.masked)
        if whole or not seen.only_decoded:
            begin = held.length - self.block
            state.enter(call.ids[:, begin : held.length], begin)
        if entered:
            self._commit(held, call, args)
        elif not whole:
            state.tokens.copy_(call.ids[:, -self.block :])
            state.decoded.add(torch.tensor(seen.decoded, device=state.tokens.device))
        if entered or whole or self.config.policy == "block-diffusion":
            listed = (self.block,) * call.ids.shape[0]
        held.ids = call.ids.clone()
        held.guarded = tuple(tensor.clone() for tensor in call.guarded)
        bucket = min(bucket_for(max(listed), self.config.buckets, self.block, "cpu"), self.block)
        kept, narrow, outputs = self._watched_step(held, args, bucket, sum(listed), whole)
        for latest, values in zip(held.outputs, outputs, strict=True):
            self._keep_latest(held, latest, narrow, values)
        state.computed(narrow)
        entry = {
            "program": "step",
            "why": self._why_step(entered, seen),
            "rows": sum(listed),
            "kept": kept,
            "bucket": bucket,
            "keys": self._keys_of_step(call.ids.shape[1], exact=whole),
        }
        return tuple(latest.hand_out() for latest in held.outputs), entry

    def _watched_step(
        self, held: BlockTrajectory, args: Sequence[Any], bucket: int, listed: int, whole: bool
    ) -> tuple[int, Listing, Sequence[Tensor]]:
        """`_step_rows`, shown to who looks."""
        inspector, state = active_inspector(), held.state
        if inspector is None:
            return self._step_rows(held, args, bucket, listed, exact=whole)
        everything = self.config.policy == "block-diffusion"
        rows = torch.ones_like(state.uncached) if everything else state.uncached.clone()
        with inspector.reading_keys():
            done = self._step_rows(held, args, bucket, listed, exact=whole)
        inspector.computed(rows, kept=state.spread(done[1]))
        return done

    def _learn(self, held: BlockTrajectory, seen: _Seen) -> None:
        """How many tokens a call decodes, and whether the caller decodes what was evicted."""
        for decoded in seen.decoded:
            if decoded:
                held.observe(decoded)
        if seen.chose_evicted and held.evicts:
            held.evicts = False
            warn_once(f"focus_compile: {_CHOSE_EVICTED}")

    def _why_step(self, entered: bool, seen: _Seen) -> str:
        if entered:
            return "the next block"
        if not seen.only_decoded:
            return EDITED
        return CONTINUES if seen.masked else "the block is finished"

    def _step_rows(
        self,
        held: BlockTrajectory,
        args: Sequence[Any],
        bucket: int,
        listed: int,
        *,
        exact: bool = False,
    ) -> tuple[int, Listing, Sequence[Tensor]]:
        """(rows past the cut, their listing, outputs at them); notes what was evicted.

        exact: nothing is, and all keys are read.
        """
        state, batch = held.state, held.ids.shape[0]
        everything = self.config.policy == "block-diffusion"
        listing = self._listing(state, bucket, everything=everything, all_keys=exact)
        evicts = self.config.policy in EVICTING_POLICIES and held.evicts and held.least is not None
        if exact or not evicts or math.isinf(self.config.evict_alpha):
            chosen = torch.arange(bucket, device=held.ids.device).repeat(batch, 1)
            held.evicted.fill_(False)
            starts = listing.rows.starts
            outputs = self.blocks.run_whole(args, held.caches, listing.rows, chosen, starts)
            return listed, listing, outputs
        at_cut, before, frontier = self.blocks.run_prefix(
            args, held.caches, listing.rows, listing.masked
        )
        alpha = self.config.evict_alpha
        # A loop that decodes a fixed number per step must find as many rows computed.
        wanted = state.decoded.mean().clamp(min=held.fixed_yield / alpha)
        keep = keep_rows(
            at_cut, before, listing.masked, listing.index % self.block, listing.rows.starts,
            wanted, state.progress, alpha, self.block,
        )  # fmt: skip
        counts = (keep & listing.real).view(batch, -1).sum(1).tolist()
        kept = min(bucket_for(max(counts), self.config.buckets, bucket, "cpu"), bucket)
        narrow, chosen = state.narrowed(listing, keep, kept)
        handed = self.blocks.run_leave(listing.rows, chosen, frontier)
        everyone = torch.arange(kept, device=held.ids.device).repeat(batch, 1)
        outputs = self.blocks.run_suffix(
            args, held.caches, narrow.rows, everyone, narrow.rows.starts, handed
        )
        held.evicted.copy_(state.spread(listing) & ~state.spread(narrow))
        return sum(counts), narrow, outputs

    def _keys_of_step(self, length: int, *, exact: bool) -> dict[str, int]:
        """Keys that each layer of a region reads at most, in a step."""
        keys = self.calls.keys_read(length, None)
        if self.key_block is not None and not exact:
            candidates = (length - self.block) // self.key_block
            kept = max(math.ceil(candidates * self.keep_ratio), self.plan.sink_blocks)
            left_out = max(candidates - kept, 0) * self.key_block
            keys["sparse-suffix"] -= left_out
        return keys

    def _keep_latest(
        self, held: BlockTrajectory, latest: LatestRows, narrow: Listing, values: Tensor
    ) -> None:
        """Write the outputs of computed rows, and make those of evicted ones faint."""
        batch, begin = held.ids.shape[0], held.length - self.block
        assert self.plan.logits is not None
        if latest is held.outputs[self.plan.logits]:
            fade = held.evicted & ~held.faint
            rows = latest.master[:, begin - latest.first :]
            rows.mul_(torch.where(fade, FAINT, 1.0).to(rows.dtype)[..., None])
            held.faint.copy_(held.evicted)
        positions = begin + (narrow.index % self.block).view(batch, -1)
        latest.write(positions, values)
        block = torch.arange(begin, begin + self.block, device=positions.device)
        latest.missed(block.repeat(batch, 1))

    def _commit(self, held: BlockTrajectory, call: CallInputs, args: Sequence[Any]) -> None:
        """The finished block's rows once more, exactly; then enter the next block."""
        state, block = held.state, self.block
        batch = call.ids.shape[0]
        state.tokens.copy_(call.ids[:, held.length - block : held.length])
        state.phase.fill_(COMMIT)
        listing = self._listing(state, block)
        chosen = torch.arange(block, device=call.ids.device).repeat(batch, 1)
        outputs = self.blocks.run_whole(
            args, held.caches, listing.rows, chosen, listing.rows.starts
        )
        inspector = active_inspector()
        if inspector is not None:  # the last block's rows, in a call of one block more
            finished = torch.ones_like(state.uncached)
            inspector.computed(torch.nn.functional.pad(finished, (0, block)))
        done = (held.length - block, held.length)
        self.blocks.summarise(held.caches, [(slot, *done) for slot in range(batch)])
        end, room = held.length + block, state.max_length
        if end > room:
            held.caches = self._grown(held, room + max(room // 2 // block, SPARE_BLOCKS) * block)
            state = held.state
        state.enter(call.ids[:, -block:], held.length)
        held.evicted.fill_(False)
        held.faint.fill_(False)
        for at, (latest, values) in enumerate(zip(held.outputs, outputs, strict=True)):
            latest.write(listing.rows.rows, values)
            new = values.new_zeros((batch, block, *values.shape[2:]))
            held.outputs[at] = LatestRows(torch.cat([latest.master, new], 1), latest.first)

    def _grown(self, held: BlockTrajectory, capacity: int) -> list[Tensor]:
        """Caches of more room, with what the old ones hold."""
        batch, device = held.ids.shape[0], held.ids.device
        caches = self.blocks.allocate(batch, capacity, device)
        self.blocks.copy(held.caches, caches, held.length)
        held.state = self._state(batch, capacity, device)
        return caches


def _extends(mine: Tensor, given: Tensor, length: int, now: int) -> bool:
    """Whether `given` is `mine`, or `mine` with more tokens at the end of its last axis."""
    if mine.shape == given.shape:
        return bool(torch.equal(mine, given))
    longer = (*mine.shape[:-1], now)
    if mine.shape[-1:] != (length,) or tuple(given.shape) != longer:
        return False
    return bool(torch.equal(mine, given[..., :length]))
