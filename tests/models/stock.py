"""Tiny stock transformers, with random weights large enough that attention matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 40
MASK_TOKEN_ID = VOCAB - 1
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
_DECODER = {"num_key_value_heads": 1, "use_cache": False, "is_causal": False}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}

# name -> (prefix of the config's class, model class, options beside the common ones)
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eurobert": (
        "EuroBert",
        "EuroBertForMaskedLM",
        {**_SPECIAL, "num_key_value_heads": 1, "mask_token_id": MASK_TOKEN_ID},
    ),
    "bert": ("Bert", "BertForMaskedLM", {}),
    "roberta": ("Roberta", "RobertaForMaskedLM", {}),
    "modernbert": (
        "ModernBert",
        "ModernBertForMaskedLM",
        {
            **_SPECIAL,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 16,
            "global_attn_every_n_layers": 3,
        },
    ),
    "llama": ("Llama", "LlamaForCausalLM", _DECODER),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeForCausalLM", {**_DECODER, **_EXPERTS, "head_dim": 16}),
    "qwen2_moe": (
        "Qwen2Moe",
        "Qwen2MoeForCausalLM",
        {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 24},
    ),
}
STOCK = tuple(_MODELS)


def build_stock(
    name: str,
    implementation: str = "sdpa",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """A tiny bidirectional stock model in eval mode, weights from `seed`.

    `implementation` is one of `IMPLEMENTATIONS`; `options` override the config
    (`is_causal=True` gives a decoder back its causal mask). One name and seed have the same
    weights under every implementation. The MoE's routing is discontinuous: no rounding bound
    holds where two experts nearly tie.
    """
    import transformers

    prefix, model_class, own = _MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**_COMMON, **own, **options})
    model = getattr(transformers, model_class)._from_config(
        config, attn_implementation=implementation
    )
    if name.endswith("_moe"):
        model.set_experts_implementation("batched_mm")  # grouped_mm knows no float64
    _draw(model, torch.Generator().manual_seed(seed))
    model.to(dtype).eval()
    return model


def _draw(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of unit gain (queries and keys 1.4), norms about one, embeddings of std 0.5."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = _scaled(name, noise, id(parameter) in embeddings)


def _scaled(name: str, noise: Tensor, embedding: bool) -> Tensor:
    if embedding:
        return 0.5 * noise
    if noise.ndim == 1:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise
    sharp = any(part in name for part in ("q_proj", "k_proj", "query", "key", "Wqkv"))
    return noise * (1.4 if sharp else 1.0) * noise.shape[-1] ** -0.5
