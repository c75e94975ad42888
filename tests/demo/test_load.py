"""The bundled models are the stock classes, whole, in the type asked for."""

from __future__ import annotations

import pytest
import torch

from focus_compile import demo
from focus_compile.errors import OptionError

CLASSES = {"masked": "eurobert.modeling_eurobert", "block": "qwen3.modeling_qwen3"}
PARAMETERS = {"masked": 7_935_232, "block": 7_936_512}


@pytest.mark.parametrize("name", demo.MODELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load(name: str, dtype: torch.dtype | None) -> None:
    model, tokenizer = demo.load(name, dtype=dtype)
    assert type(model).__module__ == f"transformers.models.{CLASSES[name]}"
    assert not model.training
    assert model.dtype == (dtype or torch.float32)
    assert model.num_parameters() == PARAMETERS[name]
    assert model.config.mask_token_id == tokenizer.mask_token_id == 3


def test_the_masked_model_is_the_default() -> None:
    assert type(demo.load()[0]).__name__ == "EuroBertForMaskedLM"


def test_the_block_model_knows_its_blocks() -> None:
    assert demo.load("block")[0].config.block_length == 32


@pytest.mark.parametrize("name", demo.MODELS)
def test_weights_are_as_shipped(name: str) -> None:
    exact, _ = demo.load(name, dtype=torch.bfloat16)
    wide, _ = demo.load(name)
    for weight, shipped in zip(wide.parameters(), exact.parameters(), strict=True):
        assert torch.equal(weight, shipped.float())


def test_an_unknown_name() -> None:
    with pytest.raises(OptionError, match="did you mean 'block'"):
        demo.load("blocks")


@pytest.mark.parametrize("name", demo.MODELS)
def test_the_model_card_names_its_licences(name: str) -> None:
    card = (demo.model_path(name) / "README.md").read_text(encoding="utf-8")
    assert "public domain" in card
    assert "Apache-2.0" in card
    if name == "block":
        assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in card
        assert 'THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS"' in card
