"""The repository says what the code does: options, links, packaging."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from focus_compile.config import FocusConfig

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("passes", "kernels", "patterns")


def test_the_readme_lists_options_with_their_defaults() -> None:
    """Those most used; docs/options.md is generated from all of them."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = {name: default.strip("`").replace('"', "'") for name, default in rows}
    expected = {field.name: repr(field.default) for field in dataclasses.fields(FocusConfig)}
    expected["mask_token_id"] = "from `model.config"
    assert len(listed) >= 8
    assert listed == {name: expected[name] for name in listed}


def test_the_page_of_options_lists_every_debug_variable() -> None:
    code = "".join(file.read_text() for file in (ROOT / "focus_compile").rglob("*.py"))
    named = set(re.findall(r"FOCUS_COMPILE_[A-Z]+", code))
    page = (ROOT / "docs" / "options.md").read_text()
    listed = re.findall(r"^\| `(FOCUS_COMPILE_[A-Z]+)=", page, re.M)
    assert named == set(listed)


@pytest.mark.parametrize("name", LINKS)
def test_root_links_lead_into_the_package(name: str) -> None:
    assert (ROOT / name).readlink() == Path("focus_compile") / name
    assert (ROOT / name).resolve() == ROOT / "focus_compile" / name


@pytest.mark.parametrize("name", LINKS)
def test_nothing_becomes_importable_under_a_links_name(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()


def test_the_backend_is_registered() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="focus")
    assert found.value == "focus_compile.backend:focus"


def test_every_bundled_file_is_packaged() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert config["tool"]["setuptools"]["package-data"] == {
        "focus_compile": ["py.typed"],
        "focus_compile.demo.tiny_dllm": ["*"],
        "focus_compile.demo.tiny_block": ["*"],
        "focus_compile.report": ["*.html", "*.css"],
        "focus_compile.integrations.tasks": ["*.yaml"],
    }
