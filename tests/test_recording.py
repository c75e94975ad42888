"""Records: what a call computed and read, written down, read again, replayed and compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.backend import focus
from focus_compile.decode import generate
from focus_compile.errors import RecordError
from focus_compile.fallback import FocusWarning
from focus_compile.records import Record, Recording, compare, recording, replay
from focus_compile.records.document import flags_of, ranges_of
from tests.compiled import seen_steps, shared_graphs
from tests.runtime.tiny import MASK, OPTIONS, decided, prompt, shared, tiny_model


@pytest.fixture(autouse=True, scope="module")
def graphs_of_the_file() -> Any:
    with shared_graphs(recompile_limit=64):
        yield


@pytest.fixture(autouse=True)
def no_state() -> Any:
    yield
    focus.reset()  # type: ignore[attr-defined]


@torch.no_grad()
def decode(model: Any, masks: int = 6, batch: int = 1, **inputs: Tensor) -> Tensor:
    ids = prompt(masks=masks, batch=batch)
    for _ in range(masks):
        model(ids, **inputs)
        ids = decided(ids)
    return ids


def recorded(path: Path | None = None, seed: int = 0, **options: Any) -> Recording:
    """A decode of the tiny model; the call that makes its trajectory is the first one."""
    focus.reset()  # type: ignore[attr-defined]
    with recording(path, attention=True) as run:
        run.output(decode(shared(tiny_model(seed), **options)))
    return run


@pytest.fixture(scope="module")
def run_once() -> Recording:
    return recorded()


@pytest.fixture
def record(run_once: Recording) -> Record:
    return copy.deepcopy(run_once.record)


def test_a_record_holds_what_every_call_computed() -> None:
    model: Any = shared(tiny_model())
    with seen_steps() as steps, recording() as run, focus_compile.record() as history:
        ids = decode(model, batch=2)
        run.output(ids)
    calls = run.record.calls
    programs = ["refresh", "step", "step", "step", "refresh", "step"]
    assert [call["step"]["program"] for call in calls] == programs
    assert [call["step"]["rows"] for call in calls] == [entry.rows for entry in history]
    stepped = [call for call in calls if call["step"]["program"] == "step"]
    for call, seen in zip(stepped, steps[-4:], strict=True):
        length = seen.rows.shape[1]
        assert torch.equal(flags_of(call["rows"], length), seen.rows)
        assert torch.equal(flags_of(call["focus"], length), seen.focus)
        assert [set(sinks) for sinks in call["sinks"]] == seen.sinks
        for site, blocks in call["blocks"].items():
            for sequence, kept in enumerate(blocks):
                keys = set(seen.keys[int(site)][sequence])
                assert {2 * block for block in kept} | seen.sinks[sequence] <= keys
    for call, ids in zip(calls, run.record.ids(), strict=True):
        assert len(call["confidence"]) == len(call["token"]) == int((ids == MASK).sum())
        assert len(call["logits"]) == 64
        assert 0 <= call["guard_milliseconds"] <= call["step"]["milliseconds"]
    assert [int(chosen.sum()) for chosen in run.record.decided()] == [2] * 6


def test_looking_changes_nothing(record: Record) -> None:
    model: Any = shared(tiny_model())
    for ids, call in zip(record.ids(), record.calls, strict=True):
        with torch.no_grad():
            logits = model(ids)
        probability, token = logits[ids == MASK].softmax(-1).max(-1)
        assert token.tolist() == call["token"]
        torch.testing.assert_close(
            probability, torch.tensor(call["confidence"]), atol=1e-5, rtol=1e-4
        )


def test_attention_is_noted_at_a_refresh(record: Record) -> None:
    """The positions noted are those of highest mean attention of the block's masked rows."""
    first = record.calls[0]
    assert set(first["top"]) == {"0", "1"}
    assert all(0 <= position < 6 for (top,) in first["top"].values() for position in top)
    assert all(not call["top"] for call in record.calls if "focus" in call)


def test_the_time_of_looking_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from focus_compile.runtime import inspection

    most_attended = inspection._most_attended

    def slowly(*arguments: Any) -> Tensor:
        time.sleep(0.2)
        return most_attended(*arguments)

    recorded()
    monkeypatch.setattr(inspection, "_most_attended", slowly)
    first = recorded().record.calls[0]["step"]
    assert first["milliseconds"] - 1e3 * first["compile_seconds"] < 300


