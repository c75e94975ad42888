"""`tune`: the cheapest options whose answers are the dense loop's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from focus_compile.cli.common import check_output_file, counting_bar, plain_errors
from focus_compile.cli.decoding import ChatOption, GenLengthOption, StepsOption, ThresholdOption
from focus_compile.cli.model_request import ModelRequest, with_model
from focus_compile.errors import OptionError

if TYPE_CHECKING:
    from focus_compile.tuning.result import Trial, TuneResult

NOT_REACHED = 1
LENGTH, EXAMPLES = 512, 16
BUNDLED_WITH_QUESTIONS = "tiny"
"""The bundled model that `questions` are for."""
_COLUMNS = {
    "α": ("keep_ratio",),
    "ρ w": ("expansion", "window"),
    "dense": ("dense_layers",),
    "sinks": ("sink_tokens",),
    "key blocks": ("key_block", "block_summary"),
    "refresh": ("refresh", "tolerance", "refresh_rows"),
}
"""The table's columns, and the options in each."""
WIDTH = 120
"""Of the table where it does not go to a terminal."""


@with_model("policy", "random_weights")
def tune_command(
    request: ModelRequest,
    target_agreement: Annotated[
        float, typer.Option(help="Share of the response's tokens that are to be the dense loop's.")
    ] = 0.99,
    prompts: Annotated[
        Path | None,
        typer.Option(help='A prompt a line, or JSON lines of {"prompt": "…"}, such as yours.'),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help=f"tiny without --prompts: tokens of its questions. {LENGTH}."),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help=f"tiny without --prompts: questions. {EXAMPLES}.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try, at most.")] = 40,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds after which no further trial begins.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the prompts that only the winners are asked.")
    ] = 0.25,
    measure: Annotated[
        str | None,
        typer.Option(
            help="Cost: work (multiply-adds, nothing is compiled) or time (seconds, compiled). "
            "Default: work on the CPU, time on a GPU."
        ),
    ] = None,
    gen_length: GenLengthOption = 64,
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    chat_template: ChatOption = True,
    out: Annotated[Path, typer.Option(help="The settings file to write.")] = Path(
        "focus-settings.json"
    ),
    plot: Annotated[
        Path | None, typer.Option(help="Also draw speed against agreement: .svg, .png or .pdf.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search, and the first question.")] = 0,
) -> None:
    """Search the cheapest options whose answers agree with the dense loop's on your prompts.

    Writes a settings file for options={"settings": FILE}. Options given by -o are not searched.
    Exit code 1: no setting reached the target; the best is written.
    """
    with plain_errors():
        if not all(map(find_spec, ("optuna", "sklearn"))):
            raise OptionError(
                'tune needs optuna and scikit-learn: pip install "focus-compile[tune]"'
            )
        from focus_compile.tuning.plot import check_plot, draw
        from focus_compile.tuning.prompts import read_prompts
        from focus_compile.tuning.search import TuneSettings, tune

        check_output_file("--out", out)
        check_plot(plot)
        _check_source(request.name, prompts, length, examples)
        texts = None if prompts is None else read_prompts(prompts)
        fixed = request.check()
        console = _console()
        with console.status(f"loading {request.name}"):
            tokenizer = request.tokenizer()
            loaded = request.load()
        options = request.focus_options(loaded, needs_mask=True, tokenizer=tokenizer)
        found = fixed | options
        decoding = _decoding(found, gen_length, steps, threshold, loaded, tokenizer)
        measure = measure or ("work" if loaded.model.device.type == "cpu" else "time")
        settings = TuneSettings(
            decoding=decoding,
            target=target_agreement,
            trials=trials,
            timeout=timeout,
            held_out=held_out,
            measure=measure,
            lowering=found.pop("lowering", "eager" if measure == "work" else "inductor"),
            seed=seed,
            fixed=found,
        )
        settings.check()
        ids = _ids(tokenizer, texts, length, examples, gen_length, seed, chat_template)
        loaded.check_length(max(map(len, ids)) + gen_length)
        with counting_bar() as bar:
            task = bar.add_task("dense answers", total=len(ids) + trials)

            def advance(done: str, so_far: Sequence[Trial]) -> None:
                best = _cheapest(so_far, target_agreement)
                bar.update(task, advance=1, description=f"{done}{best}")

            result = tune(loaded, ids, settings, advance)
        if plot is not None:
            draw(result, plot)
        out.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
        _show(console, result, out)
        if not result.reached:
            raise typer.Exit(NOT_REACHED)


