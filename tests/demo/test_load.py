"""The bundled model is the stock class, whole, in the type asked for."""

from __future__ import annotations

import pytest
import torch

from focus_compile import demo


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load(dtype: torch.dtype | None) -> None:
    model, tokenizer = demo.load(dtype)
    assert type(model).__module__ == "transformers.models.eurobert.modeling_eurobert"
    assert not model.training
    assert model.dtype == (dtype or torch.float32)
    assert model.num_parameters() == 7_935_232
    assert model.config.mask_token_id == tokenizer.mask_token_id == 3


def test_weights_are_as_shipped() -> None:
    exact, _ = demo.load(torch.bfloat16)
    wide, _ = demo.load()
    for name, weight in wide.state_dict().items():
        assert torch.equal(weight, exact.state_dict()[name].float()), name
