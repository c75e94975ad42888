"""One finding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["NOTE", "OK", "PROBLEM", "Check"]

OK, NOTE, PROBLEM = "ok", "note", "problem"
"""As it should be; slower or less tried than it could be; will not work."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    name: str
    status: str
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)
