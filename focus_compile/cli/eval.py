"""`eval`: lm-eval tasks, dense against focus."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from focus_compile.cli.common import (
    JsonOption,
    check_writable,
    plain_errors,
    quiet_transformers,
    write_json,
)
from focus_compile.errors import OptionError


def eval_command(
    model: Annotated[
        str, typer.Argument(help="tiny, tiny-block, a folder or a hub name.")
    ] = "tiny",
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", "-t", help="Tasks of lm-eval, or focus_retrieval; repeatable."),
    ] = None,
    backends: Annotated[
        list[str] | None,
        typer.Option("--backend", help="focus, inductor, eager; repeatable. inductor and focus."),
    ] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", help="focus_retrieval: 512, 1024, 2048, 4096; repeatable."),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="focus_retrieval: questions of each kind and length.")
    ] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences decoded side by side.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any option of focus_compile or argument of focus_dllm, such as keep_ratio=0.25, "
            "threshold=0.9, mc_num=64, dtype=bfloat16; repeatable.",
        ),
    ] = None,
    gen_kwargs: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Generation arguments, over a task's; repeatable."),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts as chats.")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="Begins every chat.")] = None,
    use_cache: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Keep responses here, and go on from those kept."),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="More tasks, as lm-eval has them.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Score a model on lm-eval tasks, dense and through focus, side by side.

    Without arguments: long-context retrieval with the bundled model, offline. On several devices:
    accelerate launch -m focus_compile eval ...
    """
    with plain_errors():
        check_writable(json_file)
        quiet_transformers()
        from focus_compile.integrations.lm_eval import compare

        settings = compare.EvalSettings(
            model=model,
            tasks=tuple(name for text in tasks or ["focus_retrieval"] for name in text.split(",")),
            backends=tuple(backends or ("inductor", "focus")),
            model_arguments=pairs(options, "--option"),
            metadata={"max_seq_lengths": lengths or [512, 1024], "num_samples": examples},
            gen_kwargs=pairs(gen_kwargs, "--gen-kwargs"),
            batch_size=batch_size,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            use_cache=use_cache,
            include_path=include_path,
        )
        result = compare.run(settings, lambda found: write_json(json_file, found.to_dict()))
        if result is not None:
            Console().print(compare.table(result))


def pairs(given: Sequence[str] | None, option: str) -> dict[str, Any]:
    """NAME=VALUE texts as lm-eval reads them: numbers, True, None and lists are values."""
    from lm_eval.utils import handle_arg_string

    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise OptionError(f"{option} {text}: expected NAME=VALUE")
        found[name] = _list(text, value) if value.startswith("[") else handle_arg_string(value)
    return found


def _list(text: str, value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise OptionError(f"{text}: expected a list such as [1, 2]") from None
