"""Which rows and keys to read: measure the choices that the papers leave open.

    python benchmarks/selection_study.py run --length 512 --length 2048 --json study.json
    python benchmarks/selection_study.py divergence --length 1024
    python benchmarks/selection_study.py tables study.json

`run` asks the bundled model the same questions under every setting and counts the values that come
out right, also as a share of those that dense decoding gets right. The file is written after every
setting, and settings that it holds already are skipped.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from selection_emulator import Cache, Choice, Emulator, Rows
from torch import Tensor

from focus_compile import demo
from focus_compile.demo import retrieval

BASE = Choice()
KEEP_RATIOS = (0.5, 0.25, 0.1)
KINDS = retrieval.KINDS
DEFAULTS = {f.name: f.default for f in dataclasses.fields(Choice)}

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def references() -> Iterator[Choice]:
    """What the rest is compared with; dense first."""
    yield Choice(policy="dense")
    yield Choice(policy="dual-cache")
    yield Choice(keep_ratio=1.0)


def budget() -> Iterator[Choice]:
    """Key block sizes and keep ratios, with sinks and without."""
    for ratio in KEEP_RATIOS:
        for key_block in (8, 16, 32, 64):
            for sinks in (16, 0):
                yield Choice(keep_ratio=ratio, key_block=key_block, sink_tokens=sinks)


def sinks() -> Iterator[Choice]:
    """How many sinks, chosen how, on top of the budget or inside it."""
    for ratio in KEEP_RATIOS[1:]:
        for key_block in (16, 32):
            common: dict[str, Any] = {"keep_ratio": ratio, "key_block": key_block}
            for count in (4, 8, 32, 64, 128):
                yield Choice(**common, sink_tokens=count)
            for count in (16, 32, 64):
                yield Choice(**common, sink_tokens=count, sinks_in_budget=True)
            yield Choice(**common, sink_rows="max")
            yield Choice(**common, sink_rows="max", sink_tokens=64)


def summaries() -> Iterator[Choice]:
    """What stands for a block."""
    for ratio in KEEP_RATIOS[1:]:
        for key_block in (16, 32):
            for summary in ("max", "bound", "peak", "mass"):
                yield Choice(keep_ratio=ratio, key_block=key_block, summary=summary)


def aggregation() -> Iterator[Choice]:
    """How scores of rows and heads become one list of blocks."""
    for ratio in KEEP_RATIOS[1:]:
        for key_block in (16, 32):
            common: dict[str, Any] = {"keep_ratio": ratio, "key_block": key_block}
            yield Choice(**common, rows="max")
            yield Choice(**common, heads="max")
            yield Choice(**common, heads="kv")
            yield Choice(**common, scores="softmax")
            yield Choice(**common, scores="softmax", rows="max")
            yield Choice(**common, scores="softmax", heads="max")
            yield Choice(**common, scores="softmax", rows="max", heads="max")
            yield Choice(**common, scores="softmax", heads="kv")
            yield Choice(**common, scores="softmax", summary="bound")
            yield Choice(**common, scores="softmax", summary="peak")
            yield Choice(**common, queries="active")
            yield Choice(**common, reuse=True)


def bounds() -> Iterator[Choice]:
    """The winning summary: its budget, its sinks, and whether anything else matters beside it."""
    for ratio in (*KEEP_RATIOS, 0.05):
        for key_block in (8, 16, 32, 64, 128):
            for count in (16, 0):
                yield bound(ratio, key_block=key_block, sink_tokens=count)
    for ratio in (0.1, 0.05):
        for count in (4, 8, 64):
            yield bound(ratio, sink_tokens=count)
        yield bound(ratio, sinks_in_budget=True)
        yield bound(ratio, rows="max")
        yield bound(ratio, heads="max")
        yield bound(ratio, heads="kv")
        yield bound(ratio, queries="active")
        yield bound(ratio, reuse=True)
        for dense_layers in (0, 1, 2, 4, 5, 6):
            yield bound(ratio, dense_layers=dense_layers)


def chosen() -> Iterator[Choice]:
    """The defaults, and beside them the mean summary and no sinks."""
    yield Choice(policy="dual-cache")
    for ratio in (*KEEP_RATIOS, 0.05):
        for count in (16, 0):
            yield bound(ratio, sink_tokens=count)
            yield Choice(keep_ratio=ratio, sink_tokens=count)


def bound(keep_ratio: float, **others: Any) -> Choice:
    """A choice with bounds for summaries."""
    return Choice(keep_ratio=keep_ratio, summary="bound", **others)


def layers() -> Iterator[Choice]:
    """Where sinks are captured and sparse layers begin."""
    for ratio in KEEP_RATIOS:
        for dense_layers in (0, 1, 2, 4, 5, 6):
            yield Choice(keep_ratio=ratio, dense_layers=dense_layers)


def rows() -> Iterator[Choice]:
    """Which rows a step computes."""
    for ratio in (1.0, 0.5):
        yield Choice(keep_ratio=ratio, placement="before")
        for window in (1, 2, 4, 9, 16):
            yield Choice(keep_ratio=ratio, window=window)
        for expansion in (1, 2, 8):
            yield Choice(keep_ratio=ratio, expansion=expansion)


PARTS = {
    part.__name__: part
    for part in (references, budget, sinks, summaries, aggregation, bounds, layers, rows, chosen)
}


def changes(choice: Choice) -> dict[str, Any]:
    """The fields that differ from `Choice()`."""
    return {name: value for name, value in asdict(choice).items() if value != DEFAULTS[name]}


@dataclass
class Study:
    """Results so far: one entry a measurement, naming the fields that differ from `Choice()`."""

    environment: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(values["environment"], values["entries"])

    def find(self, length: int, choice: Choice) -> dict[str, Any] | None:
        """The measurement of that choice, if it was made."""
        key = {"length": length, "choice": changes(choice)}
        return next((e for e in self.entries if key.items() <= e.items()), None)

    def save(self, path: Path | None) -> None:
        """Write the file, whole or not at all."""
        if path:
            lines = ",\n".join(json.dumps(entry) for entry in self.entries)
            head = json.dumps({"environment": self.environment, "base": DEFAULTS}, indent=1)
            text = f'{head[:-2]},\n "entries": [\n{lines}\n]}}\n'
            path.with_suffix(".part").write_text(text, encoding="utf-8")
            path.with_suffix(".part").replace(path)


@dataclass
class Questions:
    """Examples of both kinds with one length, as one batch."""

    tokenizer: Any
    examples: list[retrieval.Example]
    prompts: Tensor

    @classmethod
    def make(cls, tokenizer: Any, length: int, count: int, response: int, device: str) -> Questions:
        """`count` examples of each kind, four values asked in each."""
        examples = [
            retrieval.make(tokenizer, length, kind=kind, response=response, seed=seed)
            for kind in KINDS
            for seed in range(count)
        ]
        prompts = torch.tensor([example.prompt_ids for example in examples], device=device)
        return cls(tokenizer, examples, prompts)

    def marks(self, ids: Tensor) -> list[str]:
        """Per kind, one digit for each value asked: 1 if the answer states it."""
        response = ids[:, self.prompts.shape[1] :].tolist()
        marks = [
            "".join(str(int(mark)) for mark in example.marks(self.tokenizer.decode(answer)))
            for example, answer in zip(self.examples, response, strict=True)
        ]
        half = len(marks) // len(KINDS)
        return ["".join(marks[i * half : (i + 1) * half]) for i in range(len(KINDS))]


def measure(
    emulator: Emulator,
    questions: Questions,
    length: int,
    response: int,
    choice: Choice,
    study: Study,
) -> dict[str, Any]:
    """One entry: values right and asked by kind, and the share of dense's right ones kept."""
    began = time.perf_counter()
    answer = emulator.decode(questions.prompts, response, choice)
    marks = questions.marks(answer.ids)
    entry: dict[str, Any] = {"length": length, "choice": changes(choice)}
    dense = study.find(
        length, dataclasses.replace(Choice(policy="dense"), block_length=choice.block_length)
    )
    reference = dense["marks"] if dense else marks if choice.policy == "dense" else None
    for i, kind in enumerate(KINDS):
        entry[kind] = {"right": marks[i].count("1"), "asked": len(marks[i])}
        if reference:
            both = sum(a == b == "1" for a, b in zip(marks[i], reference[i], strict=True))
            entry[kind] |= {"dense_right": reference[i].count("1"), "kept": both}
    entry["recall"] = round(answer.predicted / answer.decoded, 4) if answer.decoded else None
    entry["seconds"] = round(time.perf_counter() - began, 2)
    if choice.policy == "dense":
        entry["marks"] = marks
    return entry


