"""What ranks and a single process do alike: decode, and note every decision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import focus_compile
from focus_compile.decode import generate
from focus_compile.runtime.inspection import inspecting
from tests.block_diffusion.test_dispatch import OPTIONS as BLOCK_OPTIONS
from tests.block_diffusion.test_dispatch import at_least
from tests.block_diffusion.test_dispatch import decode as decode_blocks
from tests.block_diffusion.test_dispatch import prompts as block_prompts
from tests.block_diffusion.tiny import decoder
from tests.models.stock import MASK_TOKEN_ID, VOCAB, build_stock
from tests.runtime.tiny import OPTIONS

Decisions = list[tuple[Any, ...]]
LENGTH, RESPONSE = 16, 8
MOST_RANKS = 4
BY_FEATURE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUT = ("o_proj", "down_proj")


def split(model: nn.Module, *, embeddings: bool = True) -> nn.Module:
    """`model` over all ranks, its head and perhaps its embeddings as well."""
    plan: dict[str, ParallelStyle] = {}
    for name, _ in model.named_modules():
        last = name.rpartition(".")[2]
        if last in BY_FEATURE:
            plan[name] = ColwiseParallel()
        elif last in BY_INPUT:
            plan[name] = RowwiseParallel()
        elif last == "lm_head":
            plan[name] = ColwiseParallel(output_layouts=Replicate())
        elif embeddings and last == "embed_tokens":
            plan[name] = RowwiseParallel(input_layouts=Replicate())
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def stock(name: str, **options: Any) -> nn.Module:
    """A tiny stock model whose heads can be split over up to `MOST_RANKS`."""
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    return build_stock(name, **(sizes | options))


def prompts(batch: int = 1) -> Tensor:
    return torch.randint(
        1, VOCAB - 2, (batch, LENGTH), generator=torch.Generator().manual_seed(batch)
    )


def decode(model: nn.Module, batch: int, options: dict[str, Any]) -> tuple[Tensor, Decisions]:
    """The tokens of a whole decode, and of every call its program, rows, focus rows, sinks and kept
    key blocks."""
    chosen = {**OPTIONS, "mask_token_id": MASK_TOKEN_ID, "lowering": "eager", "strict": True}
    model = focus_compile.compile(model, **(chosen | options))
    with inspecting(_noting(seen := [])), torch.no_grad():
        made = generate(
            model, prompts(batch), gen_length=RESPONSE, block_length=4, mask_token_id=MASK_TOKEN_ID
        )
    return made.ids, seen


def _noting(seen: Decisions) -> Any:
    def note(record: Any, call: Any) -> None:
        blocks = {layer: kept.tolist() for layer, kept in call.blocks.items()}
        focus, sinks = (None if x is None else x.tolist() for x in (call.focus, call.sinks))
        facts = (record.program, record.rows, record.bucket, record.prompt_rows)
        seen.append((*facts, call.rows.tolist(), focus, sinks, blocks))

    return note


def decode_in_blocks(model: nn.Module, policy: str) -> tuple[Tensor, Decisions]:
    chosen = {**BLOCK_OPTIONS, "policy": policy, "lowering": "eager"}
    with inspecting(_noting(seen := [])):
        made = decode_blocks(
            focus_compile.compile(model, **chosen), block_prompts(2), 2, at_least(0.3)
        )
    return made, seen


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "focus-dllm": ("llama", 2, {}),
    "dual-cache": ("eurobert", 1, {"policy": "dual-cache"}),
    "adaptive": ("llama", 1, {"refresh": "adaptive", "refresh_rows": 0.3, "tolerance": 0.5}),
    "response": ("qwen3", 1, {"logits": "response", "merge_projections": True}),
}
"""Family, batch, options."""
BLOCK_CASES = ("focus-evict", "delayed-cache")


def decode_case(case: str, *, over_ranks: bool) -> tuple[Tensor, Decisions]:
    """One of `CASES` or `BLOCK_CASES`."""
    torch.compiler.reset()
    if case in BLOCK_CASES:
        model = decoder("qwen2", num_key_value_heads=2)
        return decode_in_blocks(split(model, embeddings=False) if over_ranks else model, case)
    family, batch, options = CASES[case]
    model = stock(family)
    return decode(split(model) if over_ranks else model, batch, options)


def decode_cases(cases: list[str]) -> dict[str, tuple[Tensor, Decisions]]:
    """Each of the cases over the ranks of this process."""
    return {case: decode_case(case, over_ranks=True) for case in cases}
