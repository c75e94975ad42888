"""Hypothesis strategies for models and trajectories, and the error bound that judges logits.

@given(model_specs(), trajectories(), seeds())
def test_spec(spec, trajectory, seed): ...
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import spec as choices
from tests.models.network import logits_of
from tests.models.spec import ModelSpec

ERROR_MULTIPLE = 8.0
FLOOR_ULPS = 16.0

Draw = Callable[[st.SearchStrategy[Any]], Any]


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)


@st.composite
def model_specs(
    draw: Draw,
    /,
    mixer: str | Sequence[str] | None = None,
    separating: bool = False,
    **fixed: Any,
) -> ModelSpec:
    """Specs that a compiler should accept, unless a keyword asks for something to refuse.

    `mixer` is one of `MIXERS` or several to choose from; `separating` leaves out models in which
    rows of equal ids are equal (see `ModelSpec.separates_rows`). Every other field of `ModelSpec`
    may be fixed; one combination that no model can have is a ValueError.
    """
    chosen = dict(fixed)
    if mixer is not None:
        chosen["mixer"] = mixer if isinstance(mixer, str) else draw(st.sampled_from(tuple(mixer)))

    def pick(field: str, options: Sequence[Any]) -> None:
        if field not in chosen:
            chosen[field] = draw(st.sampled_from(tuple(options)))

    _pick_sites(pick, chosen)
    _pick_rest(pick, chosen, separating)
    return ModelSpec(**chosen)


Pick = Callable[[str, Sequence[Any]], None]
BOOLEANS = (False, True)


def _pick_sites(pick: Pick, chosen: dict[str, Any]) -> None:
    """Heads, attention and its spelling; simplest first, since examples shrink to the left."""
    pick("attention", choices.ATTENTIONS if chosen.get("causal") != "is_causal" else ("sdpa",))
    heads_per_kv = (1,) if chosen.get("projection") in ("unbind", "per_head") else (1, 2, 4)
    pick("heads", (4, 2) if "kv_heads" not in chosen else (4,))
    pick("kv_heads", [chosen["heads"] // g for g in heads_per_kv if chosen["heads"] % g == 0])
    sdpa = chosen["attention"] == "sdpa"
    pick("grouping", choices.GROUPINGS if sdpa else choices.GROUPINGS[:2])
    equal = chosen["heads"] == chosen["kv_heads"]
    pick("projection", choices.PROJECTIONS if equal else choices.PROJECTIONS[:2])
    pick("head_dim", (8, 4, 16))
    pick("scaling", choices.SCALINGS)
    pick("sharpness", (1.0, 0.7))
    pick("softmax", ("plain",) if sdpa else choices.SOFTMAXES)
    pick("mask_form", choices.MASK_FORMS)
    pick("qk_norm", BOOLEANS)


def _pick_rest(pick: Pick, chosen: dict[str, Any], separating: bool) -> None:
    """Everything around the sites."""
    maskless = chosen.get("causal") == "is_causal" or chosen["attention"] == "linear"
    pick("padding", (False,) if maskless else BOOLEANS)
    barred = {"alibi"} if maskless else set()
    if separating:
        barred.add("none")
    pick("position", [position for position in choices.POSITIONS if position not in barred])
    pick("position_table", choices.POSITION_TABLES)
    misses = [m for m in choices.NEAR_MISSES if not (maskless and m == "mask_from_ids")]
    pick("near_miss", (None, *misses))
    flat = chosen.get("mixer_place") == "flat"
    pick("flatten", (True,) if flat else BOOLEANS)
    places = [p for p in choices.MIXER_PLACES if p != "flat"]
    if chosen["flatten"] and chosen.get("mixer") != "batch_mean":
        places.append("flat")
    pick("mixer_place", places if chosen.get("mixer") else ("residual",))
    pick("hidden", (16, 32, 48))
    pick("layers", (2, 3, 4))
    pick("mlp", choices.MLPS)
    pick("norm", choices.NORMS)
    pick("norm_place", choices.NORM_PLACES)
    pick("parallel", BOOLEANS)
    pick("bias", BOOLEANS)
    pick("tied", BOOLEANS)
    pick("head", choices.HEADS)
    pick("output", choices.OUTPUTS)


@st.composite
def respellings(draw: Draw, spec: ModelSpec) -> ModelSpec:
    """Another way to write the same function: only `SPELLING_FIELDS` are drawn anew."""
    kept = {
        field: getattr(spec, field)
        for field in spec.__dataclass_fields__
        if field not in choices.SPELLING_FIELDS
    }
    if spec.attention in choices.UNMATCHED_ATTENTIONS or spec.causal == "is_causal":
        kept["attention"] = spec.attention
    if spec.mixer_place == "flat" and spec.mixer is not None:
        kept["flatten"] = True
    return draw(model_specs(**kept))


@dataclass(frozen=True)
class Trajectory:
    """What a sampling loop asks of a model: one [B, T] tensor of ids for each call."""

    calls: tuple[Tensor, ...]
    mask_token_id: int
    attention_mask: Tensor | None
    """[B, T] int64, 0 where a prompt is padded on its left; None if no prompt is."""

    @property
    def response_start(self) -> list[int]:
        """First masked position of each sequence at the first call; T if it has none."""
        masked = (self.calls[0] == self.mask_token_id).long()
        length = masked.shape[1]
        return [int(row.argmax()) if row.any() else length for row in masked]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments that go with every call's ids."""
        return {} if self.attention_mask is None else {"attention_mask": self.attention_mask}


