"""What single calls computed and read, for whoever asked: `with inspecting(sink):`.

A call that nobody inspects does nothing for this but to ask whether somebody does.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.kernels.attention.op import attention_with_lse
from focus_compile.kernels.confidence.op import confidence
from focus_compile.kernels.library import tapped
from focus_compile.kernels.sink_capture.op import capture_sinks
from focus_compile.plan import Plan
from focus_compile.runtime.buckets import pack_rows
from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.record import StepRecord
from focus_compile.runtime.warm_up import asked_for

__all__ = ["CallInspection", "Inspector", "Source", "active_inspector", "inspecting"]

T = TypeVar("T")
TOP_TOKENS = 16
"""Positions of highest attention that are noted a layer, where the plan has no sinks."""


@dataclass(frozen=True, slots=True)
class Source:
    """The graph that a call ran. plan None: there is none, for the reason `why`. memory: bytes of a
    trajectory of the call's sizes, by what they hold."""

    config: FocusConfig
    plan: Plan | None = None
    why: str = ""
    weights: Sequence[Tensor] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    generator: Mapping[str, Any] | None = None
    """Of a step of a `BatchGenerator`: the arguments that make it again."""


@dataclass(frozen=True, slots=True)
class CallInspection:
    """What one call computed and read. All tensors are copies on the CPU.

    ids int64 [batch, length]: as the call had them; inputs: the others; both by their name in the
    caller's code, such as L['kwargs']['attention_mask']. rows, focus, kept bool [batch, length]:
    computed in this call, expected to decode next, and gone through all layers where some were
    evicted. blocks: of each sparse site the kept key blocks, int64 [batch, any], -1 where there are
    fewer; sinks int64 [batch, any]. top: of each site of a refresh the prompt positions that draw
    the most attention of the undecided rows of the current block, int64 [batch, any]. confidence
    fp32, token int64 [masks]: the highest probability in the row of every mask, sequence after
    sequence, and the token that has it. logits: hash of the returned logits of these rows and of
    the rows before each; values: these logits, where asked for. started: host seconds when the call
    began, on a clock that stands still while somebody looks; guard_milliseconds: spent on finding
    out whether it continues its trajectory. held_bytes: of the trajectory, None outside of one.
    """

    ids: Tensor
    ids_name: str
    inputs: Mapping[str, Tensor]
    started: float
    rows: Tensor
    source: Source
    focus: Tensor | None = None
    kept: Tensor | None = None
    blocks: Mapping[int, Tensor] = field(default_factory=dict)
    sinks: Tensor | None = None
    top: Mapping[int, Tensor] = field(default_factory=dict)
    confidence: Tensor | None = None
    token: Tensor | None = None
    logits: str | None = None
    values: Tensor | None = None
    guard_milliseconds: float = 0.0
    held_bytes: int | None = None
    submitted: Sequence[Mapping[str, Any]] | None = None
    """Of a step of a `BatchGenerator`: the requests that were given to it since the step before."""


Sink = Callable[[StepRecord, CallInspection], object]


