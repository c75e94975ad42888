"""The prompts that a search asks: from a file, or the bundled model's questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from focus_compile.demo import retrieval
from focus_compile.errors import OptionError

__all__ = ["questions", "read_prompts"]


def read_prompts(file: Path) -> list[str]:
    """One prompt a line, as text or as JSON objects with a "prompt"; empty lines are left out.

    A file is JSON lines where it is named .jsonl or its first line is an object.

    Raises:
        OptionError: it cannot be read, holds none, or a line is no such object.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OptionError(f"--prompts {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise OptionError(f"--prompts {file}: not UTF-8 text") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise OptionError(f"--prompts {file}: no prompts; write one a line")
    first = numbered[0][1].lstrip()
    if file.suffix == ".jsonl" or (first.startswith("{") and _prompt_in(first) is not None):
        return [_parsed(file, number, line) for number, line in numbered]
    return [line for _, line in numbered]


def _parsed(file: Path, number: int, line: str) -> str:
    prompt = _prompt_in(line)
    if prompt is None:
        raise OptionError(
            f'--prompts {file}, line {number}: expected an object such as {{"prompt": "…"}}'
        )
    return prompt


def _prompt_in(line: str) -> str | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def questions(tokenizer: Any, length: int, examples: int, response: int, seed: int) -> list[Any]:
    """Token ids of retrieval questions for the bundled model, kinds by turns.

    length: tokens of prompt and response.

    Raises:
        OptionError: they do not fit the length.
    """
    kinds = retrieval.KINDS
    made = (
        retrieval.make(
            tokenizer,
            length,
            kind=kinds[number % len(kinds)],
            response=response,
            seed=seed + number // len(kinds),
        )
        for number in range(examples)
    )
    return [list(example.prompt_ids) for example in made]
