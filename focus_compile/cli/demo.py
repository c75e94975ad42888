"""`demo`: one long question, dense against focus, live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from focus_compile.cli.common import (
    AlphaOption,
    BlockLengthOption,
    JsonOption,
    QuestionsOption,
    SeedOption,
    ThresholdOption,
    check_blocks,
    check_report,
    check_writable,
    output,
    plain_errors,
    quiet_transformers,
    write_json,
)
from focus_compile.config import BLOCK_POLICIES, COMBINED
from focus_compile.errors import OptionError

if TYPE_CHECKING:
    from focus_compile.demo.evict_showcase import EvictShowcaseSettings


def demo_command(
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of prompt and response together; 2048, or 1024 with focus-evict.",
        ),
    ] = None,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 64,
    block_length: BlockLengthOption = 32,
    policy: Annotated[
        str,
        typer.Option(
            help="focus-dllm, dual-cache, prefix-cache, exact; focus-evict, focus-dllm+evict."
        ),
    ] = "focus-dllm",
    keep_ratio: Annotated[
        float, typer.Option(help="Share of the prompt's key blocks that sparse layers read.")
    ] = 0.5,
    refresh: Annotated[
        str, typer.Option(help="When rows are recomputed: block, adaptive, every-step.")
    ] = "block",
    kind: Annotated[str, typer.Option(help="Question: needle or table.")] = "needle",
    seed: SeedOption = 0,
    questions: QuestionsOption = None,
    alpha: AlphaOption = 1.5,
    batch: Annotated[
        int, typer.Option(min=1, help="focus-evict: questions decoded side by side.")
    ] = 8,
    tokens_per_step: Annotated[
        int, typer.Option(min=1, help="focus-evict: tokens of each sequence decoded a step.")
    ] = 2,
    threshold: ThresholdOption = None,
    lowering: Annotated[
        str, typer.Option(help="focus-evict: inductor, or eager without compilation.")
    ] = "inductor",
    report: Annotated[
        Path | None,
        typer.Option(help="Also write an HTML report here; not with block policies."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Decode long questions with a bundled model: dense against focus.

    With --policy focus-evict: the block-diffusion model, whole blocks and the delayed cache against
    token eviction; with focus-dllm+evict, sparse keys in addition.
    """
    with plain_errors():
        check_writable(json_file)
        check_report("--report", report)
        quiet_transformers()
        from focus_compile.demo import retrieval

        kind = retrieval.as_kind(kind)
        if policy in BLOCK_POLICIES:
            from focus_compile.demo import evict_showcase

            if report is not None:
                raise OptionError(
                    f"--report: not with {policy}, whose generator is recorded by its history; "
                    "expected focus-dllm, dual-cache or prefix-cache"
                )
            check_blocks(block_length)
            evicting = evict_showcase.EvictShowcaseSettings(
                length=length or 1024,
                gen_length=gen_length,
                batch=batch,
                questions=questions or 12,
                kind=kind,
                alpha=alpha,
                keep_ratio=keep_ratio if policy == COMBINED else None,
                tokens_per_step=tokens_per_step if threshold is None else None,
                threshold=1.0 if threshold is None else threshold,
                seed=seed,
                lowering=lowering,
            )
            _demo_of_eviction(evicting, json_file)
            return
        from focus_compile.demo import showcase

        settings = showcase.ShowcaseSettings(
            length=length or 2048,
            gen_length=gen_length,
            block_length=block_length,
            policy=policy,
            keep_ratio=keep_ratio,
            refresh=refresh,
            kind=kind,
            seed=seed,
            questions=questions or 4,
        )
        console = output(json_file)
        if report is None:
            result = showcase.run(settings, console)
        else:
            result = showcase.run(settings, console, recorded=True)
        console.print(showcase.table(result))
        same = "the same answers as" if result.same_answers else "other answers than"
        console.print(f"focus: {same} dense, {result.speedup:.1f} times as fast")
        write_json(json_file, result.to_dict())
        if report is not None and result.record is not None:
            from focus_compile.report import write

            write(result.record, report)
            console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _demo_of_eviction(settings: EvictShowcaseSettings, json_file: Path | None) -> None:
    from focus_compile.demo import evict_showcase

    console = output(json_file)
    result = evict_showcase.run(settings, console)
    console.print(evict_showcase.table(result))
    same = "the same answers" if result.same_answers else "answers that differ"
    (_, plain), *_, (name, evicting) = result.arms.items()
    rows = plain.kept_rows_per_token / evicting.kept_rows_per_token
    console.print(
        f"{name}: {same}, {rows:.1f} times fewer rows past the cut than block diffusion, "
        f"decoded {plain.seconds / evicting.seconds:.1f} times as fast"
    )
    write_json(json_file, result.to_dict())
