"""What benchmarks.decode measures by itself."""

from __future__ import annotations

import torch

from benchmarks.decode import guard_milliseconds
from benchmarks.suite.shapes import SHAPES, build


def test_the_guard_is_timed_on_a_call_that_continues() -> None:
    shape = SHAPES["tiny"]
    model = build(shape, torch.device("cpu"), torch.float32)
    ids = torch.full((1, 64), 5)
    ids[:, 32:] = shape.mask_token_id
    assert 0 < guard_milliseconds(model, ids, repeats=3) < 1000
