"""A denoising step of DiffusionGemma over its encoder's cache, by context length.

    python -m benchmarks.encoder_cache --contexts 32768,131072 --json FILE
    python -m benchmarks.encoder_cache --tiny --contexts 512 --device cpu

The stock decoder of the published sizes (30 layers of which 5 read the whole cache, 128 experts of
which each token meets 8, a canvas of 256), random weights and a random cache: milliseconds mean
work, not answers. Arms: Inductor, as the model's own `generate` compiles it, and focus at several
shares of the keys. A row is published only where all keys give Inductor's logits.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import focus_compile
from focus_compile.config import ENVIRONMENT_PREFIX
from focus_compile.demo import environment
from focus_compile.runtime.self_check import TOLERANCE, row_errors

PUBLISHED = {
    "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
    "head_dim": 256, "global_head_dim": 512, "sliding_window": 1024, "num_experts": 128,
    "top_k_experts": 8, "moe_intermediate_size": 704, "max_position_embeddings": 262144,
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 30,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_global_key_value_heads": 1,
    "head_dim": 16, "global_head_dim": 16, "sliding_window": 32, "num_experts": 4,
    "top_k_experts": 2, "moe_intermediate_size": 16, "max_position_embeddings": 262144,
}  # fmt: skip
CANVAS = 256
WARM = 5
BRANCH_ENDS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
BRANCH = 0.05
"""Of what a layer adds: with random weights more would amplify a rounding into other logits."""
KEY_SCALE = 0.1
"""Of the cache's random keys, so that attention is not all on one of them."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=120)


@dataclass(frozen=True)
class Row:
    """Of one arm at one length. keep_ratio None: no focus; keys: of the cache in a sparse layer;
    error: of its worst row of logits against Inductor's; agreement: of its most probable tokens."""

    model: str
    layers: int
    context: int
    arm: str
    keep_ratio: float | None
    step_ms: float
    keys: int
    error: float
    agreement: float
    first_s: float
    peak_gib: float | None


def decoder(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    """The stock model with random weights, in eval mode."""
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
        Gemma4VisionConfig,
    )

    kinds = ["full_attention" if at % 6 == 5 else "sliding_attention" for at in range(30)]
    text = DiffusionGemmaTextConfig(**sizes, layer_types=kinds[: sizes["num_hidden_layers"]])
    vision = Gemma4VisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS)
    config.dtype = dtype
    with torch.device("meta"):
        model: Any = DiffusionGemmaForBlockDiffusion._from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    _fill(model, device)
    model.set_experts_implementation("grouped_mm")
    return model.eval()


def _fill(model: Any, device: torch.device) -> None:
    """Random weights; those that the encoder shares with the decoder are made once, to fit."""
    model.tie_weights()
    torch.manual_seed(0)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                empty = torch.empty_like(parameter, device=device)
                made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.ones_like(buffer, device=device)
        module._is_hf_initialized = False
    model.initialize_weights()
    for name, parameter in model.named_parameters():
        if name.endswith(BRANCH_ENDS):
            parameter.data.fill_(BRANCH)


