"""Small model folders that transformers loads, with the bundled tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EuroBertConfig, EuroBertForMaskedLM, LlamaConfig, LlamaForCausalLM

from focus_compile import demo
from focus_compile.fallback import forget

_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in [*os.environ]:
        if name.startswith("FOCUS_COMPILE_"):
            monkeypatch.delenv(name)


def _save(folder: Path, model: Any, config: Any) -> Path:
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(demo.MODEL_PATH / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bidirectional model whose config names the mask."""
    config = EuroBertConfig(**_SIZES, mask_token_id=3)
    return _save(tmp_path_factory.mktemp("masked"), EuroBertForMaskedLM, config)


@pytest.fixture(scope="session")
def block_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder for blocks of 8 tokens; nothing but its tokenizer names the mask."""
    config = LlamaConfig(**_SIZES, block_length=8)
    return _save(tmp_path_factory.mktemp("block"), LlamaForCausalLM, config)
