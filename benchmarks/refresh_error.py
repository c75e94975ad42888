"""Is the estimate of `refresh="adaptive"` honest? Beside the error that it estimates.

    python -m benchmarks.refresh_error --lengths 512,1024,2048 --examples 8
    python -m benchmarks.refresh_error --plot-only

At every block entry of the retrieval task a partial refresh renews a share of the prompt and
estimates the relative error of attention outputs that the rest costs, layer by layer. Then all rows
are computed, and the same queries attend to the keys and values that the rest would have had: that
is the true error. Both are of the layer where they are largest, as the gate takes them. Op by op.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, fx

import focus_compile
from focus_compile import demo
from focus_compile.decode.sampler import generate
from focus_compile.demo import environment, retrieval
from focus_compile.kernels.staleness.cpu import rows_of
from focus_compile.runtime.programs import Programs

matplotlib.use("svg")
from matplotlib import pyplot as plt

RESULT = Path("benchmarks/results/refresh_error.json")
PLOT = Path("docs/images/refresh_error.svg")
GEN_LENGTH, BLOCK_LENGTH = 64, 8
SHARES = (0.02, 0.05, 0.15)
UNGATED = 1e9


@dataclass(frozen=True)
class Entry:
    """One partial refresh: the error that it estimated and the true one, of its worst layer."""

    length: int
    kind: str
    share: float
    estimated: float
    true: float


class _Watcher(fx.Interpreter):
    """Keeps the arguments of every site's judgement."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.judged: list[Sequence[Any]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.focus_compile.staleness.default:
            self.judged.append(args)
        return super().call_function(target, args, kwargs)


@contextmanager
def watched() -> Iterator[list[tuple[float, float]]]:
    """(estimated, true) of every partial refresh of one sequence inside."""
    found: list[tuple[float, float]] = []
    original = Programs.run_partial

    def run_partial(
        self: Programs, args: Sequence[Any], inputs: Sequence[Tensor], state: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        assert self.partial is not None
        watcher = _Watcher(self.partial.graph)
        outputs = watcher.run(*args, *inputs, *state)
        kept = [tensor.clone() for tensor in state]
        ids = args[self.plan.ids.position]
        rows = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        self.refresh(*args, rows, *state)
        pairs = zip(state[0 : 2 * len(watcher.judged) : 2], state[1::2], strict=False)
        judged = enumerate(zip(watcher.judged, pairs, strict=True))
        actual = max(_true(call, k, v, kept[2 * at + 1]) for at, (call, (k, v)) in judged)
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
        moved, size = outputs[-2].unbind(-1)
        if actual > 0:  # in the plan's first-run check nothing is old
            found.append((float((moved / size).sqrt().max()), actual))
        return outputs

    Programs.run_partial = run_partial  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Programs.run_partial = original  # type: ignore[method-assign]


def _true(judged: Sequence[Any], fresh_k: Tensor, fresh_v: Tensor, value: Tensor) -> float:
    """The relative change of one site's outputs where the rows left have their own K/V."""
    q, key, out, _, readers, weight, left, *_, mask, scale = judged
    at = left[:, None, :, None]
    k, v = torch.where(at, fresh_k, key), torch.where(at, fresh_v, value)
    renewed = torch.ops.focus_compile.attention(q, k, v, mask, scale)
    w = weight[:, None, :, None]
    moved, size = (rows_of(x.float(), readers).square() * w for x in (renewed - out, out))
    return float((moved.sum() / size.sum()).sqrt())


def measure(
    model: Any, tokenizer: Any, length: int, kind: retrieval.Kind, examples: int, share: float
) -> list[Entry]:
    """The block entries of some questions, one after the other."""
    torch.compiler.reset()
    compiled = focus_compile.compile(
        model,
        refresh="adaptive",
        tolerance=UNGATED,
        refresh_rows=share,
        block_length=BLOCK_LENGTH,
        lowering="eager",
    )
    with watched() as found:
        for seed in range(examples):
            question = retrieval.make(
                tokenizer, length, kind=kind, questions=4, response=GEN_LENGTH, seed=seed
            )
            prompt = torch.tensor([question.prompt_ids])
            generate(compiled, prompt, gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH)
    return [Entry(length, kind, share, *pair) for pair in found]


def summary(entries: Sequence[Entry]) -> dict[str, float]:
    """What the estimates are like, in the whole."""
    quotient = np.array([entry.estimated / max(entry.true, 1e-9) for entry in entries])
    logs = np.log([[max(e.estimated, 1e-9), max(e.true, 1e-9)] for e in entries]).T
    return {
        "entries": len(entries),
        "median estimated / true": float(np.median(quotient)),
        "10th percentile": float(np.percentile(quotient, 10)),
        "90th percentile": float(np.percentile(quotient, 90)),
        "below the true error": float((quotient < 1).mean()),
        "below half of it": float((quotient < 0.5).mean()),
        "correlation of logarithms": float(np.corrcoef(logs)[0, 1]),
    }


def plot(entries: Sequence[Entry], file: Path) -> None:
    """Estimated against true, a colour for each share."""
    figure, axes = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    for share in sorted({entry.share for entry in entries}):
        own = [entry for entry in entries if entry.share == share]
        true, estimated = [e.true for e in own], [e.estimated for e in own]
        axes.scatter(true, estimated, s=8, alpha=0.6, label=f"{share:.0%} of the prompt renewed")
    ends = [min(e.true for e in entries), max(e.true for e in entries)]
    axes.plot(ends, ends, color="0.5", linestyle="--", linewidth=1, label="equal")
    axes.set(xscale="log", yscale="log", xlabel="true error", ylabel="estimated error")
    axes.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--examples", type=int, default=8, help="of each kind")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--plot-only", action="store_true", help="of the results there are")
    args = parser.parse_args()
    if not args.plot_only:
        model, tokenizer = demo.load()
        entries: list[Entry] = []
        for length in map(int, args.lengths.split(",")):
            for share in SHARES:
                for kind in retrieval.KINDS:
                    entries += measure(model, tokenizer, length, kind, args.examples, share)
                print(f"{length} tokens, {share:.0%}: {summary(entries)}", flush=True)
                result = {
                    "summary": summary(entries),
                    "entries": [asdict(entry) for entry in entries],
                    "settings": {"examples": args.examples, "block_length": BLOCK_LENGTH}
                    | environment.describe(),
                }
                args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    known = json.loads(args.json.read_text(encoding="utf-8"))
    plot([Entry(**entry) for entry in known["entries"]], args.plot)


if __name__ == "__main__":
    main()
