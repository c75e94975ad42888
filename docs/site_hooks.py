"""What mkdocs.yml cannot say: pages that lie outside of docs/, the table of options, and a
navigation that knows what is there."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
PINNED = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Files of the repository that are pages whether a link leads to them or not."""
RENAMED = {"README.md": "front-page.md"}
"""mkdocs takes a README for an index, of which the site has one."""
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(?=\))")
OPTIONS = "<!-- options -->"


def site_path(repository_path: str) -> str:
    """Where a file of the repository lies in the site."""
    return RENAMED.get(repository_path, repository_path.removeprefix(DOCS))


def links_of(text: str, repository_path: str) -> Iterator[str]:
    """The files of the repository that a page's links lead to."""
    folder = posixpath.dirname(repository_path)
    for match in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if (ROOT / target).is_file():
            yield target


def linked_files(pages: list[str]) -> list[str]:
    """Files outside of docs/ that the pages, or pages that they link to, link to."""
    found: dict[str, None] = {}
    pending = [*pages, *PINNED]
    while pending:
        page = pending.pop()
        if not page.startswith(DOCS):
            found[page] = None
        if page.endswith(".md"):
            targets = set(links_of((ROOT / page).read_text(encoding="utf-8"), page))
            pending += sorted(t for t in targets - set(found) if not t.startswith(DOCS))
    return list(found)


def relinked(text: str, repository_path: str) -> str:
    """The page's text with links as they are in the site."""
    folder = posixpath.dirname(repository_path)
    start = posixpath.dirname(site_path(repository_path)) or "."

    def replaced(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if not (ROOT / target).is_file():
            return match[0]
        return f"{match[1]}{posixpath.relpath(site_path(target), start)}{match[3] or ''}"

    return LINK.sub(replaced, text)


def options_table() -> str:
    """Every field of FocusConfig: type, default, and what its docstring says."""
    tree = ast.parse((ROOT / "focus_compile/config.py").read_text(encoding="utf-8"))
    (config,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "FocusConfig")
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for field, docstring in zip(config.body, config.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        kind = ast.unparse(field.annotation).replace("|", "or")
        default = "" if field.value is None else ast.unparse(field.value)
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)  # noqa: PT018
        meaning = " ".join(str(docstring.value.value).split()).replace("|", "\\|")
        lines.append(f"| `{field.target.id}` | {kind} | `{default}` | {meaning} |")
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Adds what is linked from outside of docs/."""
    from mkdocs.structure.files import File

    pages = [DOCS + file.src_uri for file in files.documentation_pages()]
    for path in linked_files(pages):
        if path.endswith(".md"):
            content = (ROOT / path).read_text(encoding="utf-8")
            made = File.generated(config, site_path(path), content=content)
        else:
            made = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
        made.repository_path = path
        files.append(made)
    named = set(_named(config.nav))
    config.nav = list(_present(config.nav, {file.src_uri for file in files}))
    others = [f.src_uri for f in files.documentation_pages() if f.src_uri not in named]
    if others:
        config.nav.append({"More": others})
    return files


def _named(nav: Any) -> Iterator[str]:
    for item in nav:
        for value in item.values() if isinstance(item, dict) else [item]:
            if isinstance(value, str):
                yield value
            else:
                yield from _named(value)


def _present(nav: Any, there: set[str]) -> Iterator[Any]:
    """The navigation without pages that are not there."""
    for item in nav:
        ((title, value),) = item.items() if isinstance(item, dict) else [(None, item)]
        if isinstance(value, list):
            kept = list(_present(value, there))
            if kept:
                yield {title: kept}
        elif value in there:
            yield item


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are in the site, and the table of options."""
    path = getattr(page.file, "repository_path", DOCS + page.file.src_uri)
    return relinked(markdown, path).replace(OPTIONS, options_table())
