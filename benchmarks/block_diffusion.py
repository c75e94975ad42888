"""Tokens a second of block diffusion by policy, at the shape of a real model on one device.

    python -m benchmarks.block_diffusion --json benchmarks/results/block_diffusion_h100.json
    python -m benchmarks.block_diffusion --device cpu --shape tiny --batches 1,4 --contexts 64

Arms: plain block diffusion, the delayed cache, and eviction (FOCUS, arXiv 2601.23278) always and
where it was measured to pay. All decode as many tokens a step of each sequence, drawn from one
distribution with the mean that the paper publishes (2 to 4 of 32), because random weights have no
yields of their own: these are compute ratios, and say nothing about answers. An arm that computed
fewer masked rows than were drawn decodes fewer, and pays with steps. The prompts are random; a
sequence that ends is followed by the next one, and times are taken while all slots are full.
"""

from __future__ import annotations

import gc
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from focus_compile.decode import BatchGenerator
from focus_compile.demo import environment

MASK = 0
ARMS: dict[str, dict[str, Any]] = {
    "block diffusion": {"policy": "block-diffusion"},
    "delayed cache": {"policy": "delayed-cache"},
    "eviction": {"policy": "focus-evict", "evict_if_faster": False},
    "eviction where faster": {"policy": "focus-evict", "evict_if_faster": True},
}
SHAPES: dict[str, dict[str, Any]] = {
    "sdar-8b": {
        "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151936, "rope_theta": 1e6,
    },
    "tiny": {
        "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 512,
    },
}  # fmt: skip

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=160)


@dataclass(frozen=True)
class Row:
    """One arm on one cell. listed, kept: rows of a step, on average; processed: rows past the cut
    for each decoded token (the paper's figure); ratio: tokens a second over the first arm's."""

    suite: str
    shape: str
    batch: int
    block: int
    context: int
    arm: str
    tokens_s: float
    step_ms: float
    decoded: float
    listed: float
    kept: float
    processed: float
    evicting: float
    ratio: float
    compile_s: float
    peak_gib: float | None
    failed: str = ""


def build(shape: str, length: int, device: torch.device) -> nn.Module:
    """The stock class with random weights, without ever holding them in float32."""
    options = SHAPES[shape] | {"max_position_embeddings": length, "tie_word_embeddings": False}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen3ForCausalLM(Qwen3Config(**options))
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def drawn(batch: int, mean: float, device: torch.device, seed: int) -> torch.Tensor:
    """Tokens to decode of each sequence, int64 [batch]: 1 + a geometric number."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch, generator=generator)
    more = (share.log() / torch.log(torch.tensor(1 - 1 / mean))).floor()
    return (1 + more.clamp(max=15)).long().to(device)


def measure(made: BatchGenerator, batch: int, context: int, steps: int, mean: float) -> list[Any]:
    """Records of `steps` steps with all slots busy, after as many to warm up."""
    random = torch.Generator().manual_seed(0)
    device = made.state.tokens.device
    made.decode_counts = torch.ones(batch, dtype=torch.int64, device=device)
    room = made.max_length - context - made.block_length
    for _ in range(batch):
        prompt = torch.randint(1, 500, (context,), generator=random)
        made.submit(prompt, room)
    made.step()  # admits all, which is not a step's time
    for step in range(2 * steps):
        made.decode_counts.copy_(drawn(batch, mean, device, step))
        finished = made.step()
        assert not finished, "give the sequences more room"
    return made.history[-steps:]


def cell(
    model: nn.Module, shape: str, batch: int, block: int, context: int, steps: int, mean: float,
    arms: list[str], lowering: str,
) -> list[Row]:  # fmt: skip
    device = next(model.parameters()).device
    length = context + block * (2 + round(4 * steps * mean / block))
    found: list[Row] = []
    for arm in arms:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            made = BatchGenerator(
                model, block_length=block, max_length=length, max_batch=batch,
                mask_token_id=MASK, lowering=lowering, merge_projections=batch * block <= 256,
                **ARMS[arm],
            )  # fmt: skip
            steps_seen = measure(made, batch, context, steps, mean)
        except torch.OutOfMemoryError as error:
            text = str(error).splitlines()[0][:120]
            found.append(
                Row("block", shape, batch, block, context, arm, *[0.0] * 8, 0.0, None, text)
            )
            continue
        seconds = sum(step.milliseconds for step in steps_seen) / 1e3
        decoded = sum(step.decoded for step in steps_seen)
        rate = decoded / seconds
        kept = sum(step.kept for step in steps_seen)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        found.append(
            Row(
                "block", shape, batch, block, context, arm, rate,
                statistics.median(step.milliseconds for step in steps_seen),
                decoded / len(steps_seen),
                statistics.mean(step.listed for step in steps_seen),
                kept / len(steps_seen),
                kept / max(1, decoded),
                statistics.mean(step.evicting for step in steps_seen),
                rate / found[0].tokens_s if found and found[0].tokens_s else 1.0,
                made.programs.compile_seconds, peak,
            )
        )  # fmt: skip
        console.print(found[-1])
        del made
    return found


def show(rows: list[Row]) -> None:
    table = Table(title="block diffusion: random weights, drawn yields")
    for name in Row.__dataclass_fields__:
        table.add_column(name, justify="right")
    for row in rows:
        values = asdict(row).values()
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


@app.command()
def main(
    shape: Annotated[str, typer.Option(help="sdar-8b or tiny.")] = "sdar-8b",
    batches: Annotated[str, typer.Option(help="Sequences side by side.")] = "1,8,32,128,256",
    blocks: Annotated[str, typer.Option(help="Block lengths.")] = "32",
    contexts: Annotated[str, typer.Option(help="Prompt tokens.")] = "1024",
    arms: Annotated[str, typer.Option(help="Names of arms.")] = ",".join(ARMS),
    steps: Annotated[int, typer.Option(help="Timed steps.")] = 24,
    mean: Annotated[float, typer.Option(help="Tokens decoded per step and sequence.")] = 2.5,
    lowering: str = "inductor",
    device: str = "cuda",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure every cell by every arm; results are written after each cell."""
    torch.manual_seed(0)
    sizes = [[int(part) for part in text.split(",")] for text in (batches, blocks, contexts)]
    model = build(shape, max(sizes[2]) + 4096, torch.device(device))
    rows: list[Row] = []
    on_gpu = torch.device(device).type == "cuda"
    where = environment.describe() | ({"device": torch.cuda.get_device_name()} if on_gpu else {})
    for context in sizes[2]:
        for block in sizes[1]:
            for batch in sizes[0]:
                named = arms.split(",")
                rows += cell(model, shape, batch, block, context, steps, mean, named, lowering)
                if json_file is not None:
                    result = {"environment": where, "mean": mean, "rows": [asdict(r) for r in rows]}
                    json_file.write_text(json.dumps(result, indent=2) + "\n")
    show(rows)


if __name__ == "__main__":
    app()
