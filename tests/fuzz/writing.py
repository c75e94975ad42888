"""Pieces of source code, put together with the right indentation."""

from __future__ import annotations

import textwrap

__all__ = ["Code", "class_of", "code"]


class Code(str):
    """Source code whose indentation is as it shall be."""

    __slots__ = ()


def code(*pieces: str, indent: int = 0) -> Code:
    """The pieces that are not empty, one under another, `indent` levels in.

    Plain strings are dedented first, so that they may be written where they are used.
    """
    texts = [p if isinstance(p, Code) else textwrap.dedent(p).strip("\n").rstrip() for p in pieces]
    return Code(textwrap.indent("\n".join(text for text in texts if text), "    " * indent))


def class_of(head: str, *members: str) -> Code:
    """`class head:` over the members that are not empty, a blank line between them."""
    bodies = [code(code(member), indent=1) for member in members if member.strip()]
    return Code(f"class {head}:\n" + "\n\n".join(bodies))
