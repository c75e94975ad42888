"""Tokens a second of block diffusion by policy, at the shape of a real model on one device.

    python -m benchmarks.block_diffusion --json benchmarks/results/block_diffusion_h100.json
    python -m benchmarks.block_diffusion --device cpu --shape tiny --batches 1,4 --contexts 64

Arms: plain block diffusion, the delayed cache, and eviction (FOCUS, arXiv 2601.23278) always and
where it was measured to pay. All decode as many tokens a step of each sequence, drawn from one
distribution with the mean that the paper publishes (2 to 4 of 32), because random weights have no
yields of their own: these are compute ratios, and say nothing about answers. An arm that computed
fewer masked rows than were drawn decodes fewer, and pays with steps. Random weights have no order
of their own either: --order left decodes from the left, but for a jitter (as trained models do; the
bundled one decodes two tokens a step at 1.8 places among the masked with eviction and 6.0 without,
on average), --order any wherever the weights happen to be sure, which no trained model does and
costs eviction rows. The prompts are random, and no
sequence ends while it is timed. One compiled model serves all arms and batches of a cell's block
length and context; a generator has two slots at least, of which one stays idle at batch 1.
"""

from __future__ import annotations

import gc
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers.integrations.moe  # noqa: F401  (registers the product for the CPU)
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from focus_compile.block_diffusion.block_model import BlockModel
from focus_compile.block_diffusion.state import Listing
from focus_compile.decode import BatchGenerator, BlockStep
from focus_compile.demo import environment

MASK = 0
ARMS: dict[str, dict[str, Any]] = {
    "block diffusion": {"policy": "block-diffusion"},
    "delayed cache": {"policy": "delayed-cache"},
    "eviction": {"policy": "focus-evict", "evict_if_faster": False},
    "eviction with delayed commit": {
        "policy": "focus-evict", "evict_if_faster": False, "commit": "delayed",
    },
    "eviction where faster": {"policy": "focus-evict", "evict_if_faster": True},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "sdar-8b": {
        "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151936, "rope_theta": 1e6,
    },
    "llada2-mini": {
        "num_hidden_layers": 20, "hidden_size": 2048, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5120,
        "vocab_size": 157184, "rope_theta": 6e5, "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "mlp_only_layers": [0], "norm_topk_prob": True,
    },
    "tiny-moe": {
        "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 512,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "mlp_only_layers": [0], "norm_topk_prob": True,
    },
    "tiny": {
        "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 512,
    },
}  # fmt: skip

WARM = 48
"""Steps before those that are timed, enough to try both ways in sizes that occur often."""
PROFILED = 4
KINDS = {
    "attention": "_attend_share|_join_shares|ragged",
    "selection": "_score_kernel|_sum_kernel|_select_kernel|_compact_kernel",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitK",
}
"""Kernels by what their names contain."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=160)


@dataclass(frozen=True)
class Row:
    """One arm on one cell. listed, kept: rows of a step, on average; processed: rows past the cut
    for each decoded token (the paper's figure); ratio: tokens a second over the first arm's;
    warmup_s: to compile what is not compiled yet and capture `graphs` CUDA graphs; device_ms: of a
    step, by what its kernels do."""

    suite: str
    shape: str
    batch: int
    block: int
    context: int
    order: str
    arm: str
    tokens_s: float = 0.0
    step_ms: float = 0.0
    decoded: float = 0.0
    listed: float = 0.0
    kept: float = 0.0
    processed: float = 0.0
    evicting: float = 0.0
    ratio: float = 0.0
    steps: int = 0
    warmup_s: float = 0.0
    graphs: int = 0
    peak_gib: float | None = None
    device_ms: dict[str, float] = field(default_factory=dict)
    failed: str = ""


def build(shape: str, length: int, device: torch.device) -> nn.Module:
    """The stock class with random weights, without ever holding them in float32. Experts are
    `GroupedExperts`, because torch 2.11 cuts the graph at transformers' own."""
    options = SHAPES[shape] | {"max_position_embeddings": length, "tie_word_embeddings": False}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            if "num_experts" in options:
                model: nn.Module = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options))
            else:
                model = Qwen3ForCausalLM(Qwen3Config(**options))
    finally:
        torch.set_default_dtype(default)
    for module in list(model.modules()):
        if isinstance(getattr(module, "experts", None), nn.Module):
            module.experts = GroupedExperts(module.experts)
    return model.eval().requires_grad_(False)


