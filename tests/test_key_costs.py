"""Dense keys where choosing some costs more: measured, planned, printed, and left alone if not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import focus_compile
from focus_compile import analysis
from focus_compile.key_costs import KeyCosts, KeyShape, key_costs
from tests.compiled import compiled, run_call
from tests.models import build
from tests.models.spec import ModelSpec

SHAPE = KeyShape(
    batch=1, heads=4, kv_heads=2, head_dim=16, length=64, rows=8, key_block=8, kept=4, sinks=2,
    block_summary="bound", sparse=2, dtype=torch.float32, device=torch.device("cpu"),
)  # fmt: skip
OPTIONS = {"mask_token_id": 39, "block_length": 8, "key_block": 4, "dense_layers": 1}


def test_both_ways_are_measured() -> None:
    costs = key_costs(SHAPE)
    assert costs is not None
    assert costs.sparse > 0 < costs.dense
    assert (costs.length, costs.rows) == (64, 8)
    # Hundreds of times the keys, few kept: dense must lose whatever the machine.
    wide = key_costs(replace(SHAPE, length=1 << 16, key_block=1 << 13, kept=0, rows=32, sparse=20))
    assert wide is not None
    assert not wide.dense_wins
    assert "some in the sparse layers" in str(wide)


@pytest.mark.parametrize(("sparse", "dense", "wins"), [(20.0, 10.0, True), (10.0, 20.0, False)])
def test_the_plan_follows_and_says_so(
    monkeypatch: pytest.MonkeyPatch, sparse: float, dense: float, wins: bool
) -> None:
    asked: list[KeyShape] = []

    def measured(shape: KeyShape) -> KeyCosts:
        asked.append(shape)
        return KeyCosts(shape.length, shape.rows, sparse, dense)

    monkeypatch.setattr(analysis, "key_costs", measured)
    torch.compiler.reset()  # numbers that other models of this class had would be inputs
    model = build(ModelSpec(layers=4, heads=4, kv_heads=2), 3)
    ids = torch.randint(1, 38, (2, 48), generator=torch.Generator().manual_seed(0))
    ids[:, 32:] = 39
    told = str(focus_compile.explain(model, ids, quiet=True, dense_if_faster=True, **OPTIONS))
    assert ("all in every layer" in told) == wins
    assert ("sparse-suffix" in told) != wins
    [shape] = asked
    assert (shape.batch, shape.length, shape.heads, shape.kv_heads) == (2, 48, 4, 2)
    assert shape.kept == 6
    focus = compiled(model, dense_if_faster=True, **OPTIONS)
    run_call(focus, ids)
    ids = ids.clone()
    ids[:, 32] = 5
    _, record = run_call(focus, ids)
    assert record.program == "step"
    assert ("sparse-suffix" in record.keys) != wins


def test_nothing_is_measured_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, or where no layer is sparse."""

    def measured(shape: KeyShape) -> KeyCosts:
        raise AssertionError(shape)

    monkeypatch.setattr(analysis, "key_costs", measured)
    torch.compiler.reset()  # numbers that other models of this class had would be inputs
    model = build(ModelSpec(layers=4), 3)
    ids = torch.randint(1, 38, (1, 24))
    focus_compile.explain(model, ids, quiet=True, **OPTIONS)
    dual = OPTIONS | {"policy": "dual-cache", "dense_if_faster": True}
    focus_compile.explain(model, ids, quiet=True, **dual)