def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    record.save(file)
    again = Record.load(file)
    assert again.calls == record.calls
    assert again.graphs == json.loads(json.dumps(record.graphs))
    assert compare(record, again).same
    assert not file.with_suffix(".safetensors").exists()
    assert again.made["torch"] == torch.__version__
    assert again.model["weight_bytes"] > 0


def test_other_inputs_and_logits_lie_beside_the_record(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    model: Any = shared(tiny_model())
    with recording(file, logits=True) as run, torch.no_grad():
        run.output(generate(Wrapped(model), prompt(masks=0), gen_length=4, mask_token_id=MASK).ids)
    again = Record.load(file)
    assert set(again.tensors) == {call["values"] for call in again.calls}
    moved = Record.load(file)
    key = moved.calls[1]["values"]
    moved.tensors[key] = moved.tensors[key] + 0.5
    moved.calls[1]["logits"] = "0" * 64
    found = compare(again, moved).first
    assert found is not None
    assert "logits at most 0.5 apart" in str(found)


class Wrapped:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Tensor) -> Any:
        return type("Output", (), {"logits": self.model(ids)})


def test_a_replay_repeats_the_run(record: Record) -> None:
    done: list[tuple[int, int]] = []
    again = replay(record, tiny_model(), progress=lambda at, of: done.append((at, of)))
    found = compare(record, again)
    assert found.same, found.first
    assert done[-1] == (6, 6)
    other = compare(record, replay(record, tiny_model(seed=1)))
    assert other.first is not None
    assert other.first.what == "weights"
    assert other.counts()["logits"] == 6


def test_a_replay_with_other_options_says_where_it_parts(record: Record) -> None:
    found = compare(record, replay(record, tiny_model(), policy="dual-cache"))
    assert found.first is not None
    assert (found.first.call, found.first.what) == (0, "keys")
    assert [item.what for item in found.context if "option" in item.what] == ["option policy"]
    assert found.to_dict()["first"]["call"] == 0


def test_masks_are_replayed_by_their_name(tmp_path: Path) -> None:
    from tests.models import ModelSpec, build

    spec = ModelSpec(layers=2, output="tensor", vocab=24, padding=True)
    file = tmp_path / "run.json"
    model: Any = shared(build(spec, 0))
    with recording(file):
        decode(model, attention_mask=torch.ones(1, 12, dtype=torch.int64))
    record = Record.load(file)
    assert len(record.tensors) == 1
    focus.reset()  # type: ignore[attr-defined]
    assert compare(record, replay(record, build(spec, 0))).same
    record.tensors.clear()
    with pytest.raises(RecordError, match="belongs beside the record"):
        replay(record, build(spec, 0))


def test_a_tolerance_forgives_bits_but_no_tokens(record: Record) -> None:
    left, right = record, copy.deepcopy(record)
    right.calls[2]["logits"] = "0" * 64
    right.calls[2]["confidence"][0] += 1e-3
    assert not compare(left, right).same
    assert compare(left, right, tolerance=1e-2).same
    apart = compare(left, right, tolerance=1e-4)
    assert apart.counts() == {"confidence": 1}
    right.calls[3]["token"][0] += 1
    assert compare(left, right, tolerance=1e-2).counts() == {"token": 1}


def test_a_run_that_ends_early_is_compared_as_far_as_it_goes(record: Record) -> None:
    left, right = record, copy.deepcopy(record)
    right.calls.pop()
    found = compare(left, right)
    assert [str(item) for item in found.differences] == ["call 5: calls: 6 against 5"]


def test_refused_models_are_recorded_too() -> None:
    model: Any = shared(tiny_model(), mask_token_id=None)
    with pytest.warns(FocusWarning, match="no mask_token_id"), recording() as run:
        decode(model, masks=2)
    assert [call["step"]["program"] for call in run.record.calls] == ["exact"] * 2
    assert run.record.graphs[0]["plan"] is None
    assert "no mask_token_id" in run.record.graphs[0]["why"]
    assert run.record.calls[0]["ids_name"].startswith("L[")


