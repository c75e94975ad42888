"""The canvas on a terminal and without one."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from focus_compile.decode.canvas import Canvas
from focus_compile.decode.sampler import DecodeProgress

MASK = 0
PROMPT = [7, 7, 7]


class Letters:
    """A tokenizer of the letters a, b, c, ...; 1 is a special token."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join("" if token == 1 else chr(ord("a") + token) for token in tokens)


def draw(console: Console) -> tuple[str, Canvas]:
    """Decode positions 7, 6, ... 0 of eight, one a call, as token 1, 2, ... 8."""
    ids = torch.tensor([PROMPT + [MASK] * 8])
    with Canvas(
        Letters(),
        title="focus",
        prompt_tokens=len(PROMPT),
        response_tokens=8,
        mask_token_id=MASK,
        program=lambda: "step",
        console=console,
    ) as canvas:
        for step in range(1, 9):
            decoded = torch.zeros_like(ids, dtype=torch.bool)
            decoded[0, -step] = True
            ids[0, -step] = step
            canvas(DecodeProgress(ids, decoded, step, 8))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), canvas


def test_plain_lines_without_a_terminal() -> None:
    text, canvas = draw(Console(file=io.StringIO(), width=80))
    lines = text.splitlines()
    assert [line.partition(" tokens")[0] for line in lines] == [
        f"focus: {decoded}/8" for decoded in (2, 4, 6, 8)
    ]
    assert all(line.endswith("(step)") for line in lines)
    assert "\x1b" not in text
    assert canvas.seconds > 0


def test_a_terminal_ends_with_the_whole_response() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    text, _ = draw(console)
    last = text[text.rindex("╭") :]
    assert "ihgfedc·" in last
    assert "8/8 tokens" in last
    assert "call 8 step" in last


def test_no_call_draws_nothing() -> None:
    console = Console(file=io.StringIO(), width=80)
    with Canvas(
        Letters(),
        title="x",
        prompt_tokens=0,
        response_tokens=8,
        mask_token_id=MASK,
        console=console,
    ):
        pass
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