@dataclass(frozen=True)
class TrajectorySpec:
    """A random trajectory, described: `make` gives its ids.

    Prompts of different lengths, then masks, decided a few a call. Ids are never the pad id except
    in padding, and the mask id is never decided.
    """

    length: int
    prompts: tuple[int, ...]
    """Tokens of each sequence's prompt, at most `length`."""
    counts: tuple[tuple[int, ...], ...] = ()
    """Of every call after the first, how many masks of each sequence were decided before it."""
    order: str = "random"
    """Which masks are decided: "random", or the first from the "left" or "right"."""
    infill: bool = False
    """Some positions among the masks are decided from the start."""
    padded: bool = False
    """Shorter prompts are padded on the left, with an attention mask, so that all responses start
    together; else shorter prompts have longer responses."""
    edited: tuple[int, ...] = ()
    """Calls before which a sequence's first token changes, too."""
    block_length: int = 0
    """0: every call is of all positions; else of those up to the end of the first block of so many
    tokens that has masks."""
    seed: int = 0

    def make(self, vocab: int, mask_token_id: int, pad_token_id: int) -> Trajectory:
        batch, length = len(self.prompts), self.length
        generator = torch.Generator().manual_seed(self.seed)
        allowed = torch.tensor([i for i in range(vocab) if i not in (pad_token_id, mask_token_id)])
        truth = allowed[torch.randint(len(allowed), (batch, length), generator=generator)]
        longest = max(self.prompts)
        starts = torch.tensor([longest] * batch if self.padded else self.prompts)[:, None]
        positions = torch.arange(length)[None]
        masked = positions >= starts
        if self.infill:
            masked &= torch.rand(batch, length, generator=generator) < 0.7
        attention_mask = None
        if self.padded:
            real = positions >= starts - torch.tensor(self.prompts).clamp(min=1)[:, None]
            truth = torch.where(real, truth, pad_token_id)
            attention_mask = (real | masked).long()

        ids = torch.where(masked, mask_token_id, truth)
        calls = [self._seen(ids, mask_token_id)]
        for number, counts in enumerate(self.counts, 1):
            seen = calls[-1].shape[1]
            ids = ids.clone()
            ids[:, :seen] = _decided(
                ids[:, :seen], truth[:, :seen], mask_token_id, counts, generator, self.order
            )
            if number in self.edited:
                ids[0, 0] = allowed[(ids[0, 0] + 1) % len(allowed)]
            calls.append(self._seen(ids, mask_token_id))
        return Trajectory(tuple(calls), mask_token_id, attention_mask)

    def _seen(self, ids: Tensor, mask_token_id: int) -> Tensor:
        """The positions of a call."""
        masked = (ids == mask_token_id).any(0)
        if not self.block_length or not masked.any():
            return ids
        block = int(masked.long().argmax()) // self.block_length
        return ids[:, : (block + 1) * self.block_length]


ORDERS = ("random", "left", "right")


@st.composite
def trajectory_specs(
    draw: Draw,
    max_batch: int = 3,
    min_length: int = 4,
    max_length: int = 24,
    max_per_step: int = 3,
    min_calls: int = 1,
    max_calls: int = 8,
    min_masks: int = 0,
    padded: bool | None = False,
    orders: Sequence[str] = ("random",),
    edits: bool = False,
) -> TrajectorySpec:
    """Trajectories in which each step decides 0 to `max_per_step` masks of each sequence.

    One may end before all masks are decided. Sequences may have no prompt, no masks unless
    `min_masks` says so, or decided tokens among the masks. padded: see `TrajectorySpec`; None draws
    either.
    """
    batch = draw(st.integers(1, max_batch))
    length = draw(st.integers(min_length, max_length))
    prompt = st.integers(0, max(0, length - min_masks))
    prompts = draw(st.lists(prompt, min_size=batch, max_size=batch))
    infill = draw(st.booleans())
    pad = draw(st.booleans()) if padded is None else padded
    seed = draw(seeds())
    step = st.lists(st.integers(0, max_per_step), min_size=batch, max_size=batch).map(tuple)
    counts = [draw(step) for _ in range(draw(st.integers(min_calls - 1, max_calls - 1)))]
    edited = draw(st.lists(st.integers(1, max_calls), max_size=1)) if edits else []
    order = orders[0] if len(orders) == 1 else draw(st.sampled_from(tuple(orders)))
    return TrajectorySpec(
        length, tuple(prompts), tuple(counts), order, infill, pad, tuple(edited), seed=seed
    )


