"""Dispatch of a forward that reads a cache: exact where the cache is new, then steps over it.

A step reads the keys and values of the cache where they lie, so none is ever out of date. What it
keeps of them are the summaries by which blocks are chosen, and every call compares what those were
made of: the cache's tensors and their versions, how much of them is filled, and the last key of
each block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import list_mode_options

from focus_compile.capture import Capture
from focus_compile.config import FocusConfig
from focus_compile.encoder_cache.plan import EncoderCachePlan
from focus_compile.encoder_cache.step import CACHE_STEP_INPUTS
from focus_compile.errors import CompileError
from focus_compile.fallback import refuse
from focus_compile.kernels.block_summaries.op import block_summaries
from focus_compile.lowering.program import InputSpec, Program
from focus_compile.passes.graph_tools import shape_of
from focus_compile.runtime.exact import tokens_of
from focus_compile.runtime.programs import model_inputs
from focus_compile.runtime.record import StepRecord, is_watched, note
from focus_compile.runtime.self_check import TOLERANCE, row_errors
from focus_compile.runtime.store import STORE, Slot
from focus_compile.runtime.trajectory import OwnedTrajectory, SeenWeights, current_stream

__all__ = ["CacheDispatcher", "SummarisedCache"]

log = logging.getLogger(__name__)

_INFERENCE_CACHE = (
    "the cache was made in torch.inference_mode(), which hides changes of it. Generate under "
    "torch.no_grad()."
)
_OTHER_LENGTHS = "caches of layers differ in length, or are shorter than a key block"
_NO_ROOM = "a step over the cache ran out of memory. Decode fewer or shorter sequences at once."


@dataclass(eq=False, kw_only=True)
class SummarisedCache(OwnedTrajectory):
    """What is kept of a cache; `weights` are its keys in the layers that read the whole of it.

    made: the options that decide all this. summaries: of each sparse layer, as `block_summaries`
    has them. last: the last key of each of their blocks [batch, kv_heads, blocks, d]. filled int64
    [1]: filled places of a sequence. candidates, keep int64 [batch]: filled blocks, and those that
    a sparse layer reads. calls: steps since.
    """

    made: tuple[Any, ...]
    summaries: list[Tensor]
    last: list[Tensor]
    filled: Tensor
    candidates: Tensor
    keep: Tensor
    calls: int = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.summaries, *self.last))


class CacheDispatcher:
    """Called by Dynamo with the graph's flat inputs; returns its flat outputs."""

    def __init__(
        self,
        captured: Capture,
        step: fx.GraphModule,
        check: fx.GraphModule,
        plan: EncoderCachePlan,
        config: FocusConfig,
        inductor_mode: str = "default",
    ) -> None:
        self.plan, self.config = plan, config
        self._check = check
        own = model_inputs(captured)
        how = (config.lowering, list_mode_options(inductor_mode))
        self.exact = Program("exact", captured.original, own, *how)
        more = [
            InputSpec(node.name, tuple(shape_of(node)))
            for node in step.graph.find_nodes(op="placeholder")[len(own) :]
        ]
        assert [spec.name for spec in more[:2]] == list(CACHE_STEP_INPUTS)
        labels = [f"layer {index} {layer.region}" for index, layer in enumerate(plan.layers)]
        self.step = Program("step", step, [*own, *more], *how, labels=labels)
        self._sparse = plan.of_region("sparse-suffix")
        regions = tuple(layer.region for layer in plan.layers)
        self._made = (plan.key_block, plan.block_summary, config.keep_ratio, regions)
        self._moving = {
            at
            for at, (info, value) in enumerate(zip(captured.inputs, captured.values, strict=True))
            if isinstance(value, Tensor) and not info.is_weight
        }
        """Inputs whose strides may change from call to call."""
        self._checked = False
        self._refused: str | None = None

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        started, compiled = time.perf_counter(), self._compile_seconds
        args = tuple(
            value.contiguous() if at in self._moving else value for at, value in enumerate(args)
        )
        with torch.no_grad():
            outputs, program, why, held = self._run(args)
        if is_watched():
            ids = tokens_of(args)
            rows = 0 if ids is None else ids.numel()
            note(
                StepRecord(
                    program, why, rows, keys=self._keys(args, held),
                    milliseconds=(time.perf_counter() - started) * 1e3,
                    compile_seconds=self._compile_seconds - compiled,
                )
            )  # fmt: skip
        return outputs

    @property
    def _compile_seconds(self) -> float:
        return self.exact.compile_seconds + self.step.compile_seconds

    def _run(self, args: Sequence[Any]) -> tuple[tuple[Any, ...], str, str, SummarisedCache | None]:
        """Outputs, the program that made them and why, and the state of a step."""
        slot = STORE.slot(args[self.plan.weight])
        why, lasting = self._refused, False
        if why is None and not slot.lock.acquire(blocking=False):
            why = refuse(
                "another thread is using the model's trajectory", strict=self.config.strict
            )
        elif why is None:
            try:
                return self._with(slot, args)
            except (CompileError, torch.OutOfMemoryError) as error:
                lasting = isinstance(error, CompileError)
                why = str(error) if lasting else _NO_ROOM
            finally:
                slot.lock.release()
            slot.trajectory = None
            why = refuse(why, strict=self.config.strict)
            self._refused = why if lasting else None
        return self.exact(*args), "exact", why or "", None

    def _with(
        self, slot: Slot, args: Sequence[Any]
    ) -> tuple[tuple[Any, ...], str, str, SummarisedCache | None]:
        held = slot.trajectory if isinstance(slot.trajectory, SummarisedCache) else None
        keys = [args[layer.key] for layer in self.plan.layers]
        if any(key.is_inference() for key in keys):
            reason = refuse(_INFERENCE_CACHE, strict=self.config.strict)
            return self.exact(*args), "exact", reason, None
        if not self._fits(args):
            return self.exact(*args), "exact", _OTHER_LENGTHS, None
        why = self._why_new(held, keys, args)
        slot.trajectory = None  # so that nothing torn survives
        if why is None and held is not None:
            problem = None if self._checked else self._why_wrong(args, held)
            if problem is not None:
                self._refused = refuse(problem, strict=self.config.strict)
                return self.exact(*args), "exact", self._refused, None
            self._checked = True
            outputs = self.step(*args, held.candidates, held.keep, *held.summaries)
            held.calls += 1
            slot.trajectory = held
            return outputs, "step", "the cache is as it was", held
        outputs = self.exact(*args)
        slot.trajectory = self._summarise(keys, args)
        return outputs, "refresh", str(why), None

    def _fits(self, args: Sequence[Any]) -> bool:
        """Whether caches that were as long as each other when traced still are, and hold blocks."""
        pairs = [(args[layer.key].shape, args[layer.value].shape) for layer in self.plan.layers]
        held = pairs[0][0][2]
        alike = all(key == value and key[2] == held for key, value in pairs)
        return alike and held >= self.plan.key_block

    def _why_new(
        self, held: SummarisedCache | None, keys: Sequence[Tensor], args: Sequence[Any]
    ) -> str | None:
        """Why the cache must be summarised anew, by an exact call; None where it is as it was."""
        if held is None:
            return "first call"
        if held.made != self._made:
            return "another compiled graph reads the cache otherwise"
        every = {"every-step": 1}.get(str(self.config.refresh), self.config.refresh)
        if isinstance(every, int) and held.calls + 1 >= every:
            return f"refresh={self.config.refresh!r}"
        if held.stream != current_stream(keys[0]):
            return "the CUDA stream changed"
        if not held.weights.are(keys) or held.candidates.device != keys[0].device:
            return "another cache, or it was written"
        pairs = [(held.filled, self._filled(args)), *zip(held.last, self._last(args), strict=True)]
        if not all(_alike(mine, now) for mine, now in pairs):
            return "the shape of the cache changed"
        same = torch.stack([(mine == now).all() for mine, now in pairs]).all()
        return None if bool(same) else "the cache holds something else"

    def _summarise(self, keys: Sequence[Tensor], args: Sequence[Any]) -> SummarisedCache:
        block, kind = self.plan.key_block, self.plan.block_summary
        filled, batch = self._filled(args), keys[0].shape[0]
        candidates = (filled // block).expand(batch).contiguous()
        keep = (candidates.double() * self.config.keep_ratio).ceil().long()
        return SummarisedCache(
            owner=self,
            weights=SeenWeights(keys),
            stream=current_stream(keys[0]),
            made=self._made,
            summaries=[block_summaries(args[s.key], block, kind) for s in self._sparse],
            last=[last.clone() for last in self._last(args)],
            filled=filled.clone(),
            candidates=candidates,
            keep=torch.minimum(keep, candidates),
        )

    def _last(self, args: Sequence[Any]) -> list[Tensor]:
        """The last key of each block, in the sparse layers."""
        block = self.plan.key_block
        return [args[layer.key][:, :, block - 1 :: block] for layer in self._sparse]

    def _filled(self, args: Sequence[Any]) -> Tensor:
        """How many places of the cache are filled, int64 [1]."""
        layer = self._sparse[0]
        cache = args[layer.key]
        if layer.length is None:
            return torch.full((1,), cache.shape[2], device=cache.device)
        return args[layer.length].reshape(1).long().clamp(max=cache.shape[2])

    def _why_wrong(self, args: Sequence[Any], held: SummarisedCache) -> str | None:
        """None if the step program with all keys agrees with the user's own graph.

        Its attention op by op, layer by layer, on what the model has there. Then, if they are
        compiled, all of it, up to twice what compiling the user's graph changes: where rounding
        decides which experts a token meets, that may be anything.
        """
        inputs = (*args, held.candidates, held.candidates, *held.summaries)
        found = self._check.forward(*inputs)
        layers, dense = self.plan.layers, found[2 * len(self.plan.layers) :]
        for layer, theirs, ours in zip(layers, found[::2], found[1::2], strict=False):
            error = float(row_errors(ours, theirs).max())
            if not error <= self._tolerance(theirs):
                return f"{layer.where}: attention over the cache differs by {error:.2g}"
        if self.config.lowering == "eager":
            return None
        exact, step = self.exact(*args), self.step(*inputs)
        for theirs, ours, plain in zip(exact, step, dense, strict=True):
            if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
                continue
            errors, noise = row_errors(ours, theirs), row_errors(theirs, plain)
            within = float(errors.max()) <= self._tolerance(theirs)
            if not within and not float(errors.median()) <= 2 * float(noise.median()):
                return f"the step program with all keys differs by {float(errors.max()):.2g}"
        return None

    def _tolerance(self, theirs: Tensor) -> float:
        used = [getattr(torch, layer.dtype) for layer in self.plan.layers]
        return max(TOLERANCE.get(dtype, 1e-3) for dtype in (theirs.dtype, *used))

    def _keys(self, args: Sequence[Any], held: SummarisedCache | None) -> dict[str, int]:
        """Keys of the cache that each layer of a region reads of sequence 0."""
        filled = int(self._filled(args))
        found = dict.fromkeys((layer.region for layer in self.plan.layers), filled)
        if held is not None:
            block = self.plan.key_block
            left_out = int(held.candidates[0] - held.keep[0]) * block
            found["sparse-suffix"] = min(filled, filled - left_out + self.plan.sink_tokens)
        return found


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
