"""What this installation can do, and what stands in its way: `focus-compile doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from focus_compile.doctor import hardware, settings, software
from focus_compile.doctor.check import NOTE, OK, PROBLEM, Check

__all__ = ["NOTE", "OK", "PROBLEM", "Check", "examine", "to_dict"]


def examine() -> list[Check]:
    """Every check but the self-test, in the order in which people read them."""
    return [*software.checks(), *hardware.checks(), *settings.checks()]


def to_dict(checks: list[Check], more: Callable[[], dict[str, Any]] = dict) -> dict[str, Any]:
    """JSON types. more: what else is known, such as the self-test's figures."""
    return {
        "ok": all(check.status != PROBLEM for check in checks),
        "checks": [check.to_dict() for check in checks],
        **more(),
    }
