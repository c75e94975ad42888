"""One recorded run and its page, for all tests of the folder."""

from __future__ import annotations

import pytest
import torch

import focus_compile
from focus_compile.backend import focus
from focus_compile.decode import generate
from focus_compile.records import Record
from focus_compile.report import html
from tests.compiled import shared_graphs
from tests.runtime.tiny import MASK, prompt, shared, tiny_model


class Named:
    """A model whose result has `.logits`."""

    def __init__(self, model: object) -> None:
        self.model = model

    def __call__(self, ids: torch.Tensor) -> object:
        return type("Output", (), {"logits": self.model(ids)})  # type: ignore[operator]


@pytest.fixture(scope="session")
def record() -> Record:
    """Twelve tokens decoded in three blocks; a text that a browser could take for markup."""
    with shared_graphs(recompile_limit=64):
        model = Named(shared(tiny_model()))
        with focus_compile.recording(attention=True) as run:
            found = generate(
                model, prompt(masks=0), gen_length=12, block_length=4, mask_token_id=MASK
            )
            run.output(found.ids, "<script>alert('&')</script>")
        focus.reset()  # type: ignore[attr-defined]
    tokens = [found.ids[0, 12:].tolist()]
    run.arm("dense", seconds=2.0, right=3, asked=4, tokens=tokens)
    run.arm("focus", seconds=0.5, right=3, asked=4, tokens=tokens)
    return run.record


@pytest.fixture(scope="session")
def page(record: Record) -> str:
    return html(record)
