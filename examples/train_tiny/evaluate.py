"""Decode retrieval questions as the model will be used, and count the values that come out.

    python -m examples.train_tiny.evaluate MODEL_FOLDER --data build/train_tiny

The response starts as masks and is decoded block by block. A call decodes one token a sequence,
or every token of the block that is more probable than a threshold and always the best one. Every
call computes the whole sequence: what is measured is the model, not a cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from examples.train_tiny import tasks
from examples.train_tiny.ladder import DECODE_BLOCK
from examples.train_tiny.layout import block_causal_mask
from examples.train_tiny.prepare import MASK
from examples.train_tiny.tasks import Batch, Corpus

LENGTHS = (192, 512, 1024, 2048)
THRESHOLDS = (None, 0.9)
_RESPONSE, _QUESTIONS = 64, 4


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the evaluation."""

    length: int
    kind: str
    threshold: float | None
    examples: int
    accuracy: float
    """Share of the values asked for that the responses state with their key."""
    tokens_per_call: float
    seconds: float


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Tensor,
    response: int,
    *,
    block: int = DECODE_BLOCK,
    threshold: float | None = None,
    block_causal: bool,
) -> tuple[Tensor, float]:
    """Decode `response` tokens after each prompt.

    prompts [batch, prompt] int64; with block_causal the prompt's length is a multiple of `block`,
    and tokens read their own and earlier blocks only. Returns [batch, prompt + response], and the
    tokens that a call decoded on average.
    """
    batch, start = prompts.shape
    ids = torch.cat([prompts, prompts.new_full((batch, response), MASK)], dim=1)
    mask = None
    if block_causal:
        mask = block_causal_mask(ids.shape[1], block).to(ids.device)
    calls = 0.0
    for first in range(start, ids.shape[1], block):
        stop = first + block
        while (left := ids[:, first:stop] == MASK).any():
            if mask is None:
                hidden = model.model(ids)[0]
            else:
                hidden = model.model(ids[:, :stop], mask[:, :, :stop, :stop])[0]
            logits = model.lm_head(hidden[:, first:stop]).float()
            logits[:, :, MASK] = -torch.inf
            probability, token = logits.softmax(-1).max(-1)
            score = probability.masked_fill(~left, -1)
            chosen = torch.zeros_like(left).scatter(1, score.argmax(1, keepdim=True), True)
            if threshold is not None:
                chosen |= score > threshold
            chosen &= left
            ids[:, first:stop] = torch.where(chosen, token, ids[:, first:stop])
            calls += left.any(1).sum().item()  # a finished sequence needs no further calls
    return ids, batch * response / calls


def stated(response: Tensor, statements: Tensor) -> Tensor:
    """Whether each response holds each statement somewhere: [batch, questions] bool.

    response [batch, tokens]; statements [batch, questions, width].
    """
    windows = response.unfold(1, statements.shape[-1], 1)
    return (windows[:, None] == statements[:, :, None]).all(-1).any(-1)


def examples(corpus: Corpus, count: int, length: int, kind: str, seed: int) -> Batch:
    """Questions whose number of facts varies."""
    rng = np.random.default_rng((seed, length))
    groups = max(1, count // 8)
    sizes = [len(part) for part in np.array_split(np.arange(count), groups)]
    return Batch.join(
        [
            tasks.retrieval(
                corpus,
                rng,
                size,
                length,
                kind=kind,
                response=_RESPONSE,
                questions=_QUESTIONS,
            )
            for size in sizes
        ]
    )


def evaluate(
    model: PreTrainedModel,
    corpus: Corpus,
    *,
    count: int,
    seconds: float,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 1,
) -> Iterator[Row]:
    """Rows of the evaluation, shortest first, until `seconds` are used up."""
    device = next(model.parameters()).device
    block_causal = model.config.model_type == "qwen3"
    began = time.monotonic()
    for length in lengths:
        for kind in tasks.MOST_FACTS:
            batch = examples(corpus, count, length, kind, seed)
            ids = torch.from_numpy(batch.ids).to(device)
            start = length - _RESPONSE
            width = len(corpus.template("answer", digits=False).ids)
            said = ids[:, start : start + width * _QUESTIONS].view(count, _QUESTIONS, width)
            for threshold in THRESHOLDS:
                at = time.monotonic()
                if at - began > seconds:
                    return
                decoded, rate = decode(
                    model,
                    ids[:, :start],
                    _RESPONSE,
                    threshold=threshold,
                    block_causal=block_causal,
                )
                right = stated(decoded[:, start:], said).float().mean().item()
                spent = time.monotonic() - at
                yield Row(length, kind, threshold, count, right, rate, spent)


def report(
    model: PreTrainedModel,
    corpus: Corpus,
    out: Path,
    *,
    count: int,
    seconds: float,
    lengths: Sequence[int] = LENGTHS,
) -> list[Row]:
    """Print the evaluation as it goes, and keep what is done of it in out/evaluation.json."""
    rows: list[Row] = []
    print("length kind   rule       right  tokens/call  seconds", flush=True)
    for row in evaluate(model, corpus, count=count, seconds=seconds, lengths=lengths):
        rule = "one token" if row.threshold is None else f"over {row.threshold}"
        print(
            f"{row.length:6} {row.kind:6} {rule:9} {row.accuracy:6.1%} {row.tokens_per_call:12.2f} "
            f"{row.seconds:8.1f}",
            flush=True,
        )
        rows.append(row)
        (out / "evaluation.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def read_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """The model in `folder`: in bf16 on a GPU, in fp32 elsewhere."""
    kind = AutoConfig.from_pretrained(folder).model_type
    auto = AutoModelForCausalLM if kind == "qwen3" else AutoModelForMaskedLM
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return auto.from_pretrained(folder, dtype=dtype).to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("build/train_tiny"))
    parser.add_argument("--wording", choices=sorted(tasks.WORDINGS), default="plain")
    parser.add_argument("--examples", type=int, default=64, help="in each cell")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = Corpus(args.data, wording=args.wording)
    model = read_model(args.model, device)
    report(
        model,
        corpus,
        args.model,
        count=args.examples,
        seconds=args.seconds,
        lengths=args.lengths,
    )


if __name__ == "__main__":
    main()
