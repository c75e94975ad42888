"""The texts with which the code refuses, warns or runs exactly, read from its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["HOLE", "messages"]

HOLE = "…"
"""Stands for what a text says of the case at hand."""
SPEAKERS = (
    "CompileError", "Miss", "NotTokenWise", "OtherKeys", "PassError", "Refusal", "RefusalError",
    "SelfCheckError", "of", "refuse", "_refuse", "report", "warn_once", "_no_graphs",
    "_no_cuda_graphs",
)  # fmt: skip
"""What takes such a text as its first argument."""
REASONS = ("why", "_why", "no_", "_no_", "check_plan", "rows_differ")
"""How functions start that return one, or None."""
NAMED = re.compile(r"reason|message|problem|why|(?!_EXPECTED)_?[A-Z][A-Z_]+")
"""What such a text is called where it is written down."""
ELSEWHERE = ("cli", "demo", "doctor", "integrations", "records", "report", "tuning", "coverage.py")
"""What prints texts of its own, which say what to do."""


def texts_of(node: ast.expr | None) -> Iterator[str]:
    """The texts that an expression may be, with `HOLE` where it is formatted."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else HOLE for p in node.values]
        yield re.sub(f"{HOLE}+", HOLE, "".join(map(str, parts)))
    elif isinstance(node, ast.IfExp):
        yield from texts_of(node.body)
        yield from texts_of(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts_of(value)
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "format":
        assert isinstance(node.func, ast.Attribute)
        yield from (text.replace("{}", HOLE) for text in texts_of(node.func.value))


def _said(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and node.args:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in SPEAKERS:
            yield from texts_of(node.args[0])
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        if NAMED.fullmatch(node.targets[0].id):
            yield from texts_of(node.value)
    elif isinstance(node, ast.FunctionDef) and node.name.startswith(REASONS):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return):
                yield from texts_of(inner.value)


def messages(package: Path) -> dict[str, str]:
    """Every text of more than two words, and a file that says it."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package)
        if name.parts[0] in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for text in _said(node):
                if len(text.replace(HOLE, " ").split()) > 2:
                    found[text] = str(name)
    return found
