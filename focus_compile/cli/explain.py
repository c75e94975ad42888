"""`explain`: the plan that focus_compile makes of a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from focus_compile.cli.common import (
    JsonOption,
    check_writable,
    output,
    plain_errors,
    write_json,
)
from focus_compile.cli.model_request import ModelRequest, with_model
from focus_compile.config import BLOCK_POLICIES, FocusConfig
from focus_compile.errors import OptionError
from focus_compile.explain import explain
from focus_compile.model_files import LoadedModel


@with_model()
def explain_command(
    request: ModelRequest,
    length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and response.")] = 1024,
    gen_length: Annotated[
        int, typer.Option(min=1, help="Tokens of the response, for the memory that it takes.")
    ] = 64,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also compile, and list what is launched.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Print the plan of a model: attention sites, regions, memory, and every refusal with its
    remedy.

    Exit code 1 where no call would be incremental.
    """
    with plain_errors():
        check_writable(json_file)
        request.check()
        console = output(json_file)
        if gen_length >= length:
            raise OptionError.invalid("gen_length", gen_length, f"less than length={length}")
        with console.status(f"loading {request.name}"):
            loaded = request.load()
            loaded.check_length(length)
        with console.status("tracing"):
            tokenizer = request.tokenizer_or_none()
            options = request.focus_options(loaded, needs_mask=False, tokenizer=tokenizer)
            explanation = _explain(loaded, length, gen_length, kernels, options)
        console.print(str(explanation), markup=False, highlight=False, soft_wrap=True)
        write_json(json_file, explanation.to_dict() | {"model": loaded.description})
        if not explanation.accepted:
            raise typer.Exit(1)


def _explain(
    loaded: LoadedModel, length: int, gen_length: int, kernels: bool, options: dict[str, Any]
) -> Any:
    """Called with ids alone, or, with block policies, with a block-causal mask as well."""
    config = FocusConfig.from_options(options)
    ids = loaded.random_ids(length, gen_length, config.mask_token_id)
    if config.policy not in BLOCK_POLICIES:
        return explain(loaded.model, ids, quiet=True, kernels=kernels, **options)
    from focus_compile.passes.block_causality import block_causal_mask

    def call(ids: Any, mask: Any) -> Any:
        return loaded.model(ids, attention_mask=mask)

    mask = block_causal_mask(length, config.block_length, ids.device)
    return explain(call, ids, mask, quiet=True, kernels=kernels, **options)
