"""The two tiny models: stock classes of transformers, and how they are written and read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    EuroBertConfig,
    EuroBertForMaskedLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples.train_tiny.prepare import BOS, EOS, MASK, PAD, VOCABULARY

Family = Literal["block", "bidir"]

TIED = "lm_head.weight"
"""The head is the embedding, and not written."""


@dataclass(frozen=True, slots=True)
class Size:
    """The sizes of a model."""

    layers: int = 10
    hidden: int = 256
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 64
    intermediate: int = 640


SIZES = {
    "tiny": Size(),
    "smoke": Size(4, 64, 2, 1, 32, 160),
    "test": Size(2, 32, 2, 1, 16, 48),
}


def build(family: Family, size: Size, *, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A model with random weights in fp32."""
    shared: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "mask_token_id": MASK,
        "attn_implementation": "sdpa",
    }
    if family == "block":
        return Qwen3ForCausalLM(Qwen3Config(**shared, use_cache=False, block_length=32))
    return EuroBertForMaskedLM(EuroBertConfig(**shared))


def parameters(model: PreTrainedModel) -> int:
    """Weights of the model, the tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save(model: PreTrainedModel, file: Path, state: dict[str, Any]) -> None:
    """Write the weights in bf16, with `state` in the file's header; a reader sees old or new."""
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != TIED
    }
    part = file.with_suffix(".part")
    save_file(weights, part, metadata={"format": "pt", "state": json.dumps(state)})
    os.replace(part, file)


def load(model: PreTrainedModel, source: Path) -> dict[str, Any]:
    """Read weights that `save` wrote, from a file or from model.safetensors of a folder."""
    file = source / "model.safetensors" if source.is_dir() else source
    with safe_open(file, framework="pt") as stored:
        state: dict[str, Any] = json.loads((stored.metadata() or {}).get("state", "{}"))
        weights = {name: stored.get_tensor(name) for name in stored.keys()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {TIED}:
        raise ValueError(f"{file} holds another model: {missing=}, {unexpected=}")
    return state


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json, so that transformers' `from_pretrained` reads the folder."""
    config = model.config
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
