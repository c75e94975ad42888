"""Steps over a cache that is read only, against the model itself with the same keys masked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import focus_compile
from focus_compile.fallback import FocusWarning
from focus_compile.kernels.library import tapped
from tests.encoder_cache.models import VOCABULARY, Cache, Decoder

LAYERS, OWN, BLOCK = 5, 6, 4


def options(**more: Any) -> dict[str, Any]:
    return {"lowering": "eager", "key_block": BLOCK, "sink_tokens": 2, "strict": True, **more}


def ids_of(batch: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, OWN), generator=torch.Generator().manual_seed(seed))


def mask_of(kind: str, batch: int, places: int, filled: int, pad: int, form: str) -> Tensor | None:
    """Over the cache and the own tokens: padding before the first sequence, unfilled places."""
    if kind == "none":
        return None
    total = places + OWN
    seen = torch.ones(batch, 1, OWN, total, dtype=torch.bool)
    seen[0, ..., :pad] = False
    if form == "copy":
        seen[..., filled + OWN :] = False
    if kind == "bool":
        return seen
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


def run(compiled: Any, ids: Tensor, cache: Cache, mask: Tensor | None) -> tuple[Tensor, Any]:
    with torch.no_grad(), focus_compile.record() as history:
        out = compiled(ids, cache.keys, cache.values, cache.length, mask)
    return out, history[-1]


def exactly(model: Decoder, ids: Tensor, cache: Cache, mask: Tensor | None, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, cache.keys, cache.values, cache.length, mask, **more)


@settings(max_examples=10, deadline=None, phases=(Phase.generate,))
@given(
    form=st.sampled_from(["copy", "cat"]),
    kind=st.sampled_from(["none", "bool", "add"]),
    batch=st.integers(1, 3),
    places=st.integers(9, 40),
    part=st.floats(0.3, 1.0),
    pad=st.integers(0, 8),
    keep_ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    summary=st.sampled_from(["bound", "mean"]),
)
def test_a_step_attends_to_the_keys_that_it_chose(
    form: str, kind: str, batch: int, places: int, part: float, pad: int, keep_ratio: float,
    summary: str,
) -> None:  # fmt: skip
    torch.compiler.reset()
    filled = places if form == "cat" else max(1, int(places * part))
    cache, model = Cache.random(batch, [places] * LAYERS, filled), Decoder(LAYERS, form).eval()
    mask = mask_of(kind, batch, places, filled, min(pad, filled - 1), form)
    compiled = torch.compile(
        model, backend="focus", options=options(keep_ratio=keep_ratio, block_summary=summary)
    )
    first, entry = run(compiled, ids_of(batch, 0), cache, mask)
    assert entry.program == "refresh"
    assert torch.equal(first, exactly(model, ids_of(batch, 0), cache, mask))
    ids = ids_of(batch, 1)
    run(compiled, ids, cache, mask)  # checks the program
    chosen: list[tuple[str, Tensor]] = []

    def tap(name: str, _: tuple[Any, ...], result: Any) -> None:
        if name in ("select_blocks", "keep_blocks", "capture_sinks"):
            chosen.append((name, result.clone()))

    with tapped(tap):
        out, entry = run(compiled, ids, cache, mask)
    assert entry.program == "step"
    names = [name for name, _ in chosen]
    assert names[0] == "capture_sinks"
    assert len(names) == LAYERS - 1  # one layer is dense before it
    sinks = chosen[0][1]
    only: list[Tensor | None] = [None, None]
    only += [kept(blocks, sinks, filled, places) for _, blocks in chosen[1:]]
    same(out, exactly(model, ids, cache, mask, only=only))
    if keep_ratio == 1.0:
        same(out, exactly(model, ids, cache, mask))


def same(one: Tensor, other: Tensor) -> None:
    """Up to what joining two parts of the attention by a float32 log-sum-exp costs a layer."""
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def kept(blocks: Tensor, sinks: Tensor, filled: int, places: int) -> Tensor:
    """The keys of a sparse layer, bool [batch, 1, 1, places + OWN]."""
    seen = torch.zeros(blocks.shape[0], places + OWN, dtype=torch.bool)
    seen[:, filled // BLOCK * BLOCK :] = True
    for row, (own, extra) in enumerate(zip(blocks.tolist(), sinks.tolist(), strict=True)):
        for block in own:
            if block >= 0:
                seen[row, block * BLOCK : (block + 1) * BLOCK] = True
        seen[row, [place for place in extra if place >= 0]] = True
    return seen[:, None, None]


@pytest.fixture(name="case", params=["copy", "cat"])
def _case(request: pytest.FixtureRequest) -> tuple[Decoder, Any, Cache]:
    torch.compiler.reset()
    model = Decoder(LAYERS, request.param).eval()
    compiled = torch.compile(model, backend="focus", options=options(keep_ratio=1.0))
    return model, compiled, Cache.random(2, [24] * LAYERS, 24 if request.param == "cat" else 20)


def test_a_cache_that_was_written_is_summarised_anew(case: tuple[Decoder, Any, Cache]) -> None:
    model, compiled, cache = case
    for seed, why in enumerate(("first call", "the cache is as it was")):
        _, entry = run(compiled, ids_of(2, seed), cache, None)
        assert entry.why == why
    cache.keys[4][:, :, 5] += 1
    _, entry = run(compiled, ids_of(2, 2), cache, None)
    assert entry.why == "another cache, or it was written"
    version = cache.keys[4]._version
    cache.keys[4].data[:, :, BLOCK - 1] += 1  # as a captured graph writes: no version tells
    assert cache.keys[4]._version == version
    _, entry = run(compiled, ids_of(2, 3), cache, None)
    assert entry.why == "the cache holds something else"
    out, entry = run(compiled, ids_of(2, 4), cache, None)
    assert entry.program == "step"
    same(out, exactly(model, ids_of(2, 4), cache, None))


def test_another_length_or_cache_is_noticed() -> None:
    torch.compiler.reset()
    model = Decoder(LAYERS, "copy").eval()
    compiled = torch.compile(model, backend="focus", options=options(keep_ratio=0.5))
    cache, other = Cache.random(1, [24] * LAYERS, 18), Cache.random(1, [24] * LAYERS, 18, seed=1)
    run(compiled, ids_of(1, 0), cache, None)
    assert run(compiled, ids_of(1, 1), cache, None)[1].program == "step"
    cache.length = torch.tensor(22)
    assert run(compiled, ids_of(1, 1), cache, None)[1].program == "refresh"
    assert run(compiled, ids_of(1, 1), cache, None)[1].program == "step"
    out, entry = run(compiled, ids_of(1, 1), other, None)
    assert entry.program == "refresh"
    assert torch.equal(out, exactly(model, ids_of(1, 1), other, None))


@pytest.mark.parametrize(("refresh", "programs"), [("every-step", "rrrr"), (2, "rsrs")])
def test_refresh_says_how_often_a_call_is_exact(refresh: Any, programs: str) -> None:
    torch.compiler.reset()
    model = Decoder(LAYERS, "cat").eval()
    compiled = torch.compile(model, backend="focus", options=options(refresh=refresh))
    cache = Cache.random(1, [16] * LAYERS, 16)
    found = [run(compiled, ids_of(1, seed), cache, None)[1].program for seed in range(4)]
    assert "".join(name[0] for name in found) == programs


def test_layers_with_a_shorter_cache_stay_as_they_are() -> None:
    torch.compiler.reset()
    places = [8, 24, 8, 24, 24, 24]
    cache, model = Cache.random(1, places, 24), Decoder(6, "cat").eval()
    found = focus_compile.explain(
        model, ids_of(1, 0), cache.keys, cache.values, cache.length, None, quiet=True,
        **options(keep_ratio=0.25),
    )  # fmt: skip
    assert found.accepted
    (graph,) = found.to_dict()["graphs"]
    assert graph["exact_layers"] == 2
    assert [site["region"] for site in graph["sites"]] == [
        "dense-prefix", "sink-capture", "sparse-suffix", "sparse-suffix",
    ]  # fmt: skip
    assert "4 layers read the whole of it, 2 a part, exactly" in str(found)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"policy": "dual-cache"}, 'policy="dual-cache" chooses no keys of it'),
        ({"guard": 0.5}, "guard has no form for it"),
        ({"list_reuse": 2}, "list_reuse has no form for it"),
        ({"dense_layers": 4}, "5 of its layers read the whole cache"),
    ],
)
def test_what_has_no_form_is_told(more: dict[str, Any], why: str) -> None:
    torch.compiler.reset()
    model, cache = Decoder(LAYERS, "cat").eval(), Cache.random(1, [16] * LAYERS, 16)
    compiled = torch.compile(model, backend="focus", options=options(strict=False, **more))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out, entry = run(compiled, ids_of(1, 0), cache, None)
    assert torch.equal(out, exactly(model, ids_of(1, 0), cache, None))
    assert entry.program == "exact"
    (line,) = [str(w.message) for w in seen if issubclass(w.category, FocusWarning)]
    assert "attention reads a cache" in line
    assert why in line


@pytest.mark.parametrize("form", ["copy", "cat"])
def test_a_cache_that_fills_no_block_is_read_whole(form: str) -> None:
    torch.compiler.reset()
    model, cache = Decoder(LAYERS, form).eval(), Cache.random(1, [BLOCK - 1] * LAYERS, BLOCK - 1)
    compiled = torch.compile(model, backend="focus", options=options(strict=False))
    with pytest.warns(FocusWarning, match=r"its 3 keys fill no block of 4"):
        out, entry = run(compiled, ids_of(1, 0), cache, None)
    assert torch.equal(out, exactly(model, ids_of(1, 0), cache, None))
    assert entry.program == "exact"


@pytest.mark.parametrize("form", ["copy", "cat"])
def test_masks_of_heads_and_of_the_lowest_number(form: str) -> None:
    model, cache = Decoder(LAYERS, form).eval(), Cache.random(2, [24] * LAYERS, 24)
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(2, 4, OWN, 24 + OWN, generator=generator) < 0.7
    some[..., -1] = True
    lowest = torch.zeros(1, 1, OWN, 24 + OWN)
    lowest[..., :7] = torch.finfo(torch.float32).min
    own_only = torch.zeros(2, 1, 1, 24 + OWN, dtype=torch.bool)
    own_only[..., 24:] = True
    for mask in (some, lowest, own_only):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="focus", options=options(keep_ratio=1.0))
        for seed in range(3):
            out, entry = run(compiled, ids_of(2, seed), cache, mask)
            assert entry.program == ("step" if seed else "refresh")
            same(out, exactly(model, ids_of(2, seed), cache, mask))


def test_inductor_gives_the_same_for_every_length_of_the_cache() -> None:
    torch.compiler.reset()
    model = Decoder(3, "copy").eval()
    compiled = torch.compile(
        model, backend="focus", options=options(lowering="inductor", keep_ratio=1.0)
    )
    for places in (24, 33, 17):
        cache = Cache.random(2, [places] * 3, places - 5)
        mask = mask_of("bool", 2, places, places - 5, 3, "copy")
        for seed in range(2):
            out, entry = run(compiled, ids_of(2, seed), cache, mask)
            assert entry.program == ("step" if seed else "refresh")
            same(out, exactly(model, ids_of(2, seed), cache, mask))
