"""`record`, `replay`, `diff` and `report`: runs as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from focus_compile.cli.common import (
    JsonOption,
    SeedOption,
    check_output_file,
    check_report,
    check_writable,
    counting_bar,
    output,
    plain_errors,
    write_json,
)
from focus_compile.cli.decoding import (
    ChatOption,
    FileOption,
    GenLengthOption,
    PromptOption,
    StepsOption,
    TemperatureOption,
    ThresholdOption,
    prompt_text,
)
from focus_compile.cli.model_request import (
    DeviceOption,
    DtypeOption,
    ModelRequest,
    TrustOption,
    with_model,
)
from focus_compile.errors import OptionError, RecordError

if TYPE_CHECKING:
    from focus_compile.records import Comparison

DIFFERS = 1
"""Exit code where two runs differ."""
RecordArgument = Annotated[Path, typer.Argument(help="A record.", show_default=False)]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Let confidences differ by as much instead of comparing logits bit by bit: for other "
        "machines or thread counts.",
    ),
]


@with_model("random_weights")
def record_command(
    request: ModelRequest,
    out: Annotated[Path, typer.Option(help="The record.")] = Path("run.json"),
    prompt: PromptOption = None,
    file: FileOption = None,
    length: Annotated[
        int,
        typer.Option(min=1, help="Without a prompt: tokens of a question to the model tiny."),
    ] = 512,
    chat_template: ChatOption = True,
    gen_length: GenLengthOption = 64,
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    dense: Annotated[
        bool, typer.Option(help="Also decode by the model itself, and compare.")
    ] = False,
    attention: Annotated[
        bool, typer.Option(help="Note where the attention of each layer goes, at a refresh.")
    ] = True,
    logits: Annotated[
        bool, typer.Option(help="Keep logits beside their hashes, in a safetensors file.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report here.")] = None,
) -> None:
    """Decode a response, and write down what every call was given, decided and returned.

    The file is to report a bug with, to replay on another version, and to draw a report of.
    """
    with plain_errors():
        check_output_file("--out", out)
        check_report("--report", report)
        request.check()
        text = None if prompt is None and file is None else prompt_text("record", prompt, file)
        if text is None and request.name != "tiny":
            raise OptionError("record: give the prompt by one of --prompt TEXT and --file FILE")
        from focus_compile.records.decode import DecodeSettings, record_decode

        tokenizer = request.tokenizer()
        loaded = request.load()
        settings = DecodeSettings(
            options=request.focus_options(loaded, needs_mask=True, tokenizer=tokenizer),
            gen_length=gen_length,
            steps=steps,
            threshold=threshold,
            temperature=temperature,
            seed=seed,
            shift_logits=loaded.shifts_logits,
            dense=dense,
            attention=attention,
            logits=logits,
        )
        settings.check()
        ids = _ids(tokenizer, text, length, gen_length, seed, chat_template)
        loaded.check_length(len(ids) + gen_length)
        import torch

        with counting_bar() as bar:
            run = record_decode(
                loaded.model,
                torch.tensor([ids], device=loaded.model.device),
                settings,
                None,
                text=lambda found: str(tokenizer.decode(found, skip_special_tokens=True)),
                progress=_follow(bar),
            )
        known = loaded.description
        run.record.model |= {"name": known["model"], "dtype": known["dtype"]}
        run.record.save(out)
        console = Console()
        calls = run.record.calls
        console.print(
            f"{out}: {len(calls)} calls, {out.stat().st_size / 1024:,.0f} KiB", soft_wrap=True
        )
        if report is not None:
            _write_report(run.record, report, console)


def replay_command(
    record: RecordArgument,
    model: Annotated[
        str | None, typer.Option(help="Another folder or name of the model than the recorded one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the new record here.")
    ] = None,
    tolerance: ToleranceOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json_file: JsonOption = None,
) -> None:
    """Run a record's inputs again on this version, and name the first difference.

    Exits with 1 where there is one.
    """
    with plain_errors():
        check_writable(json_file)
        if out is not None:
            check_output_file("--out", out)
        from focus_compile.records import Record, compare, replay

        before = Record.load(record)
        name = model or before.model.get("name")
        if name is None:
            raise RecordError(f"{record}: it does not name its model; name one with --model")
        request = ModelRequest(
            name=name,
            device=device,
            dtype=dtype or before.model.get("dtype"),
            trust_remote_code=trust_remote_code,
        )
        loaded = request.load()
        with counting_bar() as bar:
            task = bar.add_task("replaying", total=len(before.calls))
            after = replay(
                before, loaded.model, progress=lambda done, _: bar.update(task, completed=done)
            )
        known = loaded.description
        after.model |= {"name": known["model"], "dtype": known["dtype"]}
        if out is not None:
            after.save(out)
        _conclude(compare(before, after, tolerance=tolerance), json_file)


def diff_command(
    left: RecordArgument,
    right: RecordArgument,
    tolerance: ToleranceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Compare two records: calls, decisions, tokens, logits and times.

    Exits with 1 where the runs differ.
    """
    with plain_errors():
        check_writable(json_file)
        from focus_compile.records import Record, compare

        found = compare(Record.load(left), Record.load(right), tolerance=tolerance)
        _conclude(found, json_file)


def report_command(
    record: RecordArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The report.")] = Path("report.html"),
) -> None:
    """Draw a record as one HTML file that loads nothing else."""
    with plain_errors():
        check_report("--out", out)
        from focus_compile.records import Record

        _write_report(Record.load(record), out, Console())


def _ids(
    tokenizer: Any, text: str | None, length: int, gen_length: int, seed: int, chat: bool
) -> list[int]:
    """The prompt's; a question of the demo where there is no text."""
    if text is None:
        from focus_compile.demo import retrieval

        example = retrieval.make(tokenizer, length, response=gen_length, seed=seed)
        return list(example.prompt_ids)
    from focus_compile.decode.respond import encode_prompt

    return encode_prompt(tokenizer, text, chat=chat)


def _follow(bar: Any) -> Callable[[str, Any], None]:
    """A task of the bar for each decode."""
    tasks: dict[str, Any] = {}

    def progress(name: str, state: Any) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=state.total)
        bar.update(tasks[name], completed=state.step)

    return progress


def _write_report(record: Any, out: Path, console: Console) -> None:
    from focus_compile.report import write

    write(record, out)
    console.print(f"{out}: {out.stat().st_size / 1024:,.0f} KiB", soft_wrap=True)


def _conclude(found: Comparison, json_file: Path | None) -> None:
    """Print what differs; exit with 1 where something does."""
    console = output(json_file)
    for item in found.context:
        console.print(
            f"{item.what}: {item.left} against {item.right}", markup=False, soft_wrap=True
        )
    left, right = found.seconds
    console.print(
        f"calls: {found.calls[0]} and {found.calls[1]}, {left:.2f} and {right:.2f} s",
        soft_wrap=True,
    )
    if found.first is None:
        console.print("no difference")
    else:
        console.print(
            f"first difference: {found.first}", markup=False, highlight=False, soft_wrap=True
        )
        table = Table("differs", "calls")
        for what, count in found.counts().items():
            table.add_row(what, str(count))
        console.print(table)
    write_json(json_file, found.to_dict())
    if found.first is not None:
        raise typer.Exit(DIFFERS)
