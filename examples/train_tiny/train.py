"""Train a tiny diffusion LM up its ladder, for a given time, and then see it decode.

    python -m examples.train_tiny.train --model block --minutes 4 --out build/tiny-block
    python -m examples.train_tiny.train --model block --minutes 4 --out build/tiny-block-2 \
        --resume build/tiny-block

A stage ends when its share of values right, on examples never seen before, passes the stage's
threshold. `--out` gets model.safetensors every half minute, as a whole or not at all, with the
state to go on from in its header; and at the end evaluation.json. The folder is one that
transformers' `from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from examples.train_tiny import evaluate, models, tasks
from examples.train_tiny.ladder import LADDERS, Stage, Stream, Work
from examples.train_tiny.layout import Layout
from examples.train_tiny.tasks import Corpus

_WINDOW = 20  # steps between two looks at the accuracy
_WARM_UP = 100  # steps, from the start of a run
_SAVE_SECONDS = 30
_LEAST_RATE = 0.03  # of the learning rate, at the end of the decay
_COPIED = ("tokenizer.json", "tokenizer_config.json", "words.txt", "filler.txt")

_SUMS = ("loss", "weight", "value_loss", "value_right", "values", "repeat_right", "repeats")


@dataclass(slots=True)
class State:
    """What a run goes on from."""

    stage: str
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry a finished stage."""


def measure(
    model: PreTrainedModel, work: Work, mask: Tensor | None, positions: Tensor | None
) -> Tensor:
    """The sums named by `_SUMS`, fp32, over the predictions that count; loss has a gradient.

    mask and positions [1, rows] are those of the work's layout; None: the model's own.
    """
    hidden = model.model(work.ids, mask, position_ids=positions)[0]
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, work.rows))
    losses = functional.cross_entropy(logits.float(), work.targets, reduction="none")
    right = logits.detach().argmax(-1) == work.targets
    value, repeat = work.kinds == tasks.VALUE, work.kinds == tasks.REPEAT
    return torch.stack(
        [
            (losses * work.weights).sum(),
            work.weights.sum(),
            (losses.detach() * value).sum(),
            (right & value).sum(),
            value.sum(),
            (right & repeat).sum(),
            repeat.sum(),
        ]
    )


