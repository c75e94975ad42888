"""The site: it builds, knows every option, and has an entry for every message of the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from focus_compile.config import FocusConfig
from tests.messages import messages

ROOT = Path(__file__).resolve().parents[1]


def site_hooks() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "site_hooks", ROOT / "docs/site_hooks.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_tutorial_runs_and_prints_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FOCUS_COMPILE_LOWERING", "eager")
    monkeypatch.setenv("FOCUS_COMPILE_VERIFY", "0")
    torch.compiler.reset()
    text = (ROOT / "docs/tutorial.md").read_text()
    shown = re.findall(r"```python\n(.*?)```|```text\n(.*?)```", text, re.DOTALL)
    scope: dict[str, object] = {"__name__": "tutorial"}
    for code, output in shown:
        if code:
            exec(compile(code, "tutorial.md", "exec"), scope)
            continue
        printed = capsys.readouterr().out.split("\n")
        for line, expected in zip(printed, output.split("\n"), strict=False):
            assert timeless(line).startswith(timeless(expected))
    torch.compiler.reset()


def timeless(line: str) -> str:
    """Without what differs between two runs, or is left out."""
    return re.sub(r"; [\d.]+ ms$|, …$", "", line)


def test_every_message_of_the_code_has_its_entry() -> None:
    said = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs/troubleshooting.md").read_text()))
    wanted = messages(ROOT / "focus_compile")
    assert len(wanted) > 100
    missing = {text: file for text, file in wanted.items() if text not in said}
    assert not missing, "\n".join(f"{file}: {text}" for text, file in missing.items())


def test_every_option_is_in_the_table_with_what_it_means() -> None:
    rows = site_hooks().options_table().splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    fields = dataclasses.fields(FocusConfig)
    assert [name.strip("`") for name, *_ in cells] == [field.name for field in fields]
    assert [default.strip("`") for _, _, default, _ in cells] == [
        repr(field.default) for field in fields
    ]
    assert all(meaning.endswith(".") for *_, meaning in cells)


def test_links_out_of_the_docs_lead_into_the_site() -> None:
    hooks = site_hooks()
    text = "[a](../README.md#options) [b](coverage.md) [c](https://x.org) [d](../no-such.md)"
    assert hooks.relinked(text, "docs/cli.md") == (
        "[a](front-page.md#options) [b](coverage.md) [c](https://x.org) [d](../no-such.md)"
    )
    assert hooks.relinked("[a](docs/cli.md)", "README.md") == "[a](cli.md)"
    assert hooks.relinked("[a](../../examples/use_generate.py)", "docs/howto/x.md") == (
        "[a](../examples/use_generate.py)"
    )


def test_the_navigation_leaves_out_what_is_not_there() -> None:
    nav = [{"A": "a.md"}, {"Part": [{"B": "b.md"}, {"C": "c.md"}]}, {"None": [{"D": "d.md"}]}]
    assert list(site_hooks()._present(nav, {"a.md", "c.md"})) == [
        {"A": "a.md"}, {"Part": [{"C": "c.md"}]},
    ]  # fmt: skip


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "excluded from the built site" not in done.stderr
    options = (tmp_path / "options.html").read_text()
    assert "keep_ratio" in options
    assert "<!-- options -->" not in options
    for name in ("tutorial", "troubleshooting", "performance", "python", "CHANGELOG"):
        assert (tmp_path / f"{name}.html").exists()
