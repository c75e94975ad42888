"""The options of commands that decode responses to prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from focus_compile.cli.common import STDOUT
from focus_compile.errors import OptionError

PromptOption = Annotated[str | None, typer.Option(help="The prompt.")]
FileOption = Annotated[
    Path | None, typer.Option(help="Read the prompt from here; - is standard input.")
]
ChatOption = Annotated[
    bool, typer.Option(help="Ask as a user's message where the tokenizer has a chat template.")
]
GenLengthOption = Annotated[int, typer.Option(min=1, help="Tokens to decode.")]
StepsOption = Annotated[
    int | None, typer.Option(min=1, help="Model calls in all. Without it, one for each token.")
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(help="Decode all that is at least so probable; 0.9 with block policies."),
]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0: the most probable token.")]


def prompt_text(command: str, prompt: str | None, file: Path | None) -> str:
    """The prompt's text; OptionError unless exactly one source holds some."""
    if (prompt is None) == (file is None):
        raise OptionError(f"{command}: give the prompt by one of --prompt TEXT and --file FILE")
    if prompt is not None:
        text = prompt
    elif file == STDOUT:
        text = sys.stdin.read().rstrip("\n")
    else:
        assert file is not None
        text = _read(command, file)
    if not text.strip():
        raise OptionError(f"{command}: the prompt is empty")
    return text


def _read(command: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise OptionError(f"{command}: --file {file}: {why}") from None
