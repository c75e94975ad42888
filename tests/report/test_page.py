"""The report as HTML: its structure, what it says, and that it loads nothing."""

from __future__ import annotations

import copy
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from focus_compile.errors import OptionError, RecordError
from focus_compile.records import Record
from focus_compile.report import html, write
from focus_compile.report.numbers import COMPUTED, DECIDED, FOCUS, RunNumbers

VOID = {"meta", "path", "use", "image", "rect", "br", "link"}
SECTIONS = [
    "output", "dense", "plan", "timeline", "keys", "sinks", "confidence", "recall", "time",
    "calls", "memory", "settings",
]  # fmt: skip


class Outline(HTMLParser):
    """Elements, ids, headings and references of a page; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def ids(self) -> list[str]:
        return [str(attrs["id"]) for _, attrs in self.elements if "id" in attrs]


def test_structure(page: str) -> None:
    found = Outline(page)
    assert [section["id"] for section in found.all("section")] == SECTIONS
    assert found.all("html") == [{"lang": "en"}]
    assert len(found.all("title")) == len(found.all("h1")) == len(found.all("main")) == 1
    levels = [int(name[1]) for name, _ in found.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert len(found.ids) == len(set(found.ids))


def test_every_reference_leads_somewhere(page: str) -> None:
    found = Outline(page)
    known = set(found.ids)
    for _, attrs in found.elements:
        for name in ("href", "xlink:href", "aria-labelledby"):
            value = attrs.get(name) or ""
            if value.startswith("#"):
                assert value[1:] in known
            elif name == "aria-labelledby" and value:
                assert value in known
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= known


def test_figures_have_a_name_a_table_and_the_keyboard(page: str) -> None:
    found = Outline(page)
    drawings = found.all("svg")
    assert len(drawings) == 7
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in drawings)
    assert len(found.all("details")) == len(found.all("figcaption")) == 7
    regions = [attrs for _, attrs in found.elements if attrs.get("role") == "region"]
    assert all(
        r.get("tabindex") == "0" and (r.get("aria-label") or r.get("aria-labelledby"))
        for r in regions
    )
    assert all(attrs.get("scope") in ("col", "row") for attrs in found.all("th"))


def test_nothing_is_loaded_and_nothing_runs(page: str) -> None:
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    links = re.findall(r"(?:src|href|url)[=(][\"']?([^\"')\s>]+)", page)
    assert all(link.startswith(("#", "data:image/png;base64")) for link in links)
    outside = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_colours_follow_the_page(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#01020" not in page
    assert not re.search(r"fill: #(000000|ffffff)\b", page)


def test_numbers_are_those_of_the_calls(record: Record) -> None:
    run = RunNumbers(record)
    states, first = run.timeline()
    assert first == 0
    for at, (call, decided) in enumerate(zip(record.calls, run.decided, strict=True)):
        assert int((states[at] == DECIDED).sum()) == int(decided.sum()) == 1
        assert int((states[at] >= COMPUTED).sum()) == len(
            {p for a, b in call["rows"][0] for p in range(a, b)}
            | set(decided[0].nonzero()[:, 0].tolist())
        )
        assert (states[at] == FOCUS).any() <= ("focus" in call)
    layers, share = run.kept_keys() or pytest.fail("no keys")
    assert layers == [1]
    assert share.sum().item() == pytest.approx(3.0)  # half of the prompt's six blocks
    sinks = run.sinks()
    assert sinks is not None
    assert sinks.sum().item() == pytest.approx(1.0)
    shared = run.sink_consistency()
    assert shared is not None
    assert shared.shape == (2, 2)
    assert shared.diagonal().tolist() == [1.0, 1.0]
    assert shared[0, 1] == shared[1, 0]


def test_curves_and_times(record: Record) -> None:
    run = RunNumbers(record)
    curves = run.curves()
    assert all(0 < value <= 1 for value in curves.decided if value is not None)
    assert len([value for value in curves.decided if value is not None]) == 12
    known = [value for value in curves.recall if value is not None]
    assert curves.recall_so_far[-1] == pytest.approx(sum(known) / len(known))
    split = run.time_split()
    assert set(split) == {"refresh", "step", "guard", "sampler"}
    calls = sum(run.milliseconds()) / 1e3
    assert split["refresh"] + split["step"] + split["guard"] == pytest.approx(calls)
    last = record.calls[-1]
    end = last["started"] + last["step"]["milliseconds"] / 1e3
    compiled = sum(step["compile_seconds"] for step in run.steps)
    assert sum(split.values()) + compiled == pytest.approx(end, abs=0.01)
    assert run.memory()["trajectory: keys and values"] > 0


def test_what_is_missing_is_said(record: Record) -> None:
    bare = copy.deepcopy(record)
    bare.arms, bare.output = {}, None
    bare.graphs[0] |= {"plan": None, "why": "no mask_token_id is known", "memory": {}}
    for call in bare.calls:
        for name in ("focus", "sinks", "confidence", "token"):
            call.pop(name, None)
        call["blocks"], call["top"], call["logits"] = {}, {}, None
        call["step"].pop("recall", None)
    text = html(bare)
    assert text.count('class="absent"') == 6
    assert "Every call ran the model itself: no mask_token_id is known." in text
    Outline(text)


def test_a_record_without_calls(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="nothing to draw"):
        write(Record(), tmp_path / "page.html")


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, record: Record, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OptionError, match=r"pip install focus-compile\[report\]"):
        html(record)


def test_a_folder_that_is_not_there(record: Record, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected a file to write"):
        write(record, tmp_path / "none" / "page.html")
