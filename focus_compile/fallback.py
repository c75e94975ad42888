"""Nothing falls back silently: one line per distinct reason, or an error under `strict`."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import torch

from focus_compile.errors import RefusalError

__all__ = ["FocusWarning", "forget", "refuse", "report", "warn_once"]

log = logging.getLogger("focus_compile")


class FocusWarning(UserWarning):
    """The exact program runs where an incremental one was asked for, or a setting is not known."""


_reported: set[str] = set()
_OTHERS = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "<")


def report(reason: str) -> str:
    """Warn once per distinct reason; returns it."""
    if warn_once(f"focus_compile runs the exact program: {reason}"):
        log.info("exact program: %s", reason)
    return reason


def warn_once(message: str, *, about: str | None = None) -> bool:
    """Warn unless this, or anything about the same, was said already; whether it was news."""
    about = message if about is None else about
    if about in _reported:
        return False
    _reported.add(about)
    warnings.warn(message, FocusWarning, stacklevel=_callers_level())
    return True


def _callers_level() -> int:
    """The stacklevel at which `warn_once` warns of the user's own line, not of torch's or ours."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OTHERS):
        level, frame = level + 1, frame.f_back
    return level


def refuse(reason: str, *, strict: bool) -> str:
    """Report a fallback, or raise RefusalError under `strict`."""
    if strict:
        raise RefusalError(f"focus_compile: {reason} (strict=True)")
    return report(reason)


def forget() -> None:
    """Report every reason anew."""
    _reported.clear()
