"""On a CUDA device: steps over a cache through Inductor and as CUDA graphs, against the CPU's.

pytest -m gpu tests/encoder_cache/test_gpu.py
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.encoder_cache.models import Cache, Decoder
from tests.encoder_cache.test_step import exactly, ids_of, mask_of, options, run

pytestmark = pytest.mark.gpu
PLACES, FILLED = 96, 70


@pytest.mark.parametrize("form", ["copy", "cat"])
@pytest.mark.parametrize("kind", ["none", "bool", "add"])
@pytest.mark.parametrize("keep_ratio", [0.5, 1.0])
def test_steps_are_those_of_the_cpu(form: str, kind: str, keep_ratio: float) -> None:
    torch.compiler.reset()
    filled = PLACES if form == "cat" else FILLED
    model, cache = Decoder(4, form).eval(), Cache.random(2, [PLACES] * 4, filled)
    mask = mask_of(kind, 2, PLACES, filled, 9, form)
    chosen = options(keep_ratio=keep_ratio, key_block=8, dense_if_faster=False)
    ours = torch.compile(model, backend="focus", options=chosen)
    there = torch.compile(
        copy.deepcopy(model).cuda(), backend="focus", options=chosen | {"lowering": "inductor"}
    )
    moved, moved_mask = cache.to("cuda"), None if mask is None else mask.cuda()
    for seed in range(4):
        ids = ids_of(2, seed)
        expected, entry = run(ours, ids, cache, mask)
        found, other = run(there, ids.cuda(), moved, moved_mask)
        assert entry.program == other.program == ("step" if seed else "refresh")
        torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_a_mode_captures_the_step_as_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model's own generate compiles it; torch.compile takes a mode or options."""
    for name, value in options(keep_ratio=1.0, key_block=8, dense_if_faster=0).items():
        monkeypatch.setenv(f"FOCUS_COMPILE_{name.upper()}", str(value))
    monkeypatch.setenv("FOCUS_COMPILE_LOWERING", "inductor")
    torch.compiler.reset()
    model, cache = Decoder(4, "copy").eval().cuda(), Cache.random(2, [PLACES] * 4, FILLED)
    there, compiled = (
        cache.to("cuda"),
        torch.compile(model, backend="focus", mode="reduce-overhead", fullgraph=True),
    )
    for tensor in (*there.keys, *there.values):
        torch._dynamo.mark_static_address(tensor)
    for seed in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        ids = ids_of(2, seed).cuda()
        found, entry = run(compiled, ids, there, None)
        assert entry.program == ("step" if seed else "refresh")
        expected = exactly(model, ids, there, None)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.compiler.cudagraph_mark_step_begin()
        run(compiled, ids_of(2, 9).cuda(), there, None)
    assert any("cudaGraphLaunch" in event.name for event in profiler.events())
