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


@st.composite
def trajectories(
    draw: Draw,
    vocab: int = ModelSpec.vocab,
    mask_token_id: int | None = None,
    pad_token_id: int = 0,
    max_batch: int = 3,
    min_length: int = 4,
    max_length: int = 24,
    max_per_step: int = 3,
    max_calls: int = 8,
    padded: bool | None = False,
) -> Trajectory:
    """Random prompts of different lengths, then masks, decoded in a random order.

    Each step decides 0 to `max_per_step` masked tokens of each sequence; a trajectory may end
    before all are. Sequences may have no prompt, no masks, or decided tokens among the masks.
    `padded=True` pads shorter prompts on the left, with an attention mask, so that all responses
    start together; False lets shorter prompts have longer responses; None draws either. Ids are
    never the pad id except in padding, and the mask id (vocab - 1 unless given) is never decoded.
    """
    mask_id = vocab - 1 if mask_token_id is None else mask_token_id
    batch = draw(st.integers(1, max_batch))
    length = draw(st.integers(min_length, max_length))
    prompts = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    infill = draw(st.booleans())
    pad = draw(st.booleans()) if padded is None else padded
    generator = torch.Generator().manual_seed(draw(seeds()))
    allowed = torch.tensor([i for i in range(vocab) if i not in (pad_token_id, mask_id)])

    truth = allowed[torch.randint(len(allowed), (batch, length), generator=generator)]
    starts = torch.tensor([max(prompts)] * batch if pad else prompts)[:, None]
    positions = torch.arange(length)[None]
    masked = positions >= starts
    if infill:
        masked &= torch.rand(batch, length, generator=generator) < 0.7
    attention_mask = None
    if pad:
        real = positions >= starts - torch.tensor(prompts).clamp(min=1)[:, None]
        truth = torch.where(real, truth, pad_token_id)
        attention_mask = (real | masked).long()

    ids = torch.where(masked, mask_id, truth)
    calls = [ids]
    for _ in range(draw(st.integers(0, max_calls - 1))):
        counts = draw(st.lists(st.integers(0, max_per_step), min_size=batch, max_size=batch))
        ids = _decided(ids, truth, mask_id, counts, generator)
        calls.append(ids)
    return Trajectory(tuple(calls), mask_id, attention_mask)


def _decided(
    ids: Tensor, truth: Tensor, mask_id: int, counts: list[int], generator: torch.Generator
) -> Tensor:
    """A copy of ids [B, T] in which counts[b] random masked positions hold the truth."""
    ids = ids.clone()
    for row, answer, count in zip(ids, truth, counts, strict=True):
        open_positions = (row == mask_id).nonzero()[:, 0]
        order = torch.randperm(len(open_positions), generator=generator)
        chosen = open_positions[order[:count]]
        row[chosen] = answer[chosen]
    return ids


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
    exact = twin(ids, **inputs)
    error = (logits.double() - exact).abs().max().item()
    floor = FLOOR_ULPS * torch.finfo(logits.dtype).eps * exact.abs().max().item()
    return ERROR_MULTIPLE * error + floor