def test_an_exception_leaves_the_calls_before_it(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    model: Any = shared(tiny_model())
    with pytest.raises(ZeroDivisionError):
        fail_after_a_call(model, file)
    assert len(Record.load(file).calls) == 1


def fail_after_a_call(model: Any, file: Path) -> None:
    with recording(file), torch.no_grad():
        model(prompt())
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "another kind of JSON"),
        ('{"format": "focus_compile record", "version": 9}', "reads version 1"),
        ('{"format": "focus_compile record", "version": 1}', "has no graphs"),
    ],
)
def test_files_that_are_no_records(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(RecordError, match=message):
        Record.load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="expected a record of a run"):
        Record.load(tmp_path / "none.json")


def test_ranges() -> None:
    flags = torch.tensor([[True, True, False, True], [False] * 4])
    assert ranges_of(flags) == [[[0, 2], [3, 4]], []]
    assert torch.equal(flags_of(ranges_of(flags), 4), flags)


def test_options_are_those_of_the_run(record: Record) -> None:
    options = record.graphs[0]["options"]
    assert {name: options[name] for name in OPTIONS} == OPTIONS


@pytest.mark.parametrize("policy", ["focus-dllm+evict", "delayed-cache"])
def test_block_policies(policy: str, tmp_path: Path) -> None:
    """A prefix that grows by a block: rows listed, rows kept, key blocks, and a replay of it."""
    from tests.block_diffusion.test_dispatch import B, at_least, decode, prompts
    from tests.block_diffusion.tiny import MASK as BLOCK_MASK
    from tests.block_diffusion.tiny import decoder

    options: dict[str, Any] = {
        "policy": policy, "mask_token_id": BLOCK_MASK, "block_length": B, "lowering": "eager",
        "dense_if_faster": False, "key_block": 4, "sink_tokens": 4, "keep_ratio": 0.5,
    }  # fmt: skip
    model = decoder("qwen3")
    torch.compiler.reset()  # which lengths Dynamo has seen decides when it traces anew
    file = tmp_path / "run.json"
    with recording(file, attention=True) as run:
        decode(focus_compile.compile(model, **options), prompts(1), 3, at_least(0.9), dynamic=False)
    calls = run.record.calls
    lengths = [ids.shape[1] for ids in run.record.ids()]
    assert set(lengths) == {3 * B, 4 * B, 5 * B}
    assert any(call["step"]["why"] == "the next block" for call in calls)
    assert calls[0]["step"]["program"] == "refresh"
    for call, length, before in zip(calls[1:], lengths[1:], lengths, strict=False):
        step = call["step"]
        computed = flags_of(call["rows"], length)
        if step["program"] == "refresh":  # Dynamo traces a second length anew
            assert computed.all()
            continue
        committed = B if length > before else 0
        assert int(computed.sum()) == step["rows"] + committed
        assert int(flags_of(call["kept"], length).sum()) == step["kept"]
        assert not (flags_of(call["kept"], length) & ~computed).any()
        for blocks in call["blocks"].values():
            assert len(blocks[0]) <= -(-(length - B) // 4)
    assert any(call["blocks"] for call in calls) == (policy == "focus-dllm+evict")
    torch.compiler.reset()
    record = Record.load(file)
    found = compare(record, replay(record, model, fixed={"use_cache": False}))
    assert found.same, found.first


def test_a_compiled_sampler_that_writes_the_ids_in_place() -> None:
    """What is recorded are the ids before the call, and the sampler's own confidence."""
    from tests.test_sampler_tail import in_place

    denoise = torch.compile(
        in_place(tiny_model()),
        backend="focus",
        options={"mask_token_id": MASK, "lowering": "eager"} | OPTIONS,
    )
    ids = prompt(masks=6)
    given = []
    with recording() as run, torch.no_grad():
        for _ in range(3):
            given.append(ids.clone())
            denoise(ids)
    assert all(torch.equal(a, b) for a, b in zip(run.record.ids(), given, strict=True))
    assert [len(call["confidence"]) for call in run.record.calls] == [6, 4, 2]
    assert [call["logits"] for call in run.record.calls] == [None] * 3


def test_rows_of_a_partial_refresh() -> None:
    model: Any = shared(
        tiny_model(), refresh="adaptive", block_length=2, refresh_rows=0.2, tolerance=1e9
    )
    with recording() as run:
        decode(model)
    partial = [call for call in run.record.calls if call["step"]["program"] == "partial"]
    assert partial
    for call in partial:
        rows = flags_of(call["rows"], 12)
        assert rows[0, 6:].all()
        assert 6 < int(rows.sum()) <= call["step"]["rows"]