def inputs_for(model: Any, context: int) -> dict[str, Any]:
    """A static cache with `context` random keys, as after the encoder, and what else a denoising
    step is called with."""
    from transformers import StaticCache

    text, weight = model.config.text_config, model.lm_head.weight
    generator = torch.Generator(weight.device).manual_seed(context)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)

    cache: Any = StaticCache(config=text, max_cache_len=context + CANVAS)
    for layer, held in zip(model.model.decoder.layers, cache.layers, strict=False):
        attention = layer.self_attn
        width = attention.head_dim
        shape = (1, attention.k_proj.out_features // width, context, width)
        held.update(drawn(*shape) * KEY_SCALE, drawn(*shape))
    ids = torch.randint(3, text.vocab_size, (1, CANVAS), generator=generator, device=weight.device)
    masks = model.model.decoder.create_diffusion_decoder_attention_mask(
        config=model.config, inputs_embeds=ids[..., None], past_key_values=cache,
        decoder_attention_mask=torch.ones(1, context + CANVAS, dtype=torch.long, device=ids.device),
    )  # fmt: skip
    return {
        "decoder_input_ids": ids,
        "self_conditioning_logits": drawn(1, CANVAS, text.vocab_size).float(),
        "decoder_attention_mask": masks,
        "past_key_values": cache,
        "decoder_position_ids": torch.arange(context, context + CANVAS, device=ids.device)[None],
    }


def measure(
    step: Callable[..., Any], given: dict[str, Any], steps: int
) -> tuple[float, Tensor, float]:
    """Median milliseconds of a step, its logits, and the seconds until the first were there."""
    took, first = [], 0.0
    cuda = given["decoder_input_ids"].is_cuda
    for at in range(WARM + steps):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        logits = step(**given).logits
        if cuda:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
        first = first or took[0]
        if at < WARM + steps - 1:
            del logits
    return statistics.median(took[WARM:]) * 1e3, logits.clone(), first


def cell(model: Any, name: str, context: int, ratios: list[float], steps: int) -> Iterator[Row]:
    """Every arm at one length, Inductor first."""
    given = inputs_for(model, context)
    layers = model.config.text_config.num_hidden_layers
    cuda = given["decoder_input_ids"].is_cuda
    reference = None
    for keep_ratio in (None, *ratios):
        torch.compiler.reset()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        # torch.compile takes a mode or options, not both.
        settings = {"KEEP_RATIO": str(keep_ratio), "DENSE_IF_FASTER": "0", "STRICT": "1"}
        variables = {f"{ENVIRONMENT_PREFIX}{name}": value for name, value in settings.items()}
        with (
            mock.patch.dict(os.environ, variables),
            torch.no_grad(),
            focus_compile.record() as calls,
        ):
            backend = "inductor" if keep_ratio is None else "focus"
            step = torch.compile(
                model.forward, backend=backend, mode="reduce-overhead", fullgraph=True
            )
            took, logits, first = measure(step, given, steps)
        keys = context
        if keep_ratio is not None:
            programs = [call.program for call in calls]
            if programs != ["refresh"] + ["step"] * (len(programs) - 1):
                raise RuntimeError(f"these calls were no steps: {programs}")
            keys = calls[-1].keys["sparse-suffix"]
        reference = logits if reference is None else reference
        error = float(row_errors(logits, reference).max())
        if keep_ratio == 1.0 and error > TOLERANCE[model.dtype]:
            raise RuntimeError(f"with all keys the logits differ from Inductor's by {error:.2g}")
        agreement = float((logits.argmax(-1) == reference.argmax(-1)).float().mean())
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        arm = "inductor" if keep_ratio is None else f"focus, keep_ratio={keep_ratio:g}"
        yield Row(name, layers, context, arm, keep_ratio, took, keys, error, agreement, first, peak)


@app.command()
def main(
    contexts: str = "32768,131072",
    keep_ratios: Annotated[
        str, typer.Option(help="1 first: all keys, as Inductor has it.")
    ] = "1,.5,.25",
    tiny: Annotated[bool, typer.Option("--tiny", help="A small model, to try it.")] = False,
    layers: Annotated[int, typer.Option(help="Of the published 30; every sixth is full.")] = 30,
    steps: int = 20,
    device: str = "cuda",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time a denoising step."""
    at = torch.device(device)
    dtype = torch.bfloat16 if at.type == "cuda" else torch.float32
    sizes = (TINY if tiny else PUBLISHED) | {"num_hidden_layers": layers}
    model = decoder(sizes, at, dtype)
    name = "tiny" if tiny else "diffusion-gemma"
    table = Table("context", "arm", "step ms", "keys", "error", "same tokens", "first s", "GiB")
    rows: list[Row] = []
    ratios = [float(part) for part in keep_ratios.split(",")]
    for context in (int(part) for part in contexts.split(",")):
        for row in cell(model, name, context, ratios, steps):
            rows.append(row)
            console.print(row)
            table.add_row(
                str(row.context), row.arm, f"{row.step_ms:.2f}", str(row.keys), f"{row.error:.1e}",
                f"{row.agreement:.3f}", f"{row.first_s:.0f}",
                "-" if row.peak_gib is None else f"{row.peak_gib:.1f}",
            )  # fmt: skip
            if json_file is not None:
                json_file.write_text(json.dumps(_result(rows), indent=1) + "\n", encoding="utf-8")
    console.print(table)


def _result(rows: list[Row]) -> dict[str, Any]:
    return {
        "environment": environment.describe(),
        "weights": "random: times mean work, not answers",
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    app()