@st.composite
def growing_specs(draw: Draw, block_length: int, max_batch: int = 2) -> TrajectorySpec:
    """Trajectories of block diffusion: one to four blocks in which masks are decided, one by one,
    after a prompt of whole blocks."""
    batch, blocks = draw(st.integers(1, max_batch)), draw(st.integers(1, 4))
    prompt = block_length * draw(st.integers(1, 3))
    step = st.lists(st.integers(0, block_length // 2), min_size=batch, max_size=batch).map(tuple)
    counts = [draw(step) for _ in range(draw(st.integers(2, 12)))]
    return TrajectorySpec(
        prompt + blocks * block_length,
        (prompt,) * batch,
        tuple(counts),
        draw(st.sampled_from(ORDERS)),
        block_length=block_length,
        seed=draw(seeds()),
    )


def trajectories(
    vocab: int = ModelSpec.vocab,
    mask_token_id: int | None = None,
    pad_token_id: int = 0,
    **limits: Any,
) -> st.SearchStrategy[Trajectory]:
    """The trajectories of `trajectory_specs(**limits)`; the mask id is vocab - 1 unless given."""
    mask_id = vocab - 1 if mask_token_id is None else mask_token_id
    return trajectory_specs(**limits).map(lambda spec: spec.make(vocab, mask_id, pad_token_id))


def _decided(
    ids: Tensor,
    truth: Tensor,
    mask_id: int,
    counts: Sequence[int],
    generator: torch.Generator,
    order: str,
) -> Tensor:
    """A copy of ids [B, T] in which counts[b] masked positions hold the truth."""
    ids = ids.clone()
    for row, answer, count in zip(ids, truth, counts, strict=True):
        at = (row == mask_id).nonzero()[:, 0]
        if order == "random":
            at = at[torch.randperm(len(at), generator=generator)]
        elif order == "right":
            at = at.flip(0)
        chosen = at[:count]
        row[chosen] = answer[chosen]
    return ids


EVERYTHING = {"keep_ratio": 1.0, "window": 4096, "logits": "all"}
"""Options with which nothing is left out while every sequence has masks."""


def policy_options(**fixed: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Option sets small enough that every rule of the policies shows on 24 tokens."""
    drawn = {
        "block_length": st.integers(1, 9),
        "dense_layers": st.integers(0, 2),
        "dense_tail_layers": st.integers(0, 1),
        "expansion": st.integers(1, 3),
        "window": st.integers(1, 5),
        "keep_ratio": st.sampled_from([0.0, 0.2, 0.5, 0.8]),
        "sink_tokens": st.integers(0, 3),
        "key_block": st.integers(1, 4),
        "block_summary": st.sampled_from(["bound", "mean"]),
        "refresh": st.sampled_from(["block", "block", 2, 3]),
        "list_reuse": st.sampled_from([1, 1, 2, 3]),
        "logits": st.sampled_from(["all", "response"]),
        "merge_projections": st.booleans(),
    }
    return st.fixed_dictionaries({k: v for k, v in drawn.items() if k not in fixed}).map(
        lambda chosen: chosen | fixed
    )


class _NoFloat32(TorchDispatchMode):
    """Runs every op that names float32 in float64.

    Models spell `x.to(torch.float32)` and `softmax(dtype=torch.float32)` in their norms and
    attention, which would round a float64 twin down.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = {k: _widened(v) for k, v in (kwargs or {}).items()}
        return func(*(_widened(arg) for arg in args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Float64Twin(nn.Module):
    """A copy of a model that computes the same function of the same weights in float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).double()
        config = getattr(self.model, "config", None)
        if getattr(config, "_attn_implementation", None) == "flex_attention":
            config._attn_implementation = "sdpa"  # type: ignore[union-attr]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits [B, T, V], float64."""
        with torch.no_grad(), _NoFloat32():
            return logits_of(self.model(*args, **kwargs))


def float64_twin(model: nn.Module) -> Float64Twin:
    """The model's `Float64Twin`; change the weights, and it must be made again."""
    return Float64Twin(model)


def bound_from_float64(model: nn.Module, twin: Float64Twin, ids: Tensor, **inputs: Any) -> float:
    """How far apart two correct computations of `model(ids)`'s logits may be, elementwise.

    bound = 8 * max|model - twin| + 16 * eps * max|twin|

    The first maximum, over all logits, is the rounding error of the dense run itself. Another
    order of the same arithmetic errs by about as much, in places by a few times as much; the
    difference of the two by the sum of both, hence the multiple. The floor, 16 units in the last
    place of the largest logit (eps of the model's dtype), covers the cases where so few logits
    are compared that the dense run is exact by luck. A wrong row or key is off by 1e-2 or more
    of the logits' scale, four orders above what this allows in float32.
    """
    with torch.no_grad():
        logits = logits_of(model(ids, **inputs))
    return bound_between(logits, twin(ids, **inputs))


def bound_between(logits: Tensor, exact: Tensor) -> float:
    """`bound_from_float64` of a dense run's logits and the twin's."""
    error = (logits.double() - exact).abs().max().item()
    floor = FLOOR_ULPS * torch.finfo(logits.dtype).eps * exact.abs().max().item()
    return ERROR_MULTIPLE * error + floor
