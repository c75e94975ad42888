"""Steps of a `BatchGenerator` as a record: what it holds, repeated, compared and drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.block_diffusion.batch_generator import BatchGenerator
from focus_compile.errors import RecordError
from focus_compile.records import Record, compare, replay
from focus_compile.records.document import flags_of
from focus_compile.report import write
from tests.block_diffusion.tiny import MASK, MAX_LENGTH, decoder, share_graphs

SETTINGS: dict[str, Any] = {
    "block_length": 8, "max_length": MAX_LENGTH, "max_batch": 2, "mask_token_id": MASK,
    "threshold": 0.5, "lowering": "eager",
}  # fmt: skip
PROMPTS = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13], [5] * 17)


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    share_graphs(monkeypatch)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Record, BatchGenerator, list[Any]]:
    """Two requests at first, and another one after the second step."""
    generator = BatchGenerator(decoder("qwen3"), **SETTINGS)
    with focus_compile.recording(tmp_path / "run.json", logits=True):
        for prompt in PROMPTS[:2]:
            generator.submit(prompt, 12, stop=[[38, 37]])
        done = [*generator.step(), *generator.step()]
        generator.submit(PROMPTS[2], 12)
        done += generator.results()
    return Record.load(tmp_path / "run.json"), generator, done


def test_what_a_record_holds(recorded: tuple[Record, BatchGenerator, list[Any]]) -> None:
    record, generator, done = recorded
    assert len(record.calls) == len(generator.history)
    for call, step in zip(record.calls, generator.history, strict=True):
        assert call["step"]["rows"] == step.listed == int(flags_of(call["rows"], MAX_LENGTH).sum())
        assert call["step"]["kept"] == step.kept
        kept = call.get("kept", call["rows"])
        assert int(flags_of(kept, MAX_LENGTH).sum()) == step.kept
        assert len(call["logits"]) == 64
    assert any(step.kept < step.listed for step in generator.history)
    submitted = [[each["request"] for each in call["submitted"]] for call in record.calls]
    assert submitted[:3] == [[0, 1], [], [2]]
    assert record.calls[0]["submitted"][0]["stop"] == [[38, 37]]
    first = record.ids()[0]
    assert first.shape == (2, MAX_LENGTH)
    assert first[0].tolist() == PROMPTS[0] + [MASK] * 12 + [0] * (MAX_LENGTH - 22)
    assert {each.request for each in done} == {0, 1, 2}
    decided = sum(int(flags.sum()) for flags in record.decided())
    assert 0 < decided <= sum(step.decoded for step in generator.history)


def test_looking_changes_nothing(recorded: tuple[Record, BatchGenerator, list[Any]]) -> None:
    _, _, done = recorded
    generator = BatchGenerator(decoder("qwen3"), **SETTINGS)
    for prompt in PROMPTS[:2]:
        generator.submit(prompt, 12, stop=[[38, 37]])
    again = [*generator.step(), *generator.step()]
    generator.submit(PROMPTS[2], 12)
    assert [*again, *generator.results()] == done


def test_a_replay(recorded: tuple[Record, BatchGenerator, list[Any]]) -> None:
    record, _, _ = recorded
    seen: list[tuple[int, int]] = []
    again = replay(record, decoder("qwen3"), progress=lambda *at: seen.append(at))
    assert compare(record, again).same
    assert seen[-1] == (len(record.calls), len(record.calls))
    # another threshold decides otherwise, and is named
    other = compare(record, replay(record, decoder("qwen3"), threshold=0.0))
    assert not other.same
    assert other.counts()["ids"] > 0
    weights = compare(record, replay(record, decoder("qwen3", seed=1)))
    assert weights.first is not None
    assert weights.first.what == "weights"


def test_a_report(recorded: tuple[Record, BatchGenerator, list[Any]], tmp_path: Path) -> None:
    record, generator, _ = recorded
    write(record, tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert re.search(rf"\b{len(generator.history)}\b", page)
    assert "rows may leave" in page


def test_what_cannot_be_repeated(tmp_path: Path) -> None:
    generator = BatchGenerator(decoder("qwen3"), **SETTINGS)
    generator.submit(PROMPTS[0], 12)
    generator.step()
    with focus_compile.recording(tmp_path / "late.json"):
        generator.step()
    with pytest.raises(RecordError, match="request 0 was decoding when the recording began"):
        replay(Record.load(tmp_path / "late.json"), decoder("qwen3"))
    own = BatchGenerator(generator.model, **SETTINGS, rank=torch.add)
    own.submit(PROMPTS[0], 12)
    with focus_compile.recording(), pytest.raises(RecordError, match="rank= or call="):
        own.step()