class GroupedExperts(nn.Module):
    """Gated experts by grouped matrix products over rows in the order of their experts, as
    transformers' "grouped_mm" computes them. Takes over the weights of transformers' module."""

    def __init__(self, theirs: Any):
        super().__init__()
        self.gate_up_proj, self.down_proj = theirs.gate_up_proj, theirs.down_proj

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[tokens, hidden], experts and their weights [tokens, choices] to [tokens, hidden]."""
        choices = experts.shape[-1]
        chosen, order = experts.reshape(-1).sort()
        bins = chosen.int() if hidden.is_cuda else chosen.float()
        count = self.down_proj.shape[0]
        ends = torch.histc(bins, count, 0, count - 1).cumsum(0, dtype=torch.int32)
        rows = hidden[order // choices]
        product = grouped_mm if rows.is_cuda else torch.ops.transformers.grouped_mm_fallback
        gate, up = product(rows, self.gate_up_proj.mT, offs=ends).chunk(2, -1)
        rows = product(nn.functional.silu(gate) * up, self.down_proj.mT, offs=ends)
        rows = rows * weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return rows[back].view(hidden.shape[0], choices, -1).sum(1)


def drawn(batch: int, mean: float, device: torch.device, seed: int) -> Tensor:
    """Tokens to decode of each sequence, int64 [batch]: 1 + a geometric number."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch, generator=generator)
    more = (share.log() / torch.log(torch.tensor(1 - 1 / mean))).floor()
    return (1 + more.clamp(max=15)).long().to(device)


def all_drawn(batch: int, steps: int, mean: float, device: torch.device) -> list[Tensor]:
    """The yields of all steps of an arm."""
    return [drawn(batch, mean, device, seed) for seed in range(WARM + steps + PROFILED)]


def timed_steps(batch: int, block: int, mean: float) -> int:
    """Those of two blocks, as sequences that began together commit together; with few sequences
    those of more blocks, whose yields scatter."""
    return math.ceil(2 * block / mean) * math.ceil(16 / batch)


def room(steps: dict[int, int], block: int, mean: float) -> int:
    """Tokens that no sequence gets past with so many steps of each batch: all yields, and blocks in
    progress."""
    cpu = torch.device("cpu")
    drawn = (torch.stack(all_drawn(max(2, b), count, mean, cpu)) for b, count in steps.items())
    most = [int(counts.sum(0).max()) for counts in drawn]
    return (math.ceil(max(most) / block) + 3) * block


JITTER = 4.0
"""Mean of the exponential distribution, in positions, that jitters the order from the left."""


def _jitter(values: Tensor) -> Tensor:
    """Exponential numbers that look random but depend on the values alone, for CUDA graphs."""
    uniform = (values.double().abs() * 1e5).frac().clamp(1e-6, 1 - 1e-6)
    return -JITTER * uniform.log()


def rank_from_left(at_cut: Tensor, before: Tensor) -> Tensor:
    """Scores of the rows of a list that fall from left to right."""
    places = torch.arange(at_cut.shape[0], device=at_cut.device)
    return -(places + _jitter(at_cut - before)).float()


def decode_from_left(made: BatchGenerator) -> None:
    """Have a generator decode the leftmost rows first, whatever their logits say."""
    advance = made.state.advance

    def ordered(
        computed: Listing, scored: Listing, probability: Tensor, *rest: Any, **named: Any
    ) -> None:
        place = scored.index % made.block_length + _jitter(probability)
        advance(computed, scored, (1 / (1 + place)).float(), *rest, **named)

    object.__setattr__(made.state, "advance", ordered)


def fill(made: BatchGenerator, batch: int, context: int) -> None:
    """Submit `batch` prompts, with room for responses as long as fit, and admit them."""
    random = torch.Generator().manual_seed(0)
    tokens = made.max_length - context - made.block_length
    for _ in range(batch):
        made.submit(torch.randint(1, 500, (context,), generator=random), tokens)
    made.step()


def steps_of(made: BatchGenerator, yields: Sequence[Tensor]) -> list[BlockStep]:
    """Records of a step for each of the given yields."""
    assert made.decode_counts is not None
    for counts in yields:
        made.decode_counts.copy_(counts)
        finished = made.step()
        assert not finished, "give the sequences more room"
    return made.history[-len(yields) :]


