"""The test models are what they claim: spellings agree, mixers mix, near misses do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import (
    ATTENTIONS,
    CAUSALS,
    MIXER_PLACES,
    MIXERS,
    NEAR_MISSES,
    STOCK,
    UNMATCHED_ATTENTIONS,
    ModelSpec,
    RowWiseCore,
    build,
    build_stock,
    logits_of,
)
from tests.models.spec import IDS_NEAR_MISSES
from tests.strategies import (
    bound_from_float64,
    float64_twin,
    model_specs,
    respellings,
    seeds,
    trajectories,
)

VISIBLE = 1e-3
"""Logits have std 2; float32 rounding is below 1e-4, an effect of another token above this."""

quick = settings(max_examples=14, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_ids(batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    """Neither pads (0), separators (20) nor masks (39), [B, T]."""
    return torch.randint(1, 20, (batch, length), generator=torch.Generator().manual_seed(seed))


def without_attention(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.attention.core = RowWiseCore()
    return model


@torch.no_grad()
def influence(model: nn.Module, ids: Tensor, row: int) -> Tensor:
    """Largest change of each row's logits [B, T] when one id of sequence 0 changes."""
    other = ids.clone()
    other[0, row] = ids[0, row] % 19 + 1
    return (logits_of(model(other)) - logits_of(model(ids))).abs().amax(-1)


def mixing(model: nn.Module, ids: Tensor) -> float:
    """How much some row's logits change with another row's id."""
    worst = 0.0
    for row in (0, 4):
        changes = influence(model, ids, row)
        changes[0, row] = 0
        worst = max(worst, changes.max().item())
    return worst


@quick
@given(spec=model_specs(), trajectory=trajectories(padded=None), seed=seeds())
def test_every_spec_runs_on_every_call(spec, trajectory, seed):
    model = build(spec, seed)
    for ids in trajectory.calls:
        with torch.no_grad():
            logits = logits_of(model(ids, **trajectory.inputs))
        assert logits.shape == (*ids.shape, spec.vocab)
        assert logits.isfinite().all()
        assert logits.dtype == torch.float32


@quick
@given(spec=model_specs(), trajectory=trajectories(padded=None), seed=seeds(), data=st.data())
def test_spellings_of_one_function_agree(spec, trajectory, seed, data):
    other = data.draw(respellings(spec))
    first, second = build(spec, seed), build(other, seed)
    ids, inputs = trajectory.calls[-1], trajectory.inputs
    bound = bound_from_float64(first, float64_twin(first), ids, **inputs)
    with torch.no_grad():
        apart = logits_of(first(ids, **inputs)) - logits_of(second(ids, **inputs))
    assert apart.abs().max() <= bound


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mask_form", ["additive", "bool", "masked_fill"])
def test_every_attention_spelling_agrees_in_float64(attention, mask_form):
    spec = ModelSpec(padding=True, mask_form=mask_form, attention=attention)
    ids = random_ids()
    keep = torch.ones_like(ids)
    keep[0, :4] = 0
    sdpa = build(replace(spec, attention="sdpa", mask_form="additive"), dtype=torch.float64)
    expected = float64_twin(sdpa)(ids, attention_mask=keep)
    found = float64_twin(build(spec, dtype=torch.float64))(ids, attention_mask=keep)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert (expected - float64_twin(sdpa)(ids)).abs().max() > VISIBLE


@quick
@given(spec=model_specs(near_miss=None), seed=seeds())
def test_attention_matters(spec, seed):
    """A wrong set of keys must show in the logits, far above rounding."""
    model, ids = build(spec, seed), random_ids(seed=seed)
    changes = influence(model, ids, 4)
    assert changes[0].median() > 1e-2
    assert changes[1].max() == 0


@quick
@given(spec=model_specs(near_miss=None), seed=seeds(), data=st.data())
def test_near_misses_are_row_wise(spec, seed, data):
    miss = data.draw(st.sampled_from([m for m in NEAR_MISSES if m not in IDS_NEAR_MISSES]))
    model = without_attention(build(replace(spec, near_miss=miss), seed))
    changes = influence(model, random_ids(seed=seed), 4)
    assert changes[0, 4] > VISIBLE
    changes[0, 4] = 0
    assert changes.max() < 1e-4


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_near_misses_do_something(miss):
    ids = random_ids()
    ids[:, 2] = 20
    ids[:, 6:] = 39
    ids[0, :2] = 0
    plain, changed = build(ModelSpec(), 1), build(ModelSpec(near_miss=miss), 1)
    with torch.no_grad():
        difference = (logits_of(plain(ids)) - logits_of(changed(ids))).abs().max()
    assert difference > VISIBLE or miss == "dropout"