class Inspector:
    """Collects what the call at hand tells of itself, and hands it on when it is over.

    seconds: of the call at hand, the time that looking took; total: of all calls before it.
    """

    def __init__(self, sink: Sink, keys: bool, attention: bool, values: bool) -> None:
        self._sink, self._keys, self._attention, self._values = sink, keys, attention, values
        self.keeps_values = values
        self.requests: dict[int, set[int]] = {}
        """Numbers of the requests that were told of, by generator."""
        self.total = 0.0
        self.begin(torch.empty((0, 0), dtype=torch.int64))

    def begin(self, ids: Tensor) -> None:
        """A call with these ids [batch, length] starts."""
        self.started = time.perf_counter() - self.total
        self.ids = ids.clone()  # the call may write into them
        self.seconds = self.guard_seconds = 0.0
        self.held_bytes: int | None = None
        self._rows: Tensor | None = None
        self._kept: Tensor | None = None
        self._focus: Tensor | None = None
        self._sinks: Tensor | None = None
        self._blocks: list[Tensor] = []
        self._top: list[Tensor] = []

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Time that is not the call's."""
        begun = time.perf_counter()
        with tapped(None):
            yield
        self.seconds += time.perf_counter() - begun

    def waited(self) -> float:
        """Seconds of the call at hand that looking took, once its device is done."""
        if self.ids.is_cuda:
            torch.cuda.synchronize(self.ids.device)
        return self.seconds

    def computed(self, rows: Tensor, kept: Tensor | None = None) -> None:
        """These rows bool [batch, any], the last of their sequences, were computed."""
        with self.looking():
            self._rows = _union(self._rows, rows)
            if kept is not None:
                self._kept = _union(self._kept, kept)

    def step(
        self,
        graphs: DeviceGraphs,
        key: Hashable,
        work: Callable[[], T],
        active: Tensor,
        focus: Tensor,
    ) -> T:
        """The result of `work`, a step of the active rows; not as a CUDA graph where its keys are
        to be seen."""
        if asked_for() is not None:
            return graphs.run(key, work)
        self.computed(active)
        self._focus = focus.clone()
        self._blocks.clear()
        if not self._keys:
            return graphs.run(key, work)
        with tapped(self._take):
            return work()

    def _take(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "ragged_select_blocks":
            self._blocks.append(result.clone())
        elif name in (
            "sparse_attention",
            "sparse_attention_of_shard",
        ):  # chosen in this step or an earlier one
            self._blocks.append(arguments[3].clone())
            self._sinks = arguments[4].clone()

    @contextlib.contextmanager
    def reading_keys(self) -> Iterator[None]:
        """Work inside chooses the keys of a step."""
        self._blocks.clear()
        with tapped(self._take if self._keys else None):
            yield

    def refresh(
        self, work: Callable[[], T], rows: Tensor, prompt: Tensor, count: int, alone: bool = True
    ) -> T:
        """The result of `work`, a forward of all rows. alone: by this rank; else its queries are of
        other rows than theirs, and attention is not looked at.

        rows bool [batch, length]: those whose attention is looked at; prompt int64 [batch]: the
        positions that it may be drawn to, from the first on; count: how many of them are noted.
        """
        self.computed(torch.ones_like(rows))
        self._blocks.clear()
        self._sinks = self._focus = None
        if not (self._attention and alone):
            return work()
        none = ~rows.any(1)
        rows = rows.clone()
        rows[:, -1] |= none
        packed = pack_rows(rows, rows, int(rows.sum(1).max()))
        self._top.clear()

        def take(name: str, arguments: tuple[Any, ...], _: Any) -> None:
            if name == "attention":
                with self.looking():
                    top = _most_attended(arguments, packed.rows, packed.row_weight, prompt, count)
                    self._top.append(top)

        with tapped(take):
            return work()

    def hand_over(self, entry: StepRecord, seen: CallInspection) -> None:
        """A call that was looked at elsewhere."""
        begun = time.perf_counter()
        self._sink(entry, seen)
        self.total += self.seconds + time.perf_counter() - begun

    def finish(
        self,
        entry: StepRecord,
        source: Source,
        ids_name: str,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[Tensor] | None,
    ) -> None:
        """The call is over. outputs: its logits, or confidence and token of every row."""
        begun = time.perf_counter()
        ids = self.ids
        rows = torch.ones_like(ids, dtype=torch.bool) if self._rows is None else self._rows
        if self._rows is None and entry.rows == 0:
            rows = torch.zeros_like(rows)
        sites = () if source.plan is None else source.plan.sites
        sparse = [site.index for site in sites if site.region == "sparse-suffix"]
        said = _said(ids, source.config.mask_token_id, outputs, self._values)
        seen = CallInspection(
            ids=ids.cpu(),
            ids_name=ids_name,
            inputs={
                name: value.detach().cpu().clone()
                for name, value in inputs.items()
                if name != ids_name
            },
            started=self.started,
            rows=_widened(rows, ids),
            focus=None if self._focus is None else self._focus.cpu(),
            kept=None if self._kept is None else _widened(self._kept, ids),
            blocks=_by_site(sparse, self._blocks),
            sinks=None if self._sinks is None else self._sinks.cpu(),
            top=_by_site([site.index for site in sites], self._top),
            guard_milliseconds=self.guard_seconds * 1e3,
            held_bytes=self.held_bytes,
            source=source,
            **said,
        )
        self._sink(entry, seen)
        self.total += self.seconds + time.perf_counter() - begun


_active: contextvars.ContextVar[Inspector | None] = contextvars.ContextVar(
    "focus_compile_inspector", default=None
)


def active_inspector() -> Inspector | None:
    """Who looks at the calls of this context, if anybody does."""
    return _active.get()


@contextlib.contextmanager
def inspecting(
    sink: Sink, *, keys: bool = True, attention: bool = False, values: bool = False
) -> Iterator[None]:
    """Hand every call of a focus-compiled model in this context to `sink`, after it.

    keys: also note the kept key blocks and the sinks; a GPU then launches the kernels of a step one
    by one. attention: at each refresh also note where the attention of each layer goes, which costs
    about as much as that attention. values: keep the logits themselves.
    """
    token = _active.set(Inspector(sink, keys, attention, values))
    try:
        yield
    finally:
        _active.reset(token)


def _union(mine: Tensor | None, more: Tensor) -> Tensor:
    """Flags [batch, any] of either, aligned at the end."""
    if mine is None:
        return more.clone()
    width = max(mine.shape[1], more.shape[1])
    return _padded(mine, width) | _padded(more, width)


def _padded(flags: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(flags, (width - flags.shape[1], 0))


def _widened(flags: Tensor, ids: Tensor) -> Tensor:
    """Flags of the last positions as flags of all, on the CPU."""
    return _padded(flags, ids.shape[1])[:, -ids.shape[1] :].cpu()


def _by_site(sites: Sequence[int], values: Sequence[Tensor]) -> dict[int, Tensor]:
    """Values of sites in order, on the CPU; the last of each where there were several passes."""
    latest = values[-len(sites) :] if sites else []
    return {site: value.cpu() for site, value in zip(sites, latest, strict=False)}


def _most_attended(
    arguments: tuple[Any, ...], rows: Tensor, weight: Tensor, prompt: Tensor, count: int
) -> Tensor:
    """`capture_sinks` over some rows of an attention op's arguments, whose rows are the last."""
    q, k, v, mask, scale = arguments
    at = (rows - (k.shape[2] - q.shape[2])).clamp(min=0)
    index = at[:, None, :, None]
    queries = q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3]))
    if mask is not None and mask.dim() > 1 and mask.shape[-2] != 1:
        full = mask.expand(q.shape[0], -1, q.shape[2], k.shape[2])
        mask = full.gather(2, index.expand(-1, full.shape[1], -1, full.shape[3]))
    _, lse = attention_with_lse(queries, k, v, mask, scale)
    return capture_sinks(queries, k, lse, weight, mask, prompt, count, scale)


def _said(
    ids: Tensor, mask_token_id: int | None, outputs: Sequence[Tensor] | None, keep: bool
) -> dict[str, Any]:
    """What outputs say of the masks: fields of CallInspection."""
    if outputs is None or mask_token_id is None:
        return {}
    masked = ids.eq(mask_token_id)
    if len(outputs) > 1:
        probability, token = (values[masked] for values in outputs)
        return {"confidence": probability.float().cpu(), "token": token.cpu()}
    (logits,) = outputs
    read = masked | torch.nn.functional.pad(masked[:, 1:], (0, 1))
    rows = logits[read].detach().cpu().contiguous()
    own = rows[masked[read].cpu()]
    probability, token = confidence(own)
    said = {"confidence": probability.float(), "token": token, "logits": hash_of(rows)}
    return said | ({"values": rows} if keep else {})


def hash_of(values: Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and bytes."""
    found = hashlib.sha256(f"{list(values.shape)} {values.dtype}".encode())
    flat = values.detach().cpu().contiguous().flatten()
    found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()
