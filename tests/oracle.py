"""The policies written slowly and obviously, as the judge of the compiled programs.

Nothing here knows how the compiler works. The oracle always runs the model's own forward over the
whole sequence; a step differs from it in the attention calls alone. There, keys and values of rows
that are not active are replaced by the ones stored earlier, keys outside the allowed set are struck
out, and the softmax is spelt out. Rows that are not active thereby carry garbage through the
network, which nobody reads: their K/V come from the store and their logits from the latest call
that computed them.

    oracle = Oracle(model, mask_token_id=3, keep_ratio=0.25)
    result = oracle.call(ids)
    result.logits, result.program, result.active, result.keys[layer][sequence]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.interception import dense, run, softmax, wide

__all__ = ["Oracle", "Result"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `FocusConfig`, with its defaults and meaning; the last six change nothing;
    "response" of `logits` is what the caller gets to see."""

    mask_token_id: int | None = None
    policy: str = "focus-dllm"
    block_length: int = 32
    dense_layers: int | None = None
    dense_tail_layers: int = 0
    expansion: int = 4
    window: int = 8
    keep_ratio: float = 0.5
    sink_tokens: int = 16
    key_block: int = 32
    block_summary: str = "bound"
    refresh: str | int = "block"
    list_reuse: int = 1
    buckets: tuple[int, ...] | None = None
    strict: bool = False
    dryrun: bool = False
    lowering: str = "inductor"
    cuda_graphs: bool = True
    merge_projections: bool | None = None
    logits: str = "all"


@dataclass
class Result:
    """What one call computed. B sequences of T tokens, V vocabulary entries, L attention sites."""

    logits: Tensor
    """[B, T, V]: new for active rows, the latest computed ones for all others."""
    program: str
    """ "exact", "refresh" or "step"."""
    active: Tensor
    """bool [B, T]: rows computed in this call (all, unless it is a step)."""
    focus: Tensor
    """bool [B, T]: rows that score positions predicted to decode (none, unless it is a step)."""
    sinks: list[set[int]]
    """Per sequence, the sink positions that this step's sparse sites read."""
    keys: list[list[list[int]]]
    """keys[site][sequence]: ascending key positions that the site reads."""
    confidence: Tensor
    """float32 [B, T]: largest softmax probability of each row's latest logits, after the call."""
    margin: float
    """Smallest gap between a kept and a dropped score in this call's choices (focus rows, sinks,
    blocks), relative to the larger of the two; infinite if nothing was dropped. Choices are only
    comparable across implementations where this exceeds their rounding."""


@dataclass
class State:
    """What a trajectory remembers between calls."""

    ids: Tensor
    inputs: dict[str, Any]
    response_start: list[int]
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    refreshed_blocks: list[int | None] = field(default_factory=list)
    calls_since_refresh: int = 0
    scored: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Of the positions decided so far: decided as their own row's latest logits had it, as those of
    the row before had it, and all."""
    tie: float = math.inf
    """How close another token came to being the best of a row that this call's count looks at."""
    fresh: bool = True
    """No step yet since the refresh."""
    first_masks: list[int] = field(default_factory=list)
    other: Tensor | None = None
    """Ids of the last call of the trajectory that this one replaced."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    summaries: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Key blocks that sparse sites read, by site and sequence, chosen by an earlier step."""
    sinks: list[set[int]] = field(default_factory=list)
    steps_on_lists: int = 0


