"""Masked-diffusion language models small enough to ship, and the retrieval task they have learnt.

Both are stock `transformers` classes with weights from a folder here, whose README is the model
card: "masked" (`EuroBertForMaskedLM`, `tiny_dllm`) reads all of a text and its response, "block"
(`Qwen3ForCausalLM`, `tiny_block`) decodes blocks of 32 tokens one after another.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from focus_compile.errors import OptionError

if TYPE_CHECKING:
    import torch

MODEL_PATH = Path(__file__).parent / "tiny_dllm"
"""Folder with the weights, tokenizer and texts of "masked"; `from_pretrained` accepts it."""
MODELS = {"masked": MODEL_PATH, "block": Path(__file__).parent / "tiny_block"}
"""The folders of the bundled models."""


def model_path(name: str) -> Path:
    """The folder of the bundled model of that name; OptionError with the closest one."""
    if name not in MODELS:
        raise OptionError.unknown(name, MODELS, kind="bundled model")
    return MODELS[name]


def load_tokenizer(name: str = "masked") -> Any:
    """A bundled model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(name))


def load(name: str = "masked", *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A bundled model in eval mode and its tokenizer.

    name: one of `MODELS`. dtype: element type of the weights; None means float32, the fastest one
    on most CPUs (the files themselves hold bfloat16).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    classes = {"masked": AutoModelForMaskedLM, "block": AutoModelForCausalLM}
    tokenizer = load_tokenizer(name)
    model = classes[name].from_pretrained(MODELS[name], dtype=dtype or torch.float32)
    return model.eval(), tokenizer
