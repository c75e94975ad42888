"""When do the heuristics of Focus-dLLM hold? Studies on the bundled model, for docs/findings.md.

    python -m benchmarks.findings                    every study, one after another
    python -m benchmarks.findings --study recall --study sinks
    python -m benchmarks.findings --plot-only

recall: how many of the positions decoded next were predicted, call by call. rows: focus rows by
confidence against random ones. alpha: the share of key blocks at which answers break. width: the
paper's rho and w. reuse: for how many steps chosen keys serve. scaling: 512 to 8,192 tokens. sinks:
whether layers and steps agree on the positions that draw attention. Op by op: none of it is a
timing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import focus_compile
from benchmarks import findings_plots
from focus_compile import demo
from focus_compile.config import FocusConfig
from focus_compile.decode.sampler import generate
from focus_compile.demo import environment, retrieval
from focus_compile.demo.arms import Arm
from focus_compile.policies.base import Selection, StepView
from focus_compile.policies.focus_dllm import FocusDllm
from focus_compile.runtime.inspection import CallInspection, inspecting
from focus_compile.runtime.record import StepRecord

RESULT = Path("benchmarks/results/findings.json")
GEN_LENGTH, BLOCK_LENGTH, QUESTIONS = 64, 32, 4
TOKENS_AT_ONCE = 8192
"""Positions decoded side by side, at most."""
LONGEST_DENSE = 1024
"""Tokens up to which responses are compared with dense decoding, which takes the longest."""
MEAN = {"block_summary": "mean", "key_block": 16}


@dataclass(frozen=True)
class Setting:
    """One way of decoding, and how much is asked."""

    study: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    length: int = 1024
    per_step: int = 1
    """Tokens decoded a call."""
    random_rows: bool = False
    examples: int = 16


@dataclass(frozen=True)
class Cell:
    """A setting on one kind of question."""

    study: str
    name: str
    kind: str
    length: int
    per_step: int
    options: dict[str, Any]
    random_rows: bool
    asked: int
    right: int
    recall: list[float | None]
    """Of each call, mean over the sequences; None where none could be judged."""
    rows: float
    """Rows that a step computes, mean over steps and sequences."""
    keys: float
    """Keys that a sparse layer reads of each sequence, mean over the steps."""
    agreement: float | None
    """Share of the response's tokens that are those of dense decoding; None: dense was not run."""

    @property
    def mean_recall(self) -> float:
        known = [value for value in self.recall if value is not None]
        return sum(known) / len(known) if known else float("nan")


@dataclass(frozen=True)
class SinkAgreement:
    """Overlap (Jaccard) of the 16 prompt positions that draw the most attention, on one kind."""

    kind: str
    length: int
    layers: list[list[float]]
    """Between layers in the same call, mean over calls and sequences."""
    steps: list[float]
    """Of each layer between a call and the one before."""
    block: list[float]
    """Of each layer between a call and the first one of its block."""
    first: list[float]
    """Of each layer, the share of these positions among the prompt's first 16."""


class RandomRows(FocusDllm):
    """As many focus rows as Focus-dLLM chooses, drawn at random among the same candidates."""

    def select(self, view: StepView) -> Selection:
        drawn = torch.rand_like(view.confidence)
        return super().select(replace(view, confidence=drawn))


def settings(study: str, examples: int) -> list[Setting]:
    """The settings of a study."""
    if study == "recall":
        return [Setting(study, f"{n} a call", per_step=n, examples=examples) for n in (1, 2, 4, 8)]
    if study == "rows":
        return [
            Setting(
                study,
                f"{'random' if random else 'confident'} rows, {n} a call",
                {"window": window},
                per_step=n,
                random_rows=random,
                examples=examples,
            )
            for n, window, random in product((1, 4), (1, 8), (False, True))
        ]
    if study == "alpha":
        return [
            Setting(study, f"{name} α={alpha:g}", more | {"keep_ratio": alpha}, examples=examples)
            for name, more in SUMMARIES.items()
            for alpha in (0.25, 0.1, 0.05, 0.02)
        ]
    if study == "width":
        return [
            Setting(
                study,
                f"ρ={rho} w={window}, {n} a call",
                {"expansion": rho, "window": window},
                per_step=n,
                examples=examples,
            )
            for n, rho, window in product((1, 4), (1, 2, 4, 8), (1, 8, 16))
        ]
    if study == "reuse":
        return [
            Setting(
                study, f"{name}, lists of {n} steps", more | {"list_reuse": n}, examples=examples
            )
            for name, more in (("α=.25", {"keep_ratio": 0.25}), ("α=.05", {"keep_ratio": 0.05}))
            for n in (1, 2, 4, 8, 32)
        ]
    return [
        Setting(study, f"{length:,} tokens", {}, length, examples=examples)
        for length in (512, 1024, 2048, 4096, 8192)
    ]


