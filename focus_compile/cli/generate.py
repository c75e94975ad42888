"""`generate`: one prompt in, one response out."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from focus_compile.cli.common import STDOUT, JsonOption, check_writable, plain_errors, write_json
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
from focus_compile.cli.model_request import ModelRequest, with_model

if TYPE_CHECKING:
    from focus_compile.decode.respond import Response


@with_model("random_weights")
def generate_command(
    request: ModelRequest,
    prompt: PromptOption = None,
    file: FileOption = None,
    chat_template: ChatOption = True,
    gen_length: GenLengthOption = 128,
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    temperature: TemperatureOption = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0,
    shift_logits: Annotated[
        bool | None,
        typer.Option(help="Row i scores position i + 1. Default: for Dream, by its config."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Answer a prompt, watching the response fill up.

    The text alone goes to standard output; the live view and the figures go to standard error.
    """
    with plain_errors():
        check_writable(json_file)
        request.check()
        text = prompt_text("generate", prompt, file)
        console = Console(stderr=True)
        from focus_compile.decode.canvas import Canvas
        from focus_compile.decode.respond import ResponseSettings, encode_prompt, respond

        with console.status(f"loading {request.name}"):
            tokenizer = request.tokenizer()
            loaded = request.load()
        options = request.focus_options(loaded, needs_mask=True, tokenizer=tokenizer)
        settings = ResponseSettings(
            options=options,
            gen_length=gen_length,
            steps=steps,
            threshold=threshold,
            temperature=temperature,
            seed=seed,
            shift_logits=loaded.shifts_logits if shift_logits is None else shift_logits,
        )
        ids = encode_prompt(tokenizer, text, chat=chat_template)
        loaded.check_length(len(ids) + gen_length)
        config = settings.check()
        canvas = functools.partial(
            Canvas,
            tokenizer,
            title=config.policy,
            response_tokens=gen_length,
            mask_token_id=options["mask_token_id"],
            console=console,
        )
        response = respond(loaded.model, tokenizer, ids, settings, canvas)
        console.print(_summary(response), highlight=False, soft_wrap=True)
        if json_file != STDOUT:
            typer.echo(response.text)
        write_json(json_file, response.to_dict() | {"options": options} | loaded.description)


def _summary(response: Response) -> str:
    programs = ", ".join(f"{count} {name}" for name, count in response.programs.items())
    return (
        f"{len(response.tokens)} tokens after {response.prompt_tokens} in {response.seconds:.2f} s "
        f"({response.tokens_per_second:.1f} tokens/s), {response.model_calls} calls ({programs}), "
        f"{response.rows:,} rows; compiling took {response.compile_seconds:.1f} s more"
    )
