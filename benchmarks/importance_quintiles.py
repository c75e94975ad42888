"""Does importance foresee what is decoded? The bundled block model, layer by layer.

    python -m benchmarks.importance_quintiles --length 1024 --examples 16
    python -m benchmarks.importance_quintiles --plot-only

Plain block diffusion decodes the questions of the retrieval task, so nothing is evicted. Before
each step the masked tokens of the block are ranked by delta importance: what they get in layer l
less what they get in layer l - 1 (`focus_compile::importance`, from the model's own q and k).
Counted is the share of the tokens decoded in the step that are in the top fifth, for every l from 1
on. FOCUS (arXiv 2601.23278) found 52.6 to 61.7% at l = 1. Chance is a fifth, or a little more where
the masked tokens are no multiple of five.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from focus_compile.demo import block_arms, environment, retrieval
from focus_compile.kernels.importance.op import importance
from focus_compile.passes.block_causality import block_causal_mask

matplotlib.use("svg")
from matplotlib import pyplot as plt

RESULT = Path("benchmarks/results/importance_quintiles.json")
PLOT = Path("docs/images/importance_quintiles.svg")
PAPER = (0.526, 0.617)
FEWEST = 5
"""Masked tokens that have fifths."""
GEN_LENGTH = 64
RULES: dict[str, tuple[int | None, float]] = {
    "1 a step": (1, 1.0),
    "2 a step": (2, 1.0),
    "4 a step": (4, 1.0),
    "τ=.999": (None, 0.999),
}


@dataclass
class Recorder:
    """An attention function that keeps q and k of the last block's rows, layer by layer."""

    block: int
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
    ) -> Any:
        self.seen.append((query[:, :, -self.block :], key[:, :, -self.block :]))
        return sdpa_attention_forward(module, query, key, value, *rest, **named)

    def importances(self, masked: Tensor) -> list[Tensor]:
        """Of every layer, [batch, block], for the rows masked bool [batch, block]."""
        batch, block = masked.shape
        starts = torch.arange(batch + 1) * block
        found = []
        for q, k in self.seen:
            rows = [x.transpose(0, 1).flatten(1, 2) for x in (q, k)]
            scale = q.shape[-1] ** -0.5
            got = importance(rows[0], rows[1], masked.flatten(), starts, block, scale)
            found.append(got.view(batch, block))
        return found


@dataclass
class Tally:
    """What the decoded tokens of one rule were ranked."""

    layers: int
    decoded: int = 0
    chance: float = 0.0
    """Tokens that would be in the top fifth by chance."""
    top: list[int] = field(default_factory=list)
    """Tokens in the top fifth, by layer from 1 on."""

    def __post_init__(self) -> None:
        self.top = [0] * (self.layers - 1)

    def add(self, importances: Sequence[Tensor], masked: Tensor, decoded: Tensor) -> None:
        """One step: importances of every layer, masked and decoded bool, all [batch, block]."""
        count = masked.sum(1)
        some = (count >= FEWEST)[:, None]
        fifth = (count + 4) // 5
        counted = decoded & some
        self.decoded += int(counted.sum())
        self.chance += float((counted.sum(1) * fifth / count.clamp(min=1)).sum())
        for layer in range(1, self.layers):
            delta = (importances[layer] - importances[layer - 1]).masked_fill(~masked, -math.inf)
            place = delta.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            self.top[layer - 1] += int((counted & (place < fifth[:, None])).sum())

    def to_dict(self) -> dict[str, Any]:
        shares = [count / self.decoded for count in self.top]
        return {"decoded": self.decoded, "chance": self.chance / self.decoded, "top_fifth": shares}


@torch.no_grad()
def measure(
    model: Any, recorder: Recorder, prompts: Tensor, rule: tuple[int | None, float], tally: Tally
) -> None:
    """Decode responses block by block; the K/V of a finished block are those of one more pass."""
    count, threshold = rule
    block, mask_id = recorder.block, model.config.mask_token_id
    cache = DynamicCache()
    model(prompts, attention_mask=block_causal_mask(prompts.shape[1], block), past_key_values=cache)
    for first in range(prompts.shape[1], prompts.shape[1] + GEN_LENGTH, block):
        ids = prompts.new_full((len(prompts), block), mask_id)
        mask = torch.ones(1, 1, block, first + block, dtype=torch.bool)
        while (masked := ids == mask_id).any():
            recorder.seen.clear()
            logits = model(ids, attention_mask=mask, past_key_values=cache).logits.float()
            cache.crop(-block)
            logits[:, :, mask_id] = -math.inf
            probability, token = logits.softmax(-1).max(-1)
            score = probability.masked_fill(~masked, -1)
            place = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            chosen = (place < count) if count else (place == 0) | (score >= threshold)
            chosen &= masked
            tally.add(recorder.importances(masked), masked, chosen)
            ids = torch.where(chosen, token, ids)
        model(ids, attention_mask=mask, past_key_values=cache)


def plot(result: dict[str, Any], file: Path) -> None:
    """Shares by layer, one line a rule."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    axes.axhspan(*(100 * share for share in PAPER), color="0.9", label="FOCUS, SDAR-8B, layer 1")
    for rule, found in result["rules"].items():
        shares = [100 * share for share in found["top_fifth"]]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", markersize=4, label=rule)
    axes.axhline(20, color="0.5", linestyle="--", linewidth=1, label="chance")
    axes.set_xlabel("layer l of the difference l − (l − 1)")
    axes.set_ylabel("decoded tokens in the top fifth, %")
    axes.set_ylim(0, 100)
    axes.legend(fontsize="small", ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--examples", type=int, default=16, help="of each kind")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--plot-only", action="store_true", help="of the results there are")
    args = parser.parse_args()
    if not args.plot_only:
        model, tokenizer = block_arms.load()
        block = block_arms.block_length_of(model)
        recorder = Recorder(block)
        AttentionInterface.register("recording", recorder)
        model.set_attn_implementation("recording")
        asked = block_arms.BlockQuestions(
            length=args.length, gen_length=GEN_LENGTH, questions=args.questions, block_length=block
        )
        settings = {key: getattr(args, key) for key in ("length", "examples", "questions")}
        result: dict[str, Any] = {"rules": {}, "settings": settings | environment.describe()}
        for name, rule in RULES.items():
            begun = time.perf_counter()
            tally = Tally(model.config.num_hidden_layers)
            for kind in retrieval.KINDS:
                examples = asked.make(tokenizer, kind, args.examples)
                prompts = torch.tensor([example.prompt_ids for example in examples])
                measure(model, recorder, prompts, rule, tally)
            result["rules"][name] = tally.to_dict()
            args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            shares = " ".join(f"{share:.1%}" for share in result["rules"][name]["top_fifth"])
            print(f"{name}: {shares} ({time.perf_counter() - begun:.0f} s)", flush=True)
    plot(json.loads(args.json.read_text(encoding="utf-8")), args.plot)


if __name__ == "__main__":
    main()