SUMMARIES: dict[str, dict[str, Any]] = {
    "bounding boxes": {},
    "bounding boxes, no sinks": {"sink_tokens": 0},
    "mean keys": MEAN,
    "mean keys, no sinks": MEAN | {"sink_tokens": 0},
}
STUDIES = ("recall", "rows", "alpha", "width", "reuse", "scaling")


def measure(study: Subjects, setting: Setting, kind: retrieval.Kind) -> Cell:
    """Decode a setting's questions of one kind."""
    options = setting.options | {"block_length": BLOCK_LENGTH, "lowering": "eager"}
    responses, history = [], []
    with mock.patch("focus_compile.runtime.dispatch.policy_for", _policy(setting)):
        compiled = Arm(setting.name, options).compile(study.model)
        for batch in study.batches(setting, kind):
            with focus_compile.record() as calls:
                responses.append(study.decode(compiled, batch, setting.per_step))
            history.append((len(batch), calls))
    steps = [(record, batch) for batch, calls in history for record in calls if _is_step(record)]
    found = torch.cat(responses)
    dense = study.dense(setting, kind) if setting.length <= LONGEST_DENSE else None
    return Cell(
        setting.study,
        setting.name,
        kind,
        setting.length,
        setting.per_step,
        setting.options,
        setting.random_rows,
        QUESTIONS * setting.examples,
        study.values_right(setting, kind, found),
        _recall_by_call(history),
        sum(record.rows / batch for record, batch in steps) / len(steps),
        sum(record.keys["sparse-suffix"] for record, _ in steps) / len(steps),
        None if dense is None else float(found.eq(dense).float().mean()),
    )


