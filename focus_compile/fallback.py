"""Nothing falls back silently: one line per distinct reason, or an error under `strict`."""

from __future__ import annotations

import logging
import warnings

from focus_compile.errors import RefusalError

__all__ = ["FocusWarning", "forget", "refuse", "report"]

log = logging.getLogger("focus_compile")


class FocusWarning(UserWarning):
    """The exact program runs where an incremental one was asked for."""


_reported: set[str] = set()


def report(reason: str) -> str:
    """Warn once per distinct reason; returns it."""
    if reason not in _reported:
        _reported.add(reason)
        warnings.warn(f"focus_compile runs the exact program: {reason}", FocusWarning, stacklevel=2)
        log.info("exact program: %s", reason)
    return reason


def refuse(reason: str, *, strict: bool) -> str:
    """Report a fallback, or raise RefusalError under `strict`."""
    if strict:
        raise RefusalError(f"focus_compile: {reason} (strict=True)")
    return report(reason)


def forget() -> None:
    """Report every reason anew."""
    _reported.clear()