class Trainer:
    """One run: the model, its optimizer, and the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.began = time.monotonic()
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.corpus = Corpus(args.data, wording=args.wording, words=args.words)
        torch.manual_seed(args.seed)
        size = models.SIZES[args.size]
        model = models.build(args.model, size, vocabulary=self.corpus.vocabulary)
        ladder = LADDERS[args.ladder or args.model]
        self.state = State(ladder[0].name)
        if args.resume is not None:
            self._resume(models.load(model, args.resume))
        self.stages = self._choose(ladder)
        self.model = model.to(self.device).train()
        self.compiled = args.compile if args.compile is not None else self.device.type == "cuda"
        if self.compiled:
            torch._dynamo.config.recompile_limit = 64
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
        decayed = [weight for weight in self.model.parameters() if weight.dim() > 1]
        others = [weight for weight in self.model.parameters() if weight.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.reads: dict[Layout, tuple[Tensor, Tensor]] = {}
        self.steps = 0  # of this run
        self.saved = self.printed = time.monotonic()
        self.stopped = False

    @property
    def elapsed(self) -> float:
        """Seconds since the start of this run."""
        return time.monotonic() - self.began

    @property
    def training_seconds(self) -> float:
        """Seconds of this run that training may take; the rest is for the evaluation."""
        return 60 * self.args.minutes - self.args.eval_seconds

    def run(self) -> None:
        """Train, save, evaluate."""
        self._open()
        for stage in self.stages:
            if self._over():
                break
            self._climb(stage)
        self._save()
        if self.stopped or self.args.eval_seconds <= 0:
            return
        model = evaluate.read_model(self.args.out, self.device)
        left = 60 * self.args.minutes - self.elapsed
        count = 64 if self.device.type == "cuda" else 8
        evaluate.report(
            model,
            self.corpus,
            self.args.out,
            count=count,
            seconds=left,
            lengths=self.args.eval_lengths,
        )

    def _climb(self, stage: Stage) -> None:
        """Train on one stage until it is learnt or the time is over."""
        self.state.stage = stage.name
        sums = torch.zeros(len(_SUMS), device=self.device)
        shown = torch.zeros_like(sums)
        done, since, tokens = 0, time.monotonic(), 0
        for work in self._work(stage):
            sums += self._step(work)
            done += 1
            tokens += work.ids.numel()
            if done % _WINDOW and not self._over():
                continue
            shown += sums
            window = dict(zip(_SUMS, sums.tolist(), strict=True))  # waits for the device
            sums.zero_()
            over = self._over()
            accuracy = window["value_right"] / max(window["values"], 1)
            learnt = accuracy >= stage.threshold and done >= stage.least
            ended = learnt or (stage.most is not None and done >= stage.most)
            ended = ended and stage != self.stages[-1]
            if ended or over or time.monotonic() - self.printed >= self.args.print_seconds:
                rate = tokens / (time.monotonic() - since)
                self._print(stage, done, dict(zip(_SUMS, shown.tolist(), strict=True)), rate)
                shown.zero_()
                since, tokens = time.monotonic(), 0
            if ended:
                self._finish(stage, done, accuracy)
                return
            if time.monotonic() - self.saved >= _SAVE_SECONDS:
                self._save()
            if over:
                return

    def _step(self, work: Work) -> Tensor:
        """One update; the sums of its batch."""
        work = work.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * self._rate()
        try:
            sums = self._backward(work)
        except Exception as error:
            if not self.compiled:
                raise
            print(f"without torch.compile from here on: {str(error)[:300]}", flush=True)
            self.compiled = False
            torch._dynamo.reset()
            for layer in self.model.model.layers:
                layer._compiled_call_impl = None
            self.optimizer.zero_grad()
            sums = self._backward(work)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.state.steps += 1
        self.state.tokens += work.ids.numel()
        return sums

    def _backward(self, work: Work) -> Tensor:
        with self._precision():
            sums = measure(self.model, work, *self._reads(work.layout))
        (sums[0] / sums[1]).backward()
        return sums.detach()

    def _reads(self, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
        """A layout's mask and positions, as `measure` takes them."""
        own = layout.length if self.args.model == "bidir" else 1
        if layout.copies == 0 and layout.block == own:
            return None, None
        if layout not in self.reads:
            mask, positions = layout.mask(), layout.positions()[None]
            self.reads[layout] = (mask.to(self.device), positions.to(self.device))
        return self.reads[layout]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _rate(self) -> float:
        """The learning rate's factor now: up in the first steps, down in the last minutes."""
        left = max(0.0, self.training_seconds - self.elapsed)
        decay = 60 * self.args.decay_minutes
        down = max(_LEAST_RATE, left / decay) if left < decay else 1.0
        return min(1.0, (self.steps + 1) / _WARM_UP) * down

    def _over(self) -> bool:
        return self.stopped or self.elapsed >= self.training_seconds

    def _work(self, stage: Stage) -> Iterator[Work]:
        workers = self.args.workers
        if workers is None:
            workers = min(6, max(1, (os.cpu_count() or 1) - 2)) if self.device.type == "cuda" else 0
        stream = Stream(self.corpus, stage, self.args.seed + self.state.steps)
        loader: DataLoader[Work] = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=3 if workers else None,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="fork" if workers else None,
        )
        return iter(loader)

    def _print(self, stage: Stage, done: int, sums: dict[str, float], rate: float) -> None:
        values, repeats = max(sums["values"], 1), max(sums["repeats"], 1)
        print(
            f"{self.elapsed:5.0f}s step {self.state.steps:5} {stage.name:13} {done:5} "
            f"loss {sums['loss'] / max(sums['weight'], 1e-9):.3f} "
            f"value loss {sums['value_loss'] / values:.3f} "
            f"values {sums['value_right'] / values:6.1%} "
            f"repeats {sums['repeat_right'] / repeats:6.1%} "
            f"{rate / 1000:.0f}k tokens/s lr {self.args.lr * self._rate():.1e}",
            flush=True,
        )
        self.printed = time.monotonic()

    def _finish(self, stage: Stage, done: int, accuracy: float) -> None:
        """Go on to the next stage, and keep the model where the objective changes."""
        self.state.history.append(
            {
                "stage": stage.name,
                "steps": done,
                "accuracy": round(accuracy, 4),
                "seconds": round(self.state.seconds + self.elapsed, 1),
            }
        )
        following = self.stages[self.stages.index(stage) + 1]
        self.state.stage = following.name
        if following.objective != stage.objective:
            self._save(f"after-{stage.objective}.safetensors")
        self._save()

    def _save(self, name: str = "model.safetensors") -> None:
        state = {slot: getattr(self.state, slot) for slot in State.__slots__}
        state["seconds"] = round(self.state.seconds + self.elapsed, 1)
        models.save(self.model, self.args.out / name, state)
        (self.args.out / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        self.saved = time.monotonic()

    def _open(self) -> None:
        """Write what does not change in a run, and say what runs."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        models.save_config(self.model, self.args.out)
        for name in _COPIED:
            if (self.args.data / name).exists():
                shutil.copyfile(self.args.data / name, self.args.out / name)
        print(
            f"{type(self.model).__name__}, {models.parameters(self.model) / 1e6:.2f}M parameters, "
            f"{self.device}, torch {torch.__version__}; from step {self.state.steps}: "
            + " ".join(stage.name for stage in self.stages),
            flush=True,
        )

    def _resume(self, stored: dict[str, Any]) -> None:
        if stored:
            self.state = State(**stored)

    def _choose(self, ladder: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """The stages of this run: those asked for, else the ladder from where it was left."""
        names = [stage.name for stage in ladder]
        chosen = self.args.stages
        if chosen is None:
            at = names.index(self.state.stage) if self.state.stage in names else 0
            chosen = names[at:]
        if unknown := set(chosen) - set(names):
            raise SystemExit(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        stages = [ladder[names.index(name)] for name in chosen]
        if self.args.batch_tokens is not None:
            stages = [replace(stage, batch_tokens=self.args.batch_tokens) for stage in stages]
        return tuple(stages)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["block", "bidir"], required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of this run, all in all")
    parser.add_argument("--data", type=Path, default=Path("build/train_tiny"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="a checkpoint, or the folder of one")
    parser.add_argument("--ladder", choices=sorted(LADDERS), help="default: the model's own")
    parser.add_argument("--stages", type=lambda text: text.split(","), help="NAME,NAME,...")
    parser.add_argument("--eval-seconds", type=float, default=40, help="of the minutes; 0: none")
    parser.add_argument(
        "--eval-lengths", type=int, nargs="+", default=evaluate.LENGTHS, metavar="TOKENS"
    )
    parser.add_argument(
        "--decay-minutes",
        type=float,
        default=1.0,
        help="of training, at its end, in which the learning rate falls; 0 where a run will go on",
    )
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--wording", choices=sorted(tasks.WORDINGS), default="plain")
    parser.add_argument("--size", choices=sorted(models.SIZES), default="tiny")
    parser.add_argument("--words", type=int, help="use only so many words as keys and values")
    parser.add_argument("--batch-tokens", type=int, help="instead of what the stages say")
    parser.add_argument("--print-seconds", type=float, default=5)
    parser.add_argument("--workers", type=int, help="processes that make examples")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
    trainer = Trainer(arguments(given))

    def stop(*_: object) -> None:
        trainer.stopped = True

    signal.signal(signal.SIGTERM, stop)
    trainer.run()


if __name__ == "__main__":
    main()