@dataclass
class Subjects:
    """The bundled model, its questions, and what it answers densely."""

    model: Any
    tokenizer: Any
    _dense: dict[tuple[int, int, str, int], Tensor] = field(default_factory=dict)

    def questions(self, setting: Setting, kind: retrieval.Kind) -> list[retrieval.Example]:
        """Those of a setting, of one kind."""
        return [
            retrieval.make(
                self.tokenizer,
                setting.length,
                kind=kind,
                questions=QUESTIONS,
                response=GEN_LENGTH,
                seed=seed,
            )
            for seed in range(setting.examples)
        ]

    def batches(self, setting: Setting, kind: retrieval.Kind) -> Iterator[list[retrieval.Example]]:
        """The questions, as many side by side as there is room for."""
        questions = self.questions(setting, kind)
        size = max(1, TOKENS_AT_ONCE // setting.length)
        for start in range(0, len(questions), size):
            yield questions[start : start + size]

    def decode(self, model: Any, batch: Sequence[retrieval.Example], per_step: int) -> Tensor:
        """Responses, int64 [batch, tokens]."""
        torch.manual_seed(0)
        prompts = torch.tensor([example.prompt_ids for example in batch])
        result = generate(
            model,
            prompts,
            gen_length=GEN_LENGTH,
            block_length=BLOCK_LENGTH,
            steps=GEN_LENGTH // per_step,
            mask_token_id=self.model.config.mask_token_id,
        )
        return result.ids[:, prompts.shape[1] :]

    def dense(self, setting: Setting, kind: retrieval.Kind) -> Tensor:
        """Responses of the plain model, decoded once for all settings that ask the same."""
        asked = (setting.length, setting.per_step, kind, setting.examples)
        if asked not in self._dense:
            self._dense[asked] = torch.cat(
                [
                    self.decode(self.model, batch, setting.per_step)
                    for batch in self.batches(setting, kind)
                ]
            )
        return self._dense[asked]

    def values_right(self, setting: Setting, kind: retrieval.Kind, responses: Tensor) -> int:
        """How many values the responses state."""
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        examples = self.questions(setting, kind)
        return sum(example.score(text) for text, example in zip(texts, examples, strict=True))


def sink_agreement(
    study: Subjects, kind: retrieval.Kind, length: int, examples: int
) -> SinkAgreement:
    """Where attention goes in each layer of every call, computed densely."""
    options = {"refresh": "every-step", "block_length": BLOCK_LENGTH, "lowering": "eager"}
    compiled = Arm("dense", options).compile(study.model)
    setting = Setting("sinks", "dense", length=length, examples=examples)
    between, steps, blocks, first = [], [], [], []
    for batch in study.batches(setting, kind):
        seen: list[Tensor] = []

        def keep(record: StepRecord, call: CallInspection, seen: list[Tensor] = seen) -> None:
            seen.append(torch.stack([call.top[site] for site in sorted(call.top)]))

        with inspecting(keep, attention=True):
            study.decode(compiled, batch, 1)
        tops = torch.stack(seen)  # calls, layers, batch, sinks
        between.append(_jaccard(tops[:, :, None], tops[:, None]).mean((0, 3)))
        steps.append(_jaccard(tops[1:], tops[:-1]).mean((0, 2)))
        starts = torch.arange(len(tops)) // BLOCK_LENGTH * BLOCK_LENGTH
        blocks.append(_jaccard(tops, tops[starts]).mean((0, 2)))
        first.append((tops < FocusConfig().sink_tokens).float().mean((0, 2, 3)))
    return SinkAgreement(
        kind,
        length,
        *(torch.stack(each).mean(0).tolist() for each in (between, steps, blocks, first)),
    )


def _jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Of sets of equal size in the last dimension, fp32."""
    shared = (a[..., :, None] == b[..., None, :]).any(-1).sum(-1).float()
    return shared / (2 * a.shape[-1] - shared)


def _policy(setting: Setting) -> Any:
    def choose(config: FocusConfig) -> FocusDllm:
        kind = RandomRows if setting.random_rows else FocusDllm
        return kind(config.expansion, config.window)

    return choose


def _is_step(record: StepRecord) -> bool:
    return record.program == "step"


def _recall_by_call(history: Sequence[tuple[int, Sequence[StepRecord]]]) -> list[float | None]:
    """Mean over the batches, by their sizes."""
    found: list[float | None] = []
    for call in range(max(len(calls) for _, calls in history)):
        known = [
            (size, calls[call].recall)
            for size, calls in history
            if call < len(calls) and calls[call].recall is not None
        ]
        total = sum(size for size, _ in known)
        found.append(sum(size * value for size, value in known) / total if known else None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", action="append", choices=(*STUDIES, "sinks"))
    parser.add_argument("--examples", type=int, default=8, help="questions of each kind")
    parser.add_argument("--plot-only", action="store_true")
    chosen = parser.parse_args()
    if not chosen.plot_only:
        subjects = Subjects(*demo.load())
        for study in chosen.study or (*STUDIES, "sinks"):
            _run(study, subjects, chosen.examples)
    findings_plots.draw(json.loads(RESULT.read_text()))


def _run(study: str, subjects: Subjects, examples: int) -> None:
    """Measure a study, and put its cells in the place of older ones after each."""
    rows: list[dict[str, Any]] = []
    for found in _cells(study, subjects, examples):
        rows.append({"study": study} | asdict(found))
        print(_said(rows[-1]), flush=True)
        document = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
        others = [row for row in document["rows"] if row["study"] != study]
        settings = document.get("settings", {}) | {
            study: {"examples": examples} | environment.describe()
        }
        RESULT.write_text(
            json.dumps({"settings": settings, "rows": others + rows}, indent=1) + "\n"
        )


def _cells(study: str, subjects: Subjects, examples: int) -> Iterator[Cell | SinkAgreement]:
    if study == "sinks":
        for length, kind in product((512, 1024), retrieval.KINDS):
            yield sink_agreement(subjects, kind, length, min(examples, 8))
        return
    for setting, kind in product(settings(study, examples), retrieval.KINDS):
        yield measure(subjects, setting, kind)


def _said(row: dict[str, Any]) -> str:
    if row["study"] == "sinks":
        return f"sinks {row['kind']} {row['length']}: between steps {row['steps']}"
    cell = Cell(**row)
    return (
        f"{cell.study}: {cell.name}, {cell.kind}: {cell.right}/{cell.asked}, recall "
        f"{cell.mean_recall:.3f}, {cell.rows:.1f} rows, {cell.keys:.0f} keys, as dense "
        f"{cell.agreement}"
    )


if __name__ == "__main__":
    main()
