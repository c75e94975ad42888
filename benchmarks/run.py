"""Measures decoding of 256 tokens by every peer on one device, and checks itself.

    python -m benchmarks.run --suite gpu --quick
    python -m benchmarks.run --suite gpu --models llada --contexts 32768 --per-step 1,2,3
    python -m benchmarks.run --suite cpu --device cpu --models tiny --contexts 128 --blocks 16

The arms run in one process on the same weights, with one sampler and one schedule. Times of a call
are medians, taken from an idle device until it is idle again; a generation is composed from them
(`--verify-composition` runs some whole). Results are written after every arm of every cell, and
files of several runs are merged by `python -m benchmarks.report`. Exit code 1: a check was red, and
nothing of that model is reported, or an arm of focus_compile failed.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch._inductor.runtime.cache_dir_utils import cache_dir

from benchmarks.suite import results
from benchmarks.suite.arms import ArmOptions
from benchmarks.suite.ceilings import measure_ceilings
from benchmarks.suite.cells import ARMS, arms_of
from benchmarks.suite.measure import GIB
from benchmarks.suite.runner import Runner, Workload
from focus_compile.demo import environment

ROOT = Path(__file__).resolve().parents[1]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=150)


def source_hash() -> str:
    """Identifies the code that was measured where there is no git."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "focus_compile").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    found = environment.describe()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else found["processor"]
    found |= {"device": name, "source": source_hash(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        found |= {
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "gpu_memory_gib": properties.total_memory / GIB,
            "multiprocessors": properties.multi_processor_count,
        }
    return found | ({"commit": commit} if commit else {})


def default_file(suite: str, device: str) -> Path:
    known = re.search(r"\b([A-Z]{1,3}\d{2,4})\b", device) if suite == "gpu" else None
    name = known.group(1).lower() if known else "cpu"
    return ROOT / "benchmarks" / "results" / f"{suite}_{name}.json"


def begin(file: Path, where: dict[str, Any], reuse: Path | None) -> dict[str, Any]:
    """The file's result with this run's environment; checks of the same code and device stand."""
    result = results.load(file)
    stands = [found for found in (result, results.load(reuse) if reuse else None) if found]
    checks: dict[str, Any] = {}
    for found in stands:
        if found.get("environment", {}).get("device") == where["device"]:
            checks |= {
                name: check
                for name, check in found["checks"].items()
                if check["source"] == where["source"]
            }
    return result | {"checks": checks, "environment": where, "commit": where["commit"]}


def listed(text: str, kind: Any) -> list[Any]:
    return [kind(part) for part in text.split(",") if part]


@app.command()
def main(
    suite: Annotated[str, typer.Option(help="gpu or cpu: goes into the rows.")] = "gpu",
    quick: Annotated[
        bool, typer.Option(help="llada at 8K and 32K, one token a call, alpha .5, unless given.")
    ] = False,
    models: Annotated[str | None, typer.Option(help="[default: llada,dream]")] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Prompt tokens. [default: 8192,16384,24576,32768]")
    ] = None,
    blocks: Annotated[str, typer.Option(help="Decode block lengths.")] = "32,64",
    per_step: Annotated[
        str | None, typer.Option(help="Tokens committed a call. [default: 1,2,3]")
    ] = None,
    alphas: Annotated[
        str | None, typer.Option(help="Shares of prompt blocks kept. [default: .5,.25]")
    ] = None,
    arms: Annotated[
        str, typer.Option(help="Letters; h32 measures (h) at blocks of 32 alone.")
    ] = ",".join(ARMS),
    gen_length: int = 256,
    rounds: Annotated[int, typer.Option(help="Timed blocks, or vanilla calls.")] = 3,
    launches: Annotated[bool, typer.Option(help="Count kernels with the profiler.")] = True,
    verify_composition: Annotated[bool, typer.Option(help="Run (b), (g) whole at 8K.")] = False,
    check_peers: Annotated[bool, typer.Option(help="Compare (d) to (c), (f), (g) to (e).")] = False,
    budget_seconds: Annotated[float, typer.Option(help="Stop after the arm then running.")] = 1e9,
    device: str = "cuda",
    lowering: Annotated[
        str, typer.Option(help="inductor or eager, for (b), (d), (g).")
    ] = "inductor",
    dynamic: Annotated[bool, typer.Option(help="Contexts share compiled programs.")] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of FocusConfig, for (d) and (g).")
    ] = None,
    key_block: Annotated[int | None, typer.Option(help="For all focus arms.")] = None,
    commit: Annotated[str | None, typer.Option(help="Where there is no git.")] = None,
    reuse_checks: Annotated[Path | None, typer.Option(help="A results file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure and write results."""
    started = time.monotonic()
    try:
        chosen = arms_of(arms)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--arms") from None
    where = describe(torch.device(device), commit)
    file = json_file or default_file(suite, where["device"])
    work = Workload(
        suite,
        listed(models or ("llada" if quick else "llada,dream"), str),
        listed(contexts or ("8192,32768" if quick else "8192,16384,24576,32768"), int),
        listed(blocks, int),
        listed(per_step or ("1" if quick else "1,2,3"), int),
        listed(alphas or (".5" if quick else ".5,.25"), float),
        chosen,
        gen_length,
        rounds,
        launches,
        verify_composition,
        check_peers,
    )
    ours = dict(part.split("=", 1) for part in option or [])
    result = begin(file, where, reuse_checks) | {"suite": suite}
    ceilings = measure_ceilings(torch.device(device))
    result["ceilings"] = ceilings.to_dict()
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result["runs"][run] = {
        "environment": where,
        "ceilings": ceilings.to_dict(),
        "work": dict(work.__dict__),
        "options": ours,
        "dynamic": dynamic,
        "load": [os.getloadavg()[0]],
        "inductor_cache": "warm" if (Path(cache_dir()) / "fxgraph").exists() else "empty",
    }
    console.print(f"{where['device']}: {ceilings}")
    runner = Runner(
        torch.device(device),
        work,
        ArmOptions(
            lowering,
            dynamic,
            {} if key_block is None else {"key_block": key_block},
            {name: parse(value) for name, value in ours.items()},
        ),
        file,
        started + budget_seconds,
        result,
        run,
        ceilings,
    )
    # Many programs share the model's code; none may fall back for their number.
    with torch._dynamo.config.patch(recompile_limit=64):
        for name in work.models:
            runner.model(name)
            if runner.out_of_time():
                break
    result["runs"][run]["load"].append(os.getloadavg()[0])
    runner.write()
    console.print(f"{time.monotonic() - started:.0f} s; wrote {file}")
    raise typer.Exit(1 if runner.failed else 0)


def parse(value: str) -> Any:
    """An option's value: a number, a flag, whole numbers with commas, or a name."""
    if value in ("True", "False"):
        return value == "True"
    if re.fullmatch(r"\d+(,\d+)+", value):
        return tuple(int(part) for part in value.split(","))
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


if __name__ == "__main__":
    app()