@pytest.mark.parametrize("place", MIXER_PLACES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_mix_outside_attention(mixer, place):
    if (mixer, place) == ("batch_mean", "flat"):
        pytest.skip("merged tokens have no batch")
    spec = ModelSpec(mixer=mixer, mixer_place=place, flatten=True)
    assert spec.refusal == "mixer"
    assert mixing(without_attention(build(spec)), random_ids()) > VISIBLE
    assert mixing(without_attention(build(replace(spec, mixer=None))), random_ids()) < 1e-5


@quick
@given(spec=model_specs(mixer=[m for m in MIXERS if m != "max"], near_miss=None), seed=seeds())
def test_generated_mixers_mix(spec, seed):
    """All but the maximum, which the changed row need not hold."""
    model = without_attention(build(spec, seed))
    ids = torch.cat([random_ids(seed=seed + i) for i in range(2)])
    assert mixing(model, ids) > 1e-4


@pytest.mark.parametrize("causal", CAUSALS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_causal_models_look_back_only(causal, attention):
    if causal == "is_causal" and attention != "sdpa":
        pytest.skip("is_causal is SDPA's")
    spec = ModelSpec(causal=causal, attention=attention)
    assert spec.refusal == "causal"
    changes = influence(build(spec), random_ids(), 4)[0]
    assert changes[:4].max() == 0
    assert changes[4:].min() > VISIBLE


@pytest.mark.parametrize("attention", UNMATCHED_ATTENTIONS)
def test_unmatched_attention_is_another_function(attention):
    spec, ids = ModelSpec(attention=attention), random_ids()
    assert spec.refusal == "attention"
    with torch.no_grad():
        difference = logits_of(build(spec)(ids)) - logits_of(build(ModelSpec())(ids))
    if attention == "manual_softmax":
        assert difference.abs().max() < 1e-4
    else:
        assert difference.abs().max() > VISIBLE


def test_one_seed_one_model():
    first, again, other = build(ModelSpec(), 3), build(ModelSpec(), 3), build(ModelSpec(), 4)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize(
    "impossible",
    [
        {"grouping": "enable_gqa", "attention": "matmul"},
        {"projection": "unbind"},
        {"causal": "is_causal", "padding": True},
        {"mixer": "roll", "mixer_place": "flat"},
        {"kv_heads": 3},
        {"norm": "batchnorm"},
    ],
)
def test_impossible_specs_raise(impossible):
    with pytest.raises(ValueError, match=r"\w"):
        ModelSpec(**impossible)


@quick
@given(trajectory=trajectories(padded=None))
def test_trajectories_only_decide(trajectory):
    mask_id = trajectory.mask_token_id
    for before, after in zip(trajectory.calls, trajectory.calls[1:], strict=False):
        changed = before != after
        assert (before[changed] == mask_id).all()
        assert (changed.sum(1) <= 3).all()
    for start, row in zip(trajectory.response_start, trajectory.calls[0], strict=True):
        assert (row[:start] != mask_id).all()
    if trajectory.attention_mask is not None:
        assert ((trajectory.calls[0] == 0) == (trajectory.attention_mask == 0)).all()
        assert trajectory.attention_mask.any(1).all()


def test_twin_is_not_rounded_by_float32_upcasts():
    """The error against the twin shrinks with the model's precision, hand-written norms or not."""
    ids = random_ids()
    for norm in ("layernorm", "rmsnorm"):
        spec = ModelSpec(norm=norm, attention="matmul", softmax="float32")
        model, wide = build(spec), build(spec, dtype=torch.float64)
        twin = float64_twin(model)
        assert twin(ids).dtype == torch.float64
        with torch.no_grad():
            errors = [(logits_of(m(ids)) - twin(ids)).abs().max().item() for m in (model, wide)]
        assert 1e-7 < errors[0] < 1e-4
        assert (twin(ids) - float64_twin(wide)(ids)).abs().max() < 1e-12
        assert bound_from_float64(model, twin, ids) < VISIBLE


@pytest.mark.parametrize("name", STOCK)
def test_stock_models_are_bidirectional_and_alike_in_every_implementation(name):
    ids = random_ids()
    eager, sdpa = build_stock(name, "eager"), build_stock(name, "sdpa")
    changes = influence(sdpa, ids, 4)
    assert changes[0].min() > VISIBLE
    assert changes[1].max() == 0
    bound = bound_from_float64(eager, float64_twin(eager), ids)
    assert bound < VISIBLE
    with torch.no_grad():
        assert (logits_of(eager(ids)) - logits_of(sdpa(ids))).abs().max() <= bound


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stock_flex_agrees():
    flex, eager, ids = build_stock("llama", "flex_attention"), build_stock("llama"), random_ids()
    bound = bound_from_float64(flex, float64_twin(flex), ids)
    with torch.no_grad():
        assert (logits_of(eager(ids)) - logits_of(flex(ids))).abs().max() <= bound