def device_time(made: BatchGenerator, yields: Sequence[Tensor]) -> dict[str, float]:
    """Milliseconds of kernels in a step on average, by `KINDS`; empty without a GPU."""
    if made.state.tokens.device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps_of(made, yields)
    total = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        kind = next((k for k, words in KINDS.items() if re.search(words, event.key)), "other")
        total[kind] += event.self_device_time_total / 1e3 / len(yields)
    return total


def cell(
    compiled: BlockModel, shape: str, batch: int, context: int, steps: int, mean: float,
    arms: list[str], order: str,
) -> list[Row]:  # fmt: skip
    device, block = compiled.device, compiled.config.block_length
    found: list[Row] = []
    slots = max(2, batch)
    yields = all_drawn(slots, steps, mean, device)
    for arm in arms:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            made = BatchGenerator(
                compiled, block_length=block, max_length=compiled.max_length, max_batch=slots,
                rank=rank_from_left if order == "left" else torch.sub, **ARMS[arm],
            )  # fmt: skip
            if order == "left":
                decode_from_left(made)
            made.decode_counts = torch.ones(slots, dtype=torch.int64, device=device)
            begun = time.perf_counter()
            graphs = made.warmup()
            warmup = time.perf_counter() - begun
            fill(made, batch, context)
            filled = time.perf_counter() - begun - warmup
            steps_of(made, yields[:WARM])
            tried = time.perf_counter() - begun - warmup - filled
            console.print(f"{arm}: warmup {warmup:.1f}, prompts {filled:.1f}, steps {tried:.1f} s")
            seen = steps_of(made, yields[WARM : WARM + steps])
            on_device = device_time(made, yields[-PROFILED:])
        except torch.OutOfMemoryError as error:
            text = str(error).splitlines()[0][:120]
            found.append(Row("block", shape, batch, block, context, order, arm, failed=text))
            continue
        seconds = sum(step.milliseconds for step in seen) / 1e3
        decoded = sum(step.decoded for step in seen)
        kept = sum(step.kept for step in seen)
        rate = decoded / seconds
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        found.append(
            Row(
                "block", shape, batch, block, context, order, arm, rate,
                statistics.median(step.milliseconds for step in seen),
                decoded / len(seen),
                statistics.mean(step.listed for step in seen),
                kept / len(seen),
                kept / max(1, decoded),
                statistics.mean(step.evicting for step in seen),
                rate / found[0].tokens_s if found and found[0].tokens_s else 1.0,
                len(seen), warmup, graphs, peak, on_device,
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
    shape: Annotated[str, typer.Option(help="sdar-8b, llada2-mini, tiny or tiny-moe.")] = "sdar-8b",
    batches: Annotated[str, typer.Option(help="Sequences side by side.")] = "1,8,32,128,256",
    blocks: Annotated[str, typer.Option(help="Block lengths.")] = "32",
    contexts: Annotated[str, typer.Option(help="Prompt tokens.")] = "1024",
    arms: Annotated[str, typer.Option(help="Names of arms.")] = ",".join(ARMS),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Timed steps. [default: by batch and block]")
    ] = None,
    mean: Annotated[float, typer.Option(help="Tokens decoded per step and sequence.")] = 2.5,
    order: Annotated[str, typer.Option(help="left or any.")] = "left",
    lowering: str = "inductor",
    device: str = "cuda",
    merge_projections: bool = False,
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
            timed = {size: steps or timed_steps(size, block, mean) for size in sizes[0]}
            begun = time.perf_counter()
            made = BatchGenerator(
                model, block_length=block, max_batch=2, mask_token_id=MASK, lowering=lowering,
                max_length=context + room(timed, block, mean),
                merge_projections=merge_projections,
            )  # fmt: skip
            compiled = made.model
            del made
            console.print(f"captured in {time.perf_counter() - begun:.1f} s")
            for batch in sizes[0]:
                named = arms.split(",")
                rows += cell(compiled, shape, batch, context, timed[batch], mean, named, order)
                if json_file is not None:
                    result = {"environment": where, "mean": mean, "rows": [asdict(r) for r in rows]}
                    json_file.write_text(json.dumps(result, indent=2) + "\n")
    show(rows)


if __name__ == "__main__":
    app()