def describe(device: str, dtype: str) -> dict[str, Any]:
    """Machine and versions."""
    processor = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@app.command()
def run(
    length: Annotated[list[int], typer.Option(help="Tokens of prompt and response.")] = [512, 2048],  # noqa: B006
    examples: Annotated[int, typer.Option(help="Questions of each kind.")] = 8,
    block_length: Annotated[list[int], typer.Option(help="Tokens per decode block.")] = [32],  # noqa: B006
    part: Annotated[list[str], typer.Option(help=f"Of {', '.join(PARTS)}.")] = list(PARTS),  # noqa: B006
    response: Annotated[int, typer.Option(help="Tokens of the response.")] = 64,
    model: Annotated[
        Path, typer.Option(help="Folder of an EuroBertForMaskedLM.")
    ] = demo.MODEL_PATH,
    device: str = "cpu",
    dtype: str = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file.")] = None,
) -> None:
    """Measure every setting of the parts asked for."""
    if unknown := set(part) - set(PARTS):
        raise typer.BadParameter(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    network = transformers.AutoModelForMaskedLM.from_pretrained(model, dtype=getattr(torch, dtype))
    network = network.eval().to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    settings = {"examples": examples, "response": response, "questions": 4}
    study = Study(describe(device, dtype) | settings)
    if json_file and json_file.exists():
        study.entries = Study.load(json_file).entries
    choices = [
        dataclasses.replace(choice, block_length=blocks)
        for name in part
        for choice in PARTS[name]()
        for blocks in block_length
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        for tokens in length:
            task = progress.add_task(f"{tokens} tokens", total=len(choices))
            emulator = Emulator(network, network.config.mask_token_id, memory=5 * examples)
            questions = Questions.make(tokenizer, tokens, examples, response, device)
            for choice in choices:
                if not study.find(tokens, choice):
                    entry = measure(emulator, questions, tokens, response, choice, study)
                    study.entries.append(entry)
                    study.save(json_file)
                    progress.console.print(f"{tokens:5} {label(choice):48} {result(entry)}")
                progress.advance(task)


@app.command()
def divergence(
    length: Annotated[int, typer.Option(help="Tokens of prompt and response.")] = 1024,
    examples: Annotated[int, typer.Option(help="Questions of each kind.")] = 4,
    response: Annotated[int, typer.Option(help="Tokens of the response.")] = 64,
    every: Annotated[int, typer.Option(help="Try the choices before each n-th step.")] = 4,
    device: str = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file.")] = None,
) -> None:
    """How far the predictions of the chosen settings are from those made with all keys.

    Prints the mean over focus rows of KL(all keys || choice), in thousandths of a nat, along one
    trajectory decoded with all keys, so that every choice sees the same ids and caches.
    """
    network, tokenizer = demo.load()
    network = network.to(device)
    emulator = Emulator(network, network.config.mask_token_id, memory=0)
    questions = Questions.make(tokenizer, length, examples, response, device)
    everything = Choice(keep_ratio=1.0)
    trials = {label(choice): choice for choice in chosen() if choice.policy == "focus-dllm"}
    totals, steps = dict.fromkeys(trials, 0.0), 0

    def watch(ids: Tensor, cache: Cache, rows: Rows, start: int) -> None:
        nonlocal steps
        steps += 1
        if steps % every:
            return
        expected = emulator.step(ids, cache.clone(), rows, start, everything).log_softmax(-1)
        for name, choice in trials.items():
            actual = emulator.step(ids, cache.clone(), rows, start, choice).log_softmax(-1)
            distance = (expected.exp() * (expected - actual)).sum(-1)
            totals[name] += float((distance * rows.focus).sum() / rows.focus.sum())

    emulator.decode(questions.prompts, response, everything, watch=watch)
    means = {name: round(1000 * total / (steps // every), 3) for name, total in totals.items()}
    for name, value in means.items():
        print(f"| {name} | {value} |")
    if json_file:
        settings = {"length": length, "examples": examples, "steps": steps // every}
        values = {"environment": describe(device, "float32") | settings, "milli_nats": means}
        json_file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@app.command()
def tables(results: Path) -> None:
    """Print the results as Markdown, one table a part."""
    study = Study.load(results)
    columns = sorted({(e["length"], _block(e)) for e in study.entries})
    for name, part in PARTS.items():
        heads = [f"{length} tokens, block {block}" for length, block in columns]
        print(f"\n### {name}\n\n| setting | {' | '.join(heads)} |")
        print("|---" * (len(columns) + 1) + "|")
        for choice in part():
            cells = [_cell(study, length, block, choice) for length, block in columns]
            if any(cells):
                print(f"| {label(choice)} | {' | '.join(cells)} |")


def _block(entry: dict[str, Any]) -> int:
    return int(entry["choice"].get("block_length", DEFAULTS["block_length"]))


def _cell(study: Study, length: int, block: int, choice: Choice) -> str:
    entry = study.find(length, dataclasses.replace(choice, block_length=block))
    return result(entry) if entry else ""


def result(entry: dict[str, Any]) -> str:
    """The share of dense's right values kept, by kind, and the recall of the prediction."""
    text = " / ".join(share(entry[kind]) for kind in KINDS)
    return text if entry["recall"] is None else f"{text} ({entry['recall']:.3f})"


def share(count: dict[str, int]) -> str:
    """kept of dense_right, or right of asked where dense was not measured."""
    part, whole = count.get("kept", count["right"]), count.get("dense_right", count["asked"])
    return f"{100 * part / max(whole, 1):.1f}"


def label(choice: Choice) -> str:
    """The keep ratio and the other fields that differ from `Choice()`."""
    if choice.policy != "focus-dllm":
        return choice.policy
    differing = changes(choice)
    differing.pop("keep_ratio", None)
    differing.pop("block_length", None)
    words = [f"{name}={value}" for name, value in differing.items()]
    return ", ".join([f"α={choice.keep_ratio:g}", *words])


if __name__ == "__main__":
    app()