def _check_source(
    model: str, prompts: Path | None, length: int | None, examples: int | None
) -> None:
    """Raises OptionError unless there is exactly one source of prompts."""
    if prompts is not None and (length is not None or examples is not None):
        raise OptionError("tune: --prompts excludes --length and --examples; give one or the other")
    if prompts is None and model != BUNDLED_WITH_QUESTIONS:
        raise OptionError(
            "tune: give --prompts FILE, a text file with a prompt a line as your model will be "
            'asked, or JSON lines of {"prompt": "…"} where prompts have several lines; some 16 to '
            "64 of them"
        )


def _decoding(
    options: dict[str, Any],
    gen_length: int,
    steps: int | None,
    threshold: float | None,
    loaded: Any,
    tokenizer: Any,
) -> Any:
    from focus_compile.config import FocusConfig
    from focus_compile.tuning.judge import Decoding

    if steps is not None and threshold is not None:
        raise OptionError("tune: --steps and --threshold exclude each other; give one")
    config = FocusConfig.from_options(options)
    return Decoding(
        mask_token_id=options["mask_token_id"],
        gen_length=gen_length,
        block_length=config.block_length,
        steps=steps,
        threshold=threshold,
        eos_token_id=tokenizer.eos_token_id,
        shift_logits=loaded.shifts_logits,
    )


def _ids(
    tokenizer: Any,
    texts: Sequence[str] | None,
    length: int | None,
    examples: int | None,
    gen_length: int,
    seed: int,
    chat: bool,
) -> list[list[int]]:
    """Token ids of all prompts."""
    from focus_compile.decode.respond import encode_prompt
    from focus_compile.tuning.prompts import questions

    if texts is not None:
        return [encode_prompt(tokenizer, text, chat=chat) for text in texts]
    return questions(tokenizer, length or LENGTH, examples or EXAMPLES, gen_length, seed)


def _cheapest(trials: Sequence[Trial], target: float) -> str:
    """For the bar: what the cheapest trial that reaches the target costs."""
    costs = [t.score.cost for t in trials if t.complete and t.score.agreement >= target]
    return f", best {1 / min(costs):.2f}x" if costs else ""


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(WIDTH, console.width))


def _show(console: Console, result: TuneResult, out: Path) -> None:
    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    unit = "seconds" if result.measure == "time" else "multiply-adds"
    known = result.measured
    line(
        f"{result.model['model']}: {len(result.trials)} settings on {known['prompts_searched']} "
        f"prompts, {known['prompts'] - known['prompts_searched']} held out; speed-up: dense {unit} "
        "a token by focus's"
    )
    console.print(_table(result))
    for name, shares in result.importance.items():
        listed = ", ".join(f"{option} {share:.0%}" for option, share in shares.items())
        line(f"What moved {name}: {listed}")
    chosen = result.chosen
    held = chosen.checked
    checked = "" if held is None else f", {held.agreement:.4f} on those held out"
    line(
        f"trial {chosen.number}: {1 / chosen.score.cost:.2f}x, agreement "
        f"{chosen.score.agreement:.4f}{checked}"
    )
    if not result.reached:
        line(
            f"No setting reached {result.target:g}; this one agrees best. More --trials may find "
            'one, and policy="exact" always agrees.'
        )
    line(f'wrote {out}: torch.compile(model, backend="focus", options={{"settings": "{out}"}})')


def _table(result: TuneResult) -> Table:
    """All trials, the Pareto front marked, in order."""
    from focus_compile.tuning.result import pareto_front

    front = {trial.number for trial in pareto_front(result.trials)}
    rows = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="✓ chosen, * Pareto front, (…) cut short: the target was out of reach",
        caption_justify="left",
    )
    for name in ("", *_COLUMNS, "prompts", "agreement", "held out", "speed-up"):
        rows.add_column(name, justify="right", no_wrap=True)
    for trial in result.trials:
        chosen = trial.number == result.chosen.number
        mark = "✓" if chosen else "*" if trial.number in front else ""
        agreement = f"{trial.score.agreement:.4f}"
        rows.add_row(
            f"{mark} {trial.number}",
            *(_cell(trial, names) for names in _COLUMNS.values()),
            str(len(trial.score.costs)),
            agreement if trial.complete else f"({agreement})",
            "–" if trial.checked is None else f"{trial.checked.agreement:.4f}",
            f"{1 / trial.score.cost:.2f}",
            style="bold" if chosen else "",
        )
    return rows


def _cell(trial: Trial, names: Sequence[str]) -> str:
    values = [str(trial.options[name]) for name in names if name in trial.options]
    return " ".join(values) or "–"
