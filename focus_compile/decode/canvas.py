"""A live view of decoding: the response filling up, tokens per second, the program of each call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Sized
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from focus_compile.decode.sampler import DecodeProgress

__all__ = ["BlockDrawing", "Canvas"]

_REDRAW_SECONDS = 0.1
_PLAIN_LINES = 4
_UNDECIDED = "░"


class Canvas:
    """A `progress` callback for `generate` that draws the first sequence of the batch.

    Use it as a context manager. On a terminal it redraws in place, at most ten times a second;
    elsewhere it prints a few plain lines. Time spent drawing, and what else is left out, is kept in
    `seconds`, so that a measurement can leave it out.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        title: str,
        prompt_tokens: int,
        response_tokens: int,
        mask_token_id: int,
        program: Callable[[], str] | None = None,
        console: Console | None = None,
    ) -> None:
        """program: names the program of the last call, such as "step"; None leaves it out."""
        self.seconds = 0.0
        self._tokenizer = tokenizer
        self._title = title
        self._prompt_tokens = prompt_tokens
        self._response_tokens = response_tokens
        self._mask_token_id = mask_token_id
        self._program = program or (lambda: "")
        self._console = console or Console()
        self._pieces: dict[int, str] = {}
        self._quarters = 0
        self._last: DecodeProgress | None = None
        self._drawn_at = self._started = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} tokens"),
            TextColumn("{task.fields[rate]:.1f} tokens/s"),
            TextColumn("call {task.fields[call]} {task.fields[program]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task(title, total=response_tokens, rate=0.0, call=0, program="")
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._drawn_at = self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            if self._last is not None:
                self._draw(self._live, self._last)
            self._live.stop()

    def __call__(self, progress: DecodeProgress) -> None:
        """Take one model call's progress."""
        begun = time.perf_counter()
        self._last = progress
        if self._live is None:
            self._print_line(progress)
        elif begun - self._drawn_at >= _REDRAW_SECONDS:
            self._draw(self._live, progress)
            self._drawn_at = begun
        self.seconds += time.perf_counter() - begun

    def leave_out(self, seconds: float) -> None:
        """Count these no more than drawing, such as seconds spent compiling."""
        self.seconds += seconds

    def _print_line(self, progress: DecodeProgress) -> None:
        """One line each time another quarter of the response is decoded."""
        decoded = sum(token != self._mask_token_id for token in self._response(progress))
        quarters = decoded * _PLAIN_LINES // self._response_tokens
        if quarters <= self._quarters:
            return
        self._quarters = quarters
        program = self._program()
        self._console.print(
            f"{self._title}: {decoded}/{self._response_tokens} tokens, "
            f"{self._rate(decoded):.1f} tokens/s, "
            f"call {progress.step}{program and f' ({program})'}",
            markup=False,
            highlight=False,
        )

    def _draw(self, live: Live, progress: DecodeProgress) -> None:
        response = self._response(progress)
        fresh = progress.decoded[0, self._prompt_tokens :].tolist()
        decoded = sum(token != self._mask_token_id for token in response)
        self._bar.update(
            self._task,
            completed=decoded,
            rate=self._rate(decoded),
            call=progress.step,
            program=self._program(),
        )
        text = Text()
        for token, new in zip(response, fresh, strict=True):
            if token == self._mask_token_id:
                text.append(_UNDECIDED, style="dim")
            else:
                text.append(self._piece(token), style="bold green" if new else "")
        panel = Panel(text, title=self._title, title_align="left")
        live.update(Group(panel, self._bar), refresh=True)

    def _response(self, progress: DecodeProgress) -> list[int]:
        response: list[int] = progress.ids[0, self._prompt_tokens :].tolist()
        return response

    def _rate(self, decoded: int) -> float:
        """Tokens a second so far, without the time that is left out."""
        return decoded / max(time.perf_counter() - self._started - self.seconds, 1e-9)

    def _piece(self, token: int) -> str:
        """The token's text; a dot for special tokens."""
        if token not in self._pieces:
            piece = self._tokenizer.decode([token], skip_special_tokens=True)
            self._pieces[token] = piece or "·"
        return self._pieces[token]


class BlockDrawing:
    """After every step of a `BatchGenerator`, tells a canvas how far one response is."""

    def __init__(self, canvas: Canvas, history: Sized, tokens: int, mask_token_id: int) -> None:
        """history: the generator's; tokens: of the whole response."""
        self._canvas, self._history, self._mask = canvas, history, mask_token_id
        self._before = torch.full((1, tokens), mask_token_id)

    def __call__(self, response: Sequence[int]) -> None:
        """Draw the response so far; what it lacks is undecided."""
        ids = torch.full_like(self._before, self._mask)
        ids[0, : len(response)] = torch.tensor(response)
        fresh = (ids != self._before) & (ids != self._mask)
        self._before = ids
        self._canvas(DecodeProgress(ids=ids, decoded=fresh, step=len(self._history), total=None))
