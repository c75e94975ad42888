"""A masked-diffusion language model small enough to ship, and the retrieval task it has learnt.

The model is a stock `transformers` class (`EuroBertForMaskedLM`) with weights from
`focus_compile/demo/tiny_dllm`, whose README is its model card.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODEL_PATH = Path(__file__).parent / "tiny_dllm"
"""Folder with the weights, tokenizer and texts; `from_pretrained` accepts it."""


def load_tokenizer() -> Any:
    """The bundled model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_PATH)


def load(dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The bundled model in eval mode and its tokenizer.

    dtype: element type of the weights; None means float32, the fastest one on most CPUs (the
    file itself holds bfloat16).
    """
    import torch
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(MODEL_PATH, dtype=dtype or torch.float32)
    return model.eval(), load_tokenizer()