@dataclass
class Step:
    """What the attention sites of one step need, and what they write down for the result."""

    active: Tensor
    focus: Tensor
    candidates: list[int]
    sinks: list[set[int]]
    keys: list[list[list[int]]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class Oracle:
    """A policy around one model, called like the model.

    Args:
        model: any module returning logits [B, T, V] (a tensor, a tuple's first, or `.logits`).
        settings: fields of `Settings`; without `mask_token_id` every call is exact.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.model = model
        self.settings = Settings(**settings)
        self.state: State | None = None
        self.unread = 0
        """Refreshes in a row that no call went on from."""
        self.last: Tensor | None = None
        """Ids of the last call that ended a trajectory, or ran exactly since calls never continue
        one another."""
        self.earlier: Tensor | None = None
        """The same, one before."""
        self.broken = False
        """Whether something that the ids do not show has ended the trajectory."""

    def rows_returned(self, program: str) -> int:
        """The first row whose logits the caller gets; earlier ones are zero."""
        if program == "exact" or self.settings.logits == "all" or self.state is None:
            return 0
        return max(0, min(self.state.first_masks) - self.settings.window)

    @torch.no_grad()
    def call(self, ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Result:
        """One model call: ids int64 [B, T]; other inputs go to the model as they are."""
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if self.settings.policy == "exact" or not self._masked(ids).any():
            return self._exact(ids, inputs)
        state = self.state
        if state is not None and (self.broken or not self._continues(state, ids, inputs)):
            self._leave(state.ids)
            state = None
        if state is not None:
            self._count_scores(state, ids)
        if state is None or self._edited(state, ids).any():
            return self._start_over(state, ids, inputs)
        changed = bool((ids != state.ids).any())
        if changed:
            self.unread, state.other = 0, None
        if self._refresh_is_due(state, ids):
            return self._refresh(state, ids, inputs)
        if not changed and state.fresh:
            return self._repeat(state)
        return self._step(state, ids, inputs)

    def _start_over(self, state: State | None, ids: Tensor, inputs: dict[str, Any]) -> Result:
        """All rows anew, in the blocks of `state` if it goes on; exactly, after four such calls
        that nothing continued, until a call only decodes masks of the one before it."""
        first, other = ids, self.last if self.state is not None and state is None else None
        self.broken = False
        if self.unread >= 4:
            counts = [self._decoded(before, ids) for before in (self.last, self.earlier)]
            begun = counts[0] > 0 and not 0 <= counts[1] < counts[0]
            before = self.last
            self._leave(ids)
            if before is None or not begun:
                self.state = None
                return self._exact(ids, inputs)
            first = before
        if state is None:
            masks = [_first(row) for row in self._masked(first)]
            start = self._response_start(first)
            state = State(ids.clone(), _copy(inputs), start, first_masks=masks, other=other)
        result = self._refresh(state, ids, inputs)
        self.state = state
        self.unread += 1
        return result

    def _leave(self, ids: Tensor) -> None:
        self.last, self.earlier = ids.clone(), self.last

    def _decoded(self, before: Tensor | None, ids: Tensor) -> int:
        """Masks of `before` that became tokens; -1 where something else changed as well."""
        if before is None or before.shape != ids.shape:
            return -1
        changed = ids != before
        return -1 if (changed & ~self._masked(before)).any() else int(changed.sum())

    def _repeat(self, state: State) -> Result:
        """The same call again, right after a refresh: the same logits, and nothing computed."""
        state.calls_since_refresh += 1
        result = self._complete("step", state.ids, state.logits.clone(), sites=0)
        result.active.zero_()
        return result

    def _count_scores(self, state: State, ids: Tensor) -> None:
        """Which row's logits foretold what the loop decided."""
        state.tie = math.inf
        decoded = (ids != state.ids) & self._masked(state.ids)
        for b, p in decoded.nonzero().tolist():
            token = int(ids[b, p])
            for at, row in enumerate((p, max(p - 1, 0))):
                top = state.logits[b, row].topk(2)
                state.scored[at] += int(top.indices[0] == token)
                if token in top.indices:
                    apart = float(top.values[0] - top.values[1])
                    state.tie = min(state.tie, apart / float(top.values.abs().max()))
            state.scored[2] += 1

    def _masked(self, ids: Tensor) -> Tensor:
        mask = self.settings.mask_token_id
        return torch.zeros_like(ids, dtype=torch.bool) if mask is None else torch.eq(ids, mask)

    def _response_start(self, ids: Tensor) -> list[int]:
        """First masks; but of a sequence that equals the one half a batch away, save that more of
        it is masked (classifier-free guidance), that one's."""
        masked, batch = self._masked(ids), len(ids)
        starts = [_first(row) for row in masked]
        guided = list(starts)
        for b in range(batch if batch % 2 == 0 else 0):
            other = (b + batch // 2) % batch
            if (masked[b] | (ids[b] == ids[other])).all() and starts[other] > starts[b]:
                guided[b] = starts[other]
        return guided

    def _continues(self, state: State, ids: Tensor, inputs: dict[str, Any]) -> bool:
        """Nothing changed before the responses, and at most half of what was decided in them."""
        if ids.shape != state.ids.shape or not _same(inputs, state.inputs):
            return False
        if 0 <= self._decoded(state.other, ids) < int((ids != state.ids).sum()):
            return False
        decided = 0
        for b, start in enumerate(state.response_start):
            if (ids[b, :start] != state.ids[b, :start]).any():
                return False
            decided += int((~self._masked(state.ids[b, start:])).sum())
        return 2 * int(self._edited(state, ids).sum()) <= decided

    def _edited(self, state: State, ids: Tensor) -> Tensor:
        """Positions whose decided token changed, or was masked again, bool [B, T]."""
        return (ids != state.ids) & ~self._masked(state.ids)

    def _current_block(self, state: State, ids: Tensor) -> list[int | None]:
        """Per sequence, the number of the block of its first masked position; None: finished."""
        length = self.settings.block_length
        pairs = zip(self._masked(ids), state.response_start, strict=True)
        masked = [(_positions(row[start:]), start) for row, start in pairs]
        return [at[0] // length if at else None for at, start in masked]

    def _refresh_is_due(self, state: State, ids: Tensor) -> bool:
        if self.settings.refresh == "every-step":
            return True
        if isinstance(self.settings.refresh, int):
            return state.calls_since_refresh + 1 >= self.settings.refresh
        now, then = self._current_block(state, ids), state.refreshed_blocks
        return any(a not in (None, b) for a, b in zip(now, then, strict=True))

    def _exact(self, ids: Tensor, inputs: dict[str, Any]) -> Result:
        count = 0

        def counting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
            nonlocal count
            count += 1
            return dense(q, k, v, mask, scale)

        logits = run(self.model, ids, inputs, counting)
        return self._complete("exact", ids, logits, sites=count)

    def _refresh(self, state: State, ids: Tensor, inputs: dict[str, Any]) -> Result:
        state.keys.clear()

        def store(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
            site = len(state.keys)
            if k.shape[2] != ids.shape[1]:
                raise ValueError(f"site {site} has {k.shape[2]} keys for {ids.shape[1]} tokens")
            state.keys[site], state.values[site] = k.clone(), v.clone()
            state.summaries[site] = self._summaries(k)
            return dense(q, k, v, mask, scale)

        state.logits = run(self.model, ids, inputs, store)
        if not state.keys:
            raise ValueError("no attention call was seen: tests/interception.py says how to call")
        state.ids = ids.clone()
        state.refreshed_blocks = self._current_block(state, ids)
        state.calls_since_refresh, state.fresh = 0, True
        state.steps_on_lists = 0
        return self._complete("refresh", ids, state.logits.clone(), sites=len(state.keys))

    def _step(self, state: State, ids: Tensor, inputs: dict[str, Any]) -> Result:
        step = self._rows(state, ids)
        again = 0 < state.steps_on_lists < self.settings.list_reuse
        if again:
            step.sinks = state.sinks
        else:
            state.chosen.clear()
        state.steps_on_lists = state.steps_on_lists + 1 if again else 1
        active = step.active[:, None, :, None]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
            site = len(step.keys)
            k = state.keys[site] = torch.where(active, k, state.keys[site])
            v = state.values[site] = torch.where(active, v, state.values[site])
            if self._region(state, site) == "capture" and not again:
                everything = torch.ones_like(step.active)
                step.sinks = state.sinks = self._sinks(softmax(q, k, mask, scale, everything), step)
            allowed = self._allowed(state, step, site, q)
            step.keys.append([_positions(row) for row in allowed])
            probability = softmax(q, k, mask, scale, allowed)
            return (probability @ v.to(probability.dtype)).to(q.dtype)

        logits = run(self.model, ids, inputs, attend)
        state.logits = torch.where(step.active[..., None], logits, state.logits)
        state.ids = ids.clone()
        state.calls_since_refresh += 1
        state.fresh = False
        return Result(
            logits=state.logits.clone(),
            program="step",
            active=step.active,
            focus=step.focus,
            sinks=step.sinks,
            keys=step.keys,
            confidence=_confidence(state.logits),
            margin=min(step.gaps, default=math.inf),
        )

    def _complete(self, program: str, ids: Tensor, logits: Tensor, *, sites: int) -> Result:
        """The result of a call that computes every row from every key."""
        batch, length = ids.shape
        return Result(
            logits=logits,
            program=program,
            active=torch.ones_like(ids, dtype=torch.bool),
            focus=torch.zeros_like(ids, dtype=torch.bool),
            sinks=[set() for _ in range(batch)],
            keys=[[list(range(length)) for _ in range(batch)] for _ in range(sites)],
            confidence=_confidence(logits),
            margin=math.inf,
        )

    def _rows(self, state: State, ids: Tensor) -> Step:
        """The active and the focus rows of every sequence."""
        step = Step(
            active=torch.zeros_like(ids, dtype=torch.bool),
            focus=torch.zeros_like(ids, dtype=torch.bool),
            candidates=[start // self.settings.key_block for start in state.response_start],
            sinks=[set() for _ in ids],
        )
        step.gaps.append(state.tie)
        own, before, decided = state.scored
        shifted = before > own and 2 * before > decided
        for b, block in enumerate(self._current_block(state, ids)):
            changed = _positions(ids[b] != state.ids[b])
            active = set(changed)
            if block is not None:
                first = state.response_start[b] + block * self.settings.block_length
                confidence = _confidence(state.logits[b])
                if shifted:
                    confidence = torch.cat([confidence[:1], confidence[:-1]])
                focus, around = self._block_rows(ids[b], first, len(changed), confidence, step)
                rows = [max(p - 1, 0) for p in focus] if shifted else focus
                step.focus[b, rows] = True
                active |= around | set(rows)
            step.active[b, sorted(active or {ids.shape[1] - 1})] = True
        return step

    def _block_rows(
        self, ids: Tensor, first: int, changed: int, confidence: Tensor, step: Step
    ) -> tuple[list[int], set[int]]:
        """Focus rows and active rows of one sequence whose current block begins at `first`."""
        length = len(ids)
        members = range(first, min(first + self.settings.block_length, length))
        masked = [p for p in members if ids[p] == self.settings.mask_token_id]
        if self.settings.policy == "dual-cache":
            return masked, set(members)
        if self.settings.policy == "prefix-cache":
            return masked, set(range(first, length))
        count = self.settings.expansion * max(changed, 1)
        focus = _top({p: float(confidence[p]) for p in masked}, count, step.gaps)
        before, after = (self.settings.window - 1) // 2, self.settings.window // 2
        around = {p for i in focus for p in range(i - before, i + after + 1)}
        return focus, {p for p in around if 0 <= p < length}

    def _region(self, state: State, site: int) -> str:
        sites, capture = len(state.keys), self.settings.dense_layers
        if capture is None:
            capture = 6 if sites >= 18 else sites // 3
        if self.settings.policy != "focus-dllm":
            return "dense"
        if site == capture:
            return "capture"
        tail = site >= sites - self.settings.dense_tail_layers
        return "dense" if site < capture or tail else "sparse"

    def _allowed(self, state: State, step: Step, site: int, q: Tensor) -> Tensor:
        """bool [B, T]: the keys that the site reads."""
        allowed = torch.ones_like(step.active)
        if self._region(state, site) != "sparse":
            return allowed
        size = self.settings.key_block
        for b, count in enumerate(step.candidates):
            allowed[b, : count * size] = False
            if (site, b) not in state.chosen:
                summaries = state.summaries[site][b]
                state.chosen[site, b] = self._blocks(q[b], summaries, step, b)
            for j in state.chosen[site, b]:
                allowed[b, j * size : (j + 1) * size] = True
            allowed[b, sorted(step.sinks[b])] = True
        return allowed

    def _sinks(self, probability: Tensor, step: Step) -> list[set[int]]:
        """S_j = mean over heads and active rows of probability [B, H, T, T]; the largest S_j."""
        sinks = []
        for b, count in enumerate(step.candidates):
            received = probability[b][:, step.active[b]].mean((0, 1)).tolist()
            prompt = dict(enumerate(received[: count * self.settings.key_block]))
            sinks.append(set(_top(prompt, self.settings.sink_tokens, step.gaps)))
        return sinks

    def _summaries(self, k: Tensor) -> Tensor:
        """[B, H, T, d] to a summary of every full key block, [B, H, T // key_block, d or 2 d].

        "mean" is the mean key; "bound" the highest and lowest of each channel.
        """
        size = self.settings.key_block
        blocks = k.shape[2] // size
        whole = wide(k[:, :, : blocks * size])
        if not blocks:
            return whole
        each = torch.stack(whole.chunk(blocks, 2), 2)
        if self.settings.block_summary == "mean":
            return each.mean(3).to(k.dtype)
        return torch.cat([each.amax(3), each.amin(3)], -1).to(k.dtype)

    def _blocks(self, q: Tensor, summaries: Tensor, step: Step, b: int) -> list[int]:
        """Relevance of block j = mean over query heads and focus rows of q_h . summary_hj."""
        count = step.candidates[b]
        keep = min(count, math.ceil(self.settings.keep_ratio * count))
        if not keep:
            return []
        rows = step.focus[b] if step.focus[b].any() else step.active[b]
        chosen = wide(q[:, rows])
        if self.settings.block_summary == "bound":
            chosen = torch.cat([chosen.clamp(min=0), chosen.clamp(max=0)], -1)
        scores = chosen @ wide(summaries[:, :count]).transpose(1, 2)
        return _top(dict(enumerate(scores.mean((0, 1)).tolist())), keep, step.gaps)


def _top(scores: dict[int, float], count: int, gaps: list[float]) -> list[int]:
    """The `count` keys of largest score, ties lowest key first; appends the relative gap."""
    order = sorted(scores, key=lambda key: (-scores[key], key))
    if 0 < count < len(order):
        kept, dropped = scores[order[count - 1]], scores[order[count]]
        largest = max(abs(kept), abs(dropped))
        gaps.append((kept - dropped) / largest if largest else 0.0)
    return order[:count]


def _first(flags: Tensor) -> int:
    """The first True position, or the length."""
    return (_positions(flags) or [len(flags)])[0]


def _positions(row: Tensor) -> list[int]:
    return [int(p) for p in row.nonzero().flatten()]


def _confidence(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1).amax(-1)


def _copy(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(type(a) is type(b) and a == b)
