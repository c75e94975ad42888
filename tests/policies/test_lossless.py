"""`policy="lossless"`: a step answers only where it is sure; all else is dense."""

from __future__ import annotations

from typing import Any

import torch

from focus_compile.runtime.trajectory_calls import SURE
from tests.compiled import compiled
from tests.runtime.test_quality_guard import decode
from tests.runtime.tiny import OPTIONS, prompt, tiny_model

LOSSLESS: dict[str, Any] = {key: OPTIONS[key] for key in ("mask_token_id", "block_length")} | {
    "policy": "lossless"
}


def test_an_unsure_model_is_answered_densely() -> None:
    for seed in range(4):
        model, ids = tiny_model(seed), prompt(masks=12, length=30, batch=1 + seed % 2, seed=seed)
        exact = compiled(model, **OPTIONS | {"policy": "exact"})
        expected, _ = decode(exact, ids)
        found, records = decode(compiled(model, **LOSSLESS), ids)
        assert torch.equal(found, expected)
        assert {record.program for record in records} == {"refresh"}
        assert any(
            record.why.startswith("a step was sure of an answer by 0.") for record in records
        )


def test_a_sure_model_is_answered_by_steps() -> None:
    model, ids = tiny_model(), prompt(masks=12, length=30)
    with torch.no_grad():
        model.head.decoder.weight.mul_(300)
    _, records = decode(compiled(model, **LOSSLESS), ids)
    assert [r.program for r in records].count("step") > 4
    for record in records:
        if record.why.startswith("a step was sure"):
            assert float(record.why.split("by ")[1].split()[0]) <= SURE
            assert record.rows > ids.numel()
