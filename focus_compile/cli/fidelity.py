"""`fidelity`: the answers that each policy keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from focus_compile.cli.common import (
    AlphaOption,
    BlockLengthOption,
    JsonOption,
    QuestionsOption,
    SeedOption,
    ThresholdOption,
    check_blocks,
    check_writable,
    output,
    plain_errors,
    quiet_transformers,
    write_json,
    write_progress,
)
from focus_compile.config import BLOCK_POLICIES, COMBINED
from focus_compile.errors import OptionError

LengthOption = Annotated[int, typer.Option(min=1, help="Tokens of prompt and response together.")]
KEEP_RATIOS = (0.5, 0.25, 0.1)
"""Shares of the key blocks that are compared with the combined policy."""


def fidelity_command(
    length: LengthOption = 1024,
    examples: Annotated[int, typer.Option(min=1, help="Questions of each kind.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Questions decoded side by side.")] = 8,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 64,
    block_length: BlockLengthOption = 32,
    policy: Annotated[
        str,
        typer.Option(
            help="focus-dllm: all of its arms; focus-evict: those of eviction; "
            "focus-dllm+evict: these, and some with sparse keys."
        ),
    ] = "focus-dllm",
    refresh: Annotated[
        str,
        typer.Option(help="adaptive: compare what a block entry refreshes, not what is read."),
    ] = "block",
    dense: Annotated[
        bool, typer.Option(help="Ask dense too, which takes longer than all others together.")
    ] = True,
    arm: Annotated[
        list[str] | None, typer.Option(help="Name of an arm beside dense to ask; all of them.")
    ] = None,
    questions: QuestionsOption = None,
    seed: SeedOption = 0,
    alpha: AlphaOption = 1.5,
    tokens_per_step: Annotated[
        list[int] | None,
        typer.Option(min=1, help="focus-evict: tokens of each sequence decoded a step; 1 and 4."),
    ] = None,
    threshold: ThresholdOption = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")] = "cpu",
    lowering: Annotated[
        str, typer.Option(help="inductor, or eager: slower calls without compilation.")
    ] = "inductor",
    json_file: JsonOption = None,
) -> None:
    """Count the answers that each policy keeps, and how well focus rows are predicted.

    With --policy focus-evict: what token eviction costs the block-diffusion model, beside random
    eviction; with focus-dllm+evict, what sparse keys cost in addition.
    """
    with plain_errors():
        check_writable(json_file)
        quiet_transformers()
        from focus_compile.demo import evict_fidelity, fidelity, retrieval

        each = len(retrieval.KINDS) * examples
        if policy in BLOCK_POLICIES:
            check_blocks(block_length)
            evicting = evict_fidelity.EvictFidelitySettings(
                length=length,
                examples=examples,
                batch=batch,
                gen_length=gen_length,
                questions=questions or 12,
                alpha=alpha,
                keep_ratios=KEEP_RATIOS if policy == COMBINED else (),
                tokens_per_step=tuple(tokens_per_step or (1, 4)),
                threshold=threshold,
                seed=seed,
                device=device,
                lowering=lowering,
            )
            total = len(evict_fidelity.arms(evicting)) * len(evict_fidelity.rules(evicting)) * each
            steps = partial(evict_fidelity.run, evicting)
            _show_arms(steps, evict_fidelity.table, total, json_file)
            return
        if policy != "focus-dllm":
            raise OptionError.unknown(policy, ("focus-dllm", *BLOCK_POLICIES), kind="policy")
        settings = fidelity.FidelitySettings(
            length=length,
            examples=examples,
            batch=batch,
            gen_length=gen_length,
            block_length=block_length,
            questions=questions or 4,
            seed=seed,
            device=device,
            lowering=lowering,
            refresh=refresh,
            dense=dense,
            only=tuple(arm or ()),
        )
        total = len(fidelity.arms(settings)) * each
        _show_arms(partial(fidelity.run, settings), fidelity.table, total, json_file)


def _show_arms(
    run: Callable[[Callable[[str, int], object]], Iterator[Any]],
    table: Callable[[Any], Table],
    total: int,
    json_file: Path | None,
) -> None:
    """Follow a fidelity run arm by arm; its results file is written after each."""
    console = output(json_file)
    answered: dict[str, int] = {}
    with _answers_bar(console) as bar:
        task = bar.add_task("", total=total)

        def advance(arm: str, answers: int) -> None:
            answered[arm] = answered.get(arm, 0) + answers
            bar.update(task, advance=answers, description=arm)

        for result in run(advance):
            write_progress(json_file, result.to_dict())
            if not console.is_terminal:
                arm, answers = list(answered.items())[-1]
                console.print(f"{arm}: {answers} answers")
    console.print(table(result))
    write_json(json_file, result.to_dict())


def _answers_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeElapsedColumn(),
        console=console,
    )
