"""Continuous batching for block diffusion: sequences join, decode side by side, and leave."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from focus_compile.block_diffusion.block_model import COMPILED_KEY_OPTIONS, BlockModel
from focus_compile.block_diffusion.inspected import StepInspection
from focus_compile.block_diffusion.programs import RowList
from focus_compile.block_diffusion.requests import (
    Completion,
    Request,
    check_whole,
    completion_of,
    is_number,
    stop_at,
    token_ids,
    tokens_of,
)
from focus_compile.block_diffusion.row_sizes import (
    LADDER,
    HeldRows,
    PromptBlock,
    all_scored,
    listed_blocks,
    padded_rows,
    scored_rows,
)
from focus_compile.block_diffusion.state import COMMIT, DECODE, IDLE, BlockState, Listing
from focus_compile.block_diffusion.step_costs import StepCosts
from focus_compile.block_diffusion.tracing import ModelCall, call_with_block_mask
from focus_compile.config import BLOCK_POLICIES, COMBINED, EVICTING_POLICIES, FocusConfig
from focus_compile.errors import FocusError, OptionError
from focus_compile.fallback import warn_once
from focus_compile.frontend import known_mask_token_id
from focus_compile.kernels.confidence.op import confidence
from focus_compile.kernels.ragged import MOST_ROWS
from focus_compile.policies.focus_evict import Rank, keep_rows
from focus_compile.runtime.device_graphs import DeviceGraphs
from focus_compile.runtime.inspection import active_inspector

__all__ = ["BLOCK_POLICIES", "BatchGenerator", "BlockStep", "Completion"]

T = TypeVar("T")
COMMITS = ("exact", "delayed")
KEY_OPTIONS = ("keep_ratio", *COMPILED_KEY_OPTIONS, "dense_if_faster")
PREFILL_BLOCKS = 32
"""Blocks of prompts that one call of the whole program takes at most."""
WARM_ROWS = 1024
"""Larger steps are few of many sizes: they are captured when they come up again."""


@dataclass(frozen=True, slots=True)
class BlockStep:
    """What one step computed. listed: rows up to the cut; kept: rows past it; decoded: tokens."""

    sequences: int
    listed: int
    kept: int
    decoded: int
    evicting: bool
    milliseconds: float
    compile_seconds: float


@dataclass
class _Slot:
    """The host's view of a slot. given: tokens of the current block that are the prompt's."""

    request: Request
    begin: int
    given: int
    phase: int = DECODE
    uncached: int = 0
    undecided: int = 0


class BatchGenerator:
    """Decodes many prompts with one block-diffusion model, a step for all of them at a time.

    The model is captured once, and proven to be block-causal. Every step computes the listed rows
    of all sequences as one list: with "focus-evict" (FOCUS, arXiv 2601.23278) those whose K/V are
    not final, of which after the cut only those stay that are likely to decode; with
    "delayed-cache" the same without eviction; with "block-diffusion" whole blocks. With
    "focus-dllm+evict" rows are evicted as well, and those that decode a block read some of the key
    blocks of finished ones in the sparse layers, as in Focus-dLLM (arXiv 2602.02159). Of a computed
    masked row, the most probable token is decoded if its probability reaches the threshold; the
    best row of every sequence always is.

    `history` holds a `BlockStep` for every step.
    """

    def __init__(
        self,
        model: nn.Module | BlockModel,
        *,
        block_length: int,
        max_length: int,
        max_batch: int = 8,
        policy: str = "focus-evict",
        mask_token_id: int | None = None,
        threshold: float = 0.9,
        alpha: float = 1.5,
        commit: str = "exact",
        eos_token_id: int | Sequence[int] | None = None,
        cut: int = 1,
        rank: Rank = torch.sub,
        evict_if_faster: bool | None = None,
        merge_projections: bool | None = None,
        lowering: str = "inductor",
        cuda_graphs: bool = True,
        key_options: Mapping[str, Any] | None = None,
        call: ModelCall = call_with_block_mask,
    ) -> None:
        """
        Args:
            model: takes a block-causal mask [1, 1, tokens, tokens] (see `call`). Or the `model` of
                another generator, to share what it compiled: of that are `cut`, `lowering`,
                `merge_projections` and `call`, and `block_length`; `max_length` is at most its.
            block_length: B, tokens that are decoded together.
            max_length: tokens of the longest sequence, prompt and response; rounded up to blocks.
            max_batch: sequences that decode side by side; a K/V cache is held for each.
            policy: one of `BLOCK_POLICIES`.
            mask_token_id: None takes it from `model.config`.
            threshold: tau, the probability from which on a token is decoded, 0 to 1.
            alpha: budget of masked rows past the cut, times the mean yield; at least 1, infinity
                evicts nothing.
            commit: "exact" computes a finished block once more as a whole, so that its K/V are
                those of the model; "delayed" only the rows whose K/V are not final yet.
            eos_token_id: one or several tokens that end a sequence.
            cut: layer after whose keys and values rows leave.
            rank: scores of the masked rows, of which the highest stay: a function of their
                importance at the cut and in the layer before. One that is no pure function, such
                as random numbers, needs `cuda_graphs=False`.
            evict_if_faster: evict only in steps of such sizes where that decodes more tokens a
                second, by timing both ways as steps go by. None: on a GPU.
            merge_projections, lowering, cuda_graphs: see `FocusConfig`.
            key_options: with "focus-dllm+evict", those of `KEY_OPTIONS` that differ from the
                defaults of `FocusConfig`, which explains them.
            call: how the model is called.

        Raises:
            OptionError: a value out of range.
            RefusalError: the model cannot be captured, or is not block-causal with this block
                length; says where.
        """
        self.policy, self.threshold, self.alpha, self.commit = policy, threshold, alpha, commit
        self.rank = rank
        self.block_length, self.max_batch = block_length, max_batch
        if mask_token_id is None:
            if isinstance(model, BlockModel):
                mask_token_id = model.config.mask_token_id
            else:
                mask_token_id = known_mask_token_id(model)
        self._check(mask_token_id, max_length, cut)
        self._check_keys(key_options or {})
        assert mask_token_id is not None
        self.eos = token_ids(eos_token_id)
        config = FocusConfig(
            policy=COMBINED if policy == COMBINED else "delayed-cache",
            mask_token_id=mask_token_id, block_length=block_length, lowering=lowering,
            cuda_graphs=cuda_graphs, merge_projections=merge_projections, **(key_options or {}),
        )  # fmt: skip
        self.config, self.call, self.key_options = config, call, dict(key_options or {})
        self.keep_ratio = config.keep_ratio
        self.max_length = math.ceil(max_length / block_length) * block_length
        if isinstance(model, BlockModel):
            model.check_shared(config, self.max_length)
        else:
            model = BlockModel.compile(model, config, self.max_length, cut, call)
        self.model, device = model, model.device
        self.programs, self._arguments = model.programs, model.arguments
        self.caches = self.programs.allocate(max_batch, self.max_length, device)
        self.state = BlockState.allocate(
            max_batch, block_length, self.max_length, mask_token_id, device,
            key_block=self.programs.key_block,
        )  # fmt: skip
        captures = cuda_graphs and device.type == "cuda"
        self.graphs = DeviceGraphs(captures, _no_graphs, device)
        most = padded_rows(max_batch * block_length)
        self._frontier, self._kept = HeldRows(most), HeldRows(most)
        self.decode_counts: Tensor | None = None
        """int64 [max_batch]: decode so many tokens a step instead of by threshold (to measure with
        given yields)."""
        self.history: list[BlockStep] = []
        weighs = device.type == "cuda" if evict_if_faster is None else evict_if_faster
        self.costs = StepCosts() if weighs else None
        self._looked: StepInspection | None = None
        self._slots: list[_Slot | None] = [None] * max_batch
        self._waiting: deque[Request] = deque()
        self._numbers = itertools.count()

    def _check_keys(self, key_options: Mapping[str, Any]) -> None:
        for name in key_options:
            if name not in KEY_OPTIONS:
                raise OptionError.unknown(str(name), KEY_OPTIONS, kind="key option")
        if key_options and self.policy != COMBINED:
            raise OptionError.invalid(
                "key_options", dict(key_options), f"none with {self.policy}, which reads all keys"
            )
        if self.commit != "exact" and self.policy == COMBINED:
            raise OptionError.invalid(
                "commit", self.commit, f'"exact" with {COMBINED}: its steps read some keys only'
            )

    def _check(self, mask_token_id: int | None, max_length: int, cut: int) -> None:
        if mask_token_id is None:
            raise OptionError(
                "BatchGenerator: model.config has no mask_token_id; pass mask_token_id=..."
            )
        if self.policy not in BLOCK_POLICIES:
            raise OptionError.unknown(self.policy, BLOCK_POLICIES, kind="policy")
        if self.commit not in COMMITS:
            raise OptionError.unknown(self.commit, COMMITS, kind="commit")
        check_whole("block_length", self.block_length, 2)
        check_whole("max_batch", self.max_batch, 1)
        check_whole("max_length", max_length, 2 * self.block_length)
        check_whole("cut", cut, 1)
        if self.policy in EVICTING_POLICIES and self.block_length > MOST_ROWS:
            raise OptionError.invalid(
                "block_length", self.block_length, f"at most {MOST_ROWS} with {self.policy}"
            )
        if not is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise OptionError.invalid("threshold", self.threshold, "a probability")
        if not is_number(self.alpha) or not self.alpha >= 1:
            raise OptionError.invalid("alpha", self.alpha, "a number >= 1")

    def submit(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int,
        stop: Iterable[Sequence[int]] = (),
    ) -> int:
        """Queue a prompt; returns the number that its `Completion` will carry.

        Args:
            prompt: token ids, at least one, none of them the mask.
            max_new_tokens: the response is cut off there.
            stop: token sequences that end the response where they appear in it.

        Raises:
            OptionError: no prompt, a mask in it, or no room for it and one token; something that is
                no token or number.
        """
        ids = tokens_of(
            "prompt", prompt.flatten().tolist() if isinstance(prompt, Tensor) else prompt
        )
        if not ids:
            raise OptionError("BatchGenerator.submit: the prompt is empty")
        if self.state.mask_token_id in ids:
            raise OptionError(
                f"BatchGenerator.submit: the prompt holds the mask token {self.state.mask_token_id}"
            )
        check_whole("max_new_tokens", max_new_tokens, 1)
        if len(ids) >= self.max_length:
            raise OptionError(
                f"BatchGenerator.submit: the prompt has {len(ids)} tokens, which leaves no room "
                f"for a response in max_length={self.max_length}"
            )
        stops = tuple(tuple(tokens_of("stop", one)) for one in stop)
        if any(not one for one in stops):
            raise OptionError("BatchGenerator.submit: a stop sequence is empty")
        request = Request(next(self._numbers), ids, max_new_tokens, stops)
        self._waiting.append(request)
        return request.number

    @property
    def pending(self) -> int:
        """Requests that are waiting or decoding."""
        return len(self._waiting) + sum(slot is not None for slot in self._slots)

    def results(self) -> Iterator[Completion]:
        """Step until nothing is pending, and yield what completes as it does."""
        while self.pending:
            yield from self.step()

    def partial(self, request: int) -> list[int]:
        """The response so far of a request that is decoding, masks where its block is undecided;
        empty for others."""
        for at, slot in enumerate(self._slots):
            if slot is None or slot.request.number != request:
                continue
            block = [] if slot.phase == COMMIT else self.state.tokens[at].tolist()[slot.given :]
            return (slot.request.tokens + block)[: slot.request.limit]
        return []

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Admit what waits, compute one step for all sequences, and return what it completed.

        Raises:
            RefusalError: in the first step, where two blocks are compared with the model's own
                forward: they differ.
        """
        started, compiled = time.perf_counter(), self.programs.compile_seconds
        self._admit()
        working = [slot for slot in self._slots if slot is not None]
        if not working:
            return []
        inspector = active_inspector()
        self._looked = None if inspector is None else StepInspection.begin(inspector, self)
        before = [(slot, slot.undecided) for slot in working if slot.phase == DECODE]
        computing = time.perf_counter()
        listed, kept, evicting = self._compute()
        self.programs.summarise(
            self.caches,
            (
                (at, slot.begin, slot.begin + self.block_length)
                for at, slot in enumerate(self._slots)
                if slot is not None and slot.phase == COMMIT
            ),
        )
        for slot in working:
            slot.request.steps += 1
        self._learn()
        decoded = sum(undecided - slot.undecided for slot, undecided in before)
        if self.costs is not None and before:
            milliseconds = (time.perf_counter() - computing) * 1e3
            self.costs.measured(padded_rows(listed), evicting, milliseconds, decoded, len(before))
        if self.decode_counts is None and any(slot.undecided >= was for slot, was in before):
            raise FocusError("focus_compile: nothing can be decoded; the model's logits are NaN")
        completed = self._finish_blocks()
        self.history.append(
            BlockStep(
                len(working), listed, kept, decoded, evicting,
                (time.perf_counter() - started) * 1e3,
                self.programs.compile_seconds - compiled,
            )
        )  # fmt: skip
        if self._looked is not None:
            self._looked.finish(self, self.history[-1], padded_rows(listed))
            self._looked = None
        return completed

    def sequences(self) -> list[tuple[int, list[int]]]:
        """Of every slot: where its block begins, and the ids of its sequence, masks up to where
        its response ends; (0, []) of a free one."""
        found: list[tuple[int, list[int]]] = []
        for at, slot in enumerate(self._slots):
            if slot is None:
                found.append((0, []))
                continue
            request = slot.request
            known = (request.prompt + request.tokens)[: slot.begin]
            ids = known + self.state.tokens[at].tolist()
            end = min(len(request.prompt) + request.limit, self.max_length)
            found.append((slot.begin, ids + [self.state.mask_token_id] * (end - len(ids))))
        return found

    def requests(self) -> list[dict[str, Any]]:
        """Those that decode or wait, in the order of their submission, as `submit` was given them;
        "steps": how many they took part in."""
        slots = (slot.request for slot in self._slots if slot is not None)
        ordered = sorted((*slots, *self._waiting), key=lambda request: request.number)
        return [
            {
                "request": request.number,
                "prompt": list(request.prompt),
                "max_new_tokens": request.limit,
                "stop": [list(stop) for stop in request.stops],
                "steps": request.steps,
            }
            for request in ordered
        ]

    @torch.no_grad()
    def warmup(self) -> int:
        """Compile every program, and capture every CUDA graph that a step can need; returns how
        many are captured. What is not warmed up is made when a step first needs it.

        Raises:
            FocusError: requests are pending.
            RefusalError: the programs are not the model; see `step`.
        """
        if self.pending:
            raise FocusError("BatchGenerator.warmup: requests are pending; call it before submit")
        self.model.check_once()
        most = padded_rows(self.max_batch * self.block_length)
        all_sizes = [most] if self.policy == "block-diffusion" else LADDER
        sizes = [rows for rows in all_sizes if rows <= min(most, WARM_ROWS)]
        # The first run of each compiles, the second one captures; idle slots list no rows.
        for rows in sizes or [most]:
            for _ in range(2):
                for scored in all_scored(rows):
                    self._launch_whole(rows, scored)
        pairs = [(rows, kept) for rows in sizes for kept in sizes if kept <= rows]
        for rows, kept in pairs if self._may_evict else ():
            # What was kept is the same for all lists: only the first has to make its suffixes.
            for scored in all_scored(kept) if rows == kept else [kept]:
                for _ in range(2):
                    self._launch_leaving(rows, (kept, scored))
        return self.graphs.captured

    @property
    def _may_evict(self) -> bool:
        return self.policy in EVICTING_POLICIES and not math.isinf(self.alpha)

    def _compute(self) -> tuple[int, int, bool]:
        """Run the step's programs; (rows listed, rows past the cut, whether some could leave)."""
        working = [slot for slot in self._slots if slot is not None]
        listed = sum(map(self._rows_of, working))
        undecided = sum(slot.undecided for slot in working if slot.phase == DECODE)
        rows = padded_rows(listed)
        evicts = self._may_evict and undecided > 0
        if evicts and self.costs is not None:
            evicts = self.costs.evict(rows)
        if not evicts:
            self._launch_whole(rows, scored_rows(undecided, rows))
            return listed, listed, False
        kept = self._launch_leaving(rows)
        return listed, kept, True

    def _launch_whole(self, rows: int, scored: int) -> None:
        self._launch(("whole", rows, scored), lambda: self._whole(rows, scored))

    def _launch_leaving(self, rows: int, sizes: tuple[int, int] | None = None) -> int:
        """A step that lists `rows` and goes on with those kept, of which it returns the number.

        sizes: what the kept rows and those with logits are padded to; None: their next rungs."""
        listing, keep, frontier = self._launch(("prefix", rows), lambda: self._prefix(rows))
        kept, undecided = torch.stack([keep.sum(), (keep & listing.masked).sum()]).tolist()
        if sizes is None:
            narrow = min(padded_rows(kept), rows)
            sizes = narrow, scored_rows(undecided, narrow)
        narrow, scored = sizes
        kept_rows, handed = self._launch(
            ("leave", rows, narrow), lambda: self._leave(listing, keep, frontier, narrow)
        )
        self._launch(("suffix", narrow, scored), lambda: self._suffix(kept_rows, handed, scored))
        return int(kept)

    def _launch(self, key: Hashable, work: Callable[[], T]) -> T:
        """Run work that depends on nothing but the state, as a CUDA graph unless looked at."""
        if self._looked is not None:
            return work()
        given = None if self.decode_counts is None else self.decode_counts.data_ptr()
        return self.graphs.run((key, given), work)

    def _rows_of(self, slot: _Slot) -> int:
        whole = self.policy == "block-diffusion" or (
            slot.phase == COMMIT and self.commit == "exact"
        )
        return self.block_length if whole else slot.uncached

    def _listing(self, rows: int) -> Listing:
        return self.state.listing(
            rows,
            everything=self.policy == "block-diffusion",
            commit_all=self.commit == "exact",
            keep_ratio=self.keep_ratio if self.policy == COMBINED else 1.0,
        )

    def _whole(self, rows: int, wanted: int) -> None:
        """All listed rows through the model, logits of the masked ones."""
        listing = self._listing(rows)
        narrow, chosen = self.state.narrowed(listing, listing.masked, wanted)
        outputs = self.programs.run_whole(
            self._arguments, self.caches, listing.rows, chosen, narrow.rows.starts
        )
        self._decode(listing, narrow, outputs)

    def _prefix(self, rows: int) -> tuple[Listing, Tensor, list[Tensor]]:
        listing = self._listing(rows)
        if self._looked is not None:
            self._looked.listed(self.state, listing)
        at_cut, before, frontier = self.programs.run_prefix(
            self._arguments, self.caches, listing.rows, listing.masked
        )
        keep = keep_rows(
            at_cut, before, listing.masked, listing.index % self.block_length,
            listing.rows.starts, self.state.decoded.mean(), self.state.progress, self.alpha,
            self.block_length, self.rank,
        )  # fmt: skip
        return listing, keep, self._frontier.hold(rows, frontier)

    def _leave(
        self, listing: Listing, keep: Tensor, frontier: Sequence[Tensor], rows: int
    ) -> tuple[Listing, list[Tensor]]:
        """The kept rows and their frontier, where the suffix of so many rows reads them."""
        narrow, chosen = self.state.narrowed(listing, keep, rows)
        handed = self.programs.run_leave(listing.rows, chosen, frontier)
        listed = narrow.rows.inputs()
        values = [*listed, narrow.index, narrow.real, narrow.masked, *handed]
        held = self._kept.hold(rows, values)
        flags = held[len(listed) : len(listed) + 3]
        return Listing(RowList.of(held[: len(listed)]), *flags), held[len(listed) + 3 :]

    def _suffix(self, narrow: Listing, frontier: Sequence[Tensor], scored: int) -> None:
        """What `_leave` returned, through the rest of the model; logits of the masked rows."""
        final, chosen = self.state.narrowed(narrow, narrow.masked, scored)
        outputs = self.programs.run_suffix(
            self._arguments, self.caches, narrow.rows, chosen, final.rows.starts, frontier
        )
        self._decode(narrow, final, outputs)

    def _decode(self, computed: Listing, scored: Listing, outputs: Sequence[Tensor]) -> None:
        """computed: rows that went through all layers; scored: those that the outputs are of."""
        assert self.programs.plan.logits is not None
        logits = outputs[self.programs.plan.logits][0]
        if self.state.mask_token_id < logits.shape[-1]:
            logits.index_fill_(-1, self._mask_column, -math.inf)
        probability, token = confidence(logits)
        if self._looked is not None:
            self._looked.computed(self.state, computed, scored, logits, probability, token)
        self.state.advance(computed, scored, probability, token, self.threshold, self.decode_counts)

    @property
    def _mask_column(self) -> Tensor:
        if not hasattr(self, "_column"):
            self._column = torch.tensor([self.state.mask_token_id], device=self.state.tokens.device)
        return self._column

    def _learn(self) -> None:
        """Read from the device what the next step is planned by."""
        uncached, undecided = self.state.counts().tolist()
        for at, slot in enumerate(self._slots):
            if slot is None:
                continue
            if slot.phase == COMMIT:
                slot.phase, slot.given = DECODE, 0
                slot.begin += self.block_length
            slot.uncached, slot.undecided = uncached[at], undecided[at]

    def _finish_blocks(self) -> list[Completion]:
        """Take the tokens of decided blocks, and let their sequences go on or leave."""
        done = [
            at
            for at, slot in enumerate(self._slots)
            if slot is not None and slot.undecided == 0 and slot.phase == DECODE
        ]
        completed: list[Completion] = []
        if not done:
            return completed
        blocks = self.state.tokens[done].tolist()
        for at, tokens in zip(done, blocks, strict=True):
            slot = self._slots[at]
            assert slot is not None
            known = len(slot.request.tokens)
            slot.request.tokens += tokens[slot.given :]
            reason = self._why_done(slot, known)
            if reason is None:
                slot.phase = COMMIT
            else:
                completed.append(completion_of(slot.request, reason))
                self._slots[at] = None
        self._tell_phases()
        return completed

    def _why_done(self, slot: _Slot, known: int) -> str | None:
        """Whether a sequence ends with the block whose tokens were just added, and cut it there.

        known: tokens before this block."""
        request = slot.request
        end = stop_at(request.tokens[: request.limit], known, request.stops, self.eos)
        if end is not None:
            del request.tokens[end:]
            return "stop"
        full = slot.begin + 2 * self.block_length > self.max_length
        if len(request.tokens) >= request.limit or full:
            del request.tokens[request.limit :]
            return "length"
        return None

    def _tell_phases(self) -> None:
        phases = [IDLE if slot is None else slot.phase for slot in self._slots]
        self.state.phase.copy_(torch.tensor(phases))

    def _admit(self) -> None:
        """Give free slots to what waits, and compute the K/V of the prompts' whole blocks."""
        if self._waiting and not any(self._slots):
            self.model.refresh_weights()
            self.model.check_once()
        blocks: list[PromptBlock] = []
        length = self.block_length
        for at in range(self.max_batch):
            if not self._waiting or self._slots[at] is not None:
                continue
            request = self._waiting.popleft()
            prompt = request.prompt
            begin = len(prompt) // length * length
            blocks += [(at, b, prompt[b : b + length]) for b in range(0, begin, length)]
            given = prompt[begin:]
            tokens = given + [self.state.mask_token_id] * (length - len(given))
            device = self.state.tokens.device
            self.state.start(at, torch.tensor(tokens, device=device), begin)
            self._slots[at] = _Slot(request, begin, len(given), DECODE, length, length - len(given))
        for first in range(0, len(blocks), PREFILL_BLOCKS):
            self._prefill(blocks[first : first + PREFILL_BLOCKS])
        self.programs.summarise(self.caches, ((at, b, b + length) for at, b, _ in blocks))
        if any(slot is not None for slot in self._slots):
            self._tell_phases()

    def _prefill(self, blocks: list[PromptBlock]) -> None:
        """K/V of whole blocks of prompts, a sequence's in order."""
        device = self.state.tokens.device
        listed = listed_blocks(
            blocks, self.block_length, self.max_length, self.state.key_block, device
        )
        chosen = torch.zeros((1, 2), dtype=torch.int64, device=device)
        starts = torch.full_like(listed.starts, 2)
        starts[0] = 0
        self.programs.run_whole(self._arguments, self.caches, listed, chosen, starts)


def _no_graphs(why: str) -> Any:
    warn_once(f"focus_compile launches kernels one by one: a step could not be captured ({why})")
