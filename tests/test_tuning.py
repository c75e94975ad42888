"""The tuner: what is searched, how settings are compared, and the file that options load."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import EuroBertConfig, EuroBertForMaskedLM

import focus_compile
from focus_compile.config import FocusConfig
from focus_compile.errors import OptionError
from focus_compile.fallback import FocusWarning, forget
from focus_compile.runtime.record import StepRecord
from focus_compile.settings_file import config_hash, describe_model
from focus_compile.tuning import search
from focus_compile.tuning.judge import Decoding, Score, compare
from focus_compile.tuning.knobs import KNOBS, Knobs
from focus_compile.tuning.prompts import read_prompts
from focus_compile.tuning.result import Trial, pareto_front
from focus_compile.tuning.search import TuneSettings, tune
from focus_compile.tuning.work import ModelShape

MASK, END = 3, 2


def small_model(width: int = 32) -> Any:
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        mask_token_id=MASK,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )
    return EuroBertForMaskedLM(config).eval()


def settings_file(folder: Path, model: Any, **options: Any) -> Path:
    file = folder / "settings.json"
    known = {"name": "small", "class": type(model).__name__} | describe_model(model)
    file.write_text(json.dumps({"options": options, "model": known, "focus_compile": None}))
    return file


def decode_two(compiled: Any) -> list[StepRecord]:
    ids = torch.arange(96)[None] % 60 + 4
    ids[:, 64:] = MASK
    with torch.no_grad(), focus_compile.record() as history:
        compiled(ids)
        compiled(ids.index_fill(1, torch.tensor([70]), 9))
    return history


@pytest.fixture(autouse=True)
def alone() -> None:
    torch.compiler.reset()
    forget()


@pytest.mark.parametrize(
    ("dense", "other", "expected"),
    [
        ([5, 6, 7, 8], [5, 6, 7, 8], (4, 4)),
        ([5, END, 9, 9], [5, END, 8, 8], (2, 2)),
        ([5, END, END, END], [5, 6, END, END], (2, 3)),
        ([5, 6, 7, END], [5, END, END, END], (2, 4)),
    ],
)
def test_tokens_count_up_to_the_longer_response(
    dense: list[int], other: list[int], expected: tuple[int, int]
) -> None:
    assert compare(dense, other, END) == expected


def test_without_an_end_all_tokens_count() -> None:
    assert compare([END, 5], [END, 6], None) == (1, 2)


TRIALS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 20), st.booleans()), min_size=1, max_size=12
)


@given(TRIALS)
def test_no_trial_beats_the_pareto_front(drawn: list[tuple[int, int, bool]]) -> None:
    trials = [
        Trial(number, {}, Score(same, 20, (float(cost),)), complete)
        for number, (same, cost, complete) in enumerate(drawn)
    ]
    front = pareto_front(trials)
    done = [trial for trial in trials if trial.complete]
    assert all(trial.complete for trial in front)
    for trial in done:
        assert any(
            best.score.cost <= trial.score.cost and best.score.same >= trial.score.same
            for best in front
        )
        for best in front:
            no_worse = trial.score.cost <= best.score.cost and trial.score.same >= best.score.same
            equal = (trial.score.cost, trial.score.same) == (best.score.cost, best.score.same)
            assert equal or not no_worse


@given(
    st.integers(1, 40),
    st.sets(st.sampled_from(KNOBS)),
    st.one_of(st.none(), st.integers(1, 32)),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_every_suggestion_is_valid_and_leaves_fixed_options(
    layers: int, fixed: set[str], calls: int | None, blocks: int, seed: int
) -> None:
    knobs = Knobs(layers=layers, fixed=fixed, calls_per_block=calls, blocks=blocks)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for options in knobs.first():
        study.enqueue_trial(options)
    for expected in [*knobs.first(), {}]:
        options = knobs.suggest(study.ask())
        FocusConfig(**options)
        assert not fixed & options.keys()
        assert {name: options[name] for name in expected} == expected


def test_work_of_a_refresh_is_that_of_a_dense_call() -> None:
    shape = ModelShape(layers=10, key_width=64, summary_width=32, row_weights=1000)
    config = FocusConfig(dense_layers=3)
    regions = ("dense-prefix", "sink-capture", "sparse-suffix")
    refresh = StepRecord("refresh", "", 128, keys=dict.fromkeys(regions, 128))
    assert shape.work([refresh], 128, config) == shape.dense(128, 128)
    step = StepRecord("step", "", 8, keys=dict.fromkeys(regions[:2], 128) | {regions[2]: 32})
    rows = 8 * (1000 + (4 * 128 + 6 * 32) * 64)
    assert shape.work([step], 128, config) == rows + 6 * 4 * 2 * 32
    mean = FocusConfig(dense_layers=3, block_summary="mean")
    assert shape.work([step], 128, mean) == rows + 6 * 4 * 32
    assert shape.work([replace(step, chosen=False)], 128, config) == rows


def test_the_output_layer_counts_once_and_a_mere_embedding_does_not() -> None:
    model = small_model()
    ids = torch.full((1, 48), MASK)
    shape = ModelShape.of(model, ids, {"mask_token_id": MASK, "lowering": "eager"})
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.layers == 3
    assert shape.row_weights == sum({id(m.weight): m.weight.numel() for m in linear}.values())
    assert (shape.key_width, shape.summary_width) == (2 * 2 * 16, 16)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\n two {x}\n", ["one", " two {x}"]),
        ("a.txt", "{not json\n", ["{not json"]),
        ("a.txt", '{"prompt": "x\\ny"}\n{"prompt": "z", "id": 3}\n', ["x\ny", "z"]),
        ("a.jsonl", '{"prompt": "x"}\n', ["x"]),
    ],
)
def test_prompts_are_lines_or_json(
    tmp_path: Path, name: str, text: str, expected: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "No such file"),
        ("empty.txt", b"\n \n", "no prompts; write one a line"),
        ("latin.txt", b"\xff\xfe", "not UTF-8 text"),
        ("bad.jsonl", b'{"prompt": "x"}\n{"promt": "y"}\n', "line 2: expected an object such as"),
        ("bad.jsonl", b"words\n", "line 1: expected an object"),
        ("mixed.txt", b'{"prompt": "x"}\nwords\n', "line 2: expected an object"),
    ],
)
def test_bad_prompts(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_prompts(tmp_path / name)


class FakeJudge:
    """A model whose agreement and cost are known: fewer keys cost less, and under half of them a
    token of each prompt is lost; from prompt `breaks_at` on, under `needs` of them as well."""

    breaks_at, needs = 99, 0.0

    def __init__(self, loaded: Any, prompts: Any, decoding: Decoding, *_: Any) -> None:
        self.prompts, self.shape = prompts, SimpleNamespace(layers=4)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.prompts)

    def answer_densely(self, advance: Any) -> None:
        pass

    def dense_tokens(self, number: int) -> int:
        return 10

    def use(self, options: dict[str, Any]) -> None:
        self.ratio = FocusConfig(**options).keep_ratio

    def score(self, number: int) -> Score:
        enough = self.ratio >= (self.needs if number >= self.breaks_at else 0.5)
        return Score(10 if enough else 9, 10, (0.1 + self.ratio,))


LOADED: Any = SimpleNamespace(description={"model": "small"}, model=small_model())


def found(monkeypatch: pytest.MonkeyPatch, judge: type[FakeJudge], **settings: Any) -> Any:
    monkeypatch.setattr(search, "Judge", judge)
    decoding = Decoding(mask_token_id=MASK, gen_length=16, block_length=8)
    return tune(LOADED, [[5, 6]] * 8, TuneSettings(decoding=decoding, **settings))


def test_the_cheapest_setting_that_agrees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    result = found(monkeypatch, FakeJudge, trials=25)
    assert result.reached
    assert result.options["keep_ratio"] == 0.5
    first, careful = result.trials[:2]
    assert (first.options["keep_ratio"], careful.options["keep_ratio"]) == (0.5, 1.0)
    cut = [trial for trial in result.trials if not trial.complete]
    assert cut
    assert all(len(t.score.costs) == 1 and t.options["keep_ratio"] < 0.5 for t in cut)
    assert max(result.importance["cost"], key=result.importance["cost"].get) == "keep_ratio"
    again = found(monkeypatch, FakeJudge, trials=12).trials
    assert [t.options for t in again] == [t.options for t in result.trials[: len(again)]]


def test_what_fails_on_prompts_held_out_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(FakeJudge):
        breaks_at, needs = 6, 0.8

    result = found(monkeypatch, Breaks, trials=20)
    assert result.reached
    assert result.options["keep_ratio"] >= 0.8
    refuted = [t for t in result.trials if t.checked and t.checked.agreement < 1]
    assert refuted
    assert all(t.score.cost < result.chosen.score.cost for t in refuted)


def test_an_unreachable_target_gives_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(FakeJudge):
        def score(self, number: int) -> Score:
            return Score(9 if self.ratio == 1 else 5, 10, (self.ratio,))

    result = found(monkeypatch, Never, trials=12)
    assert not result.reached
    assert result.options["keep_ratio"] == 1.0
    assert result.to_dict()["reached"] is False


def test_fixed_options_are_kept_and_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {"keep_ratio": 0.7, "lowering": "eager"}
    result = found(monkeypatch, FakeJudge, trials=4, fixed=fixed)
    assert all("keep_ratio" not in trial.options for trial in result.trials)
    assert result.options["keep_ratio"] == 0.7
    assert "lowering" not in result.options
    FocusConfig(**result.options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0}, "target_agreement=0 is not valid"),
        ({"target": 1.01}, "a share above 0, up to 1"),
        ({"held_out": 1}, "held_out=1"),
        ({"measure": "tim"}, "did you mean 'time'"),
        ({"fixed": {"policy": "dual-cache"}}, "focus-dllm, whose options are what is searched"),
        ({"fixed": dict.fromkeys(KNOBS, 1)}, "nothing to search"),
    ],
)
def test_bad_search_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TuneSettings(decoding=Decoding(mask_token_id=MASK), **settings).check()


@pytest.mark.parametrize("by", ["torch", "environment"])
def test_a_settings_file_reaches_the_programs(
    tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    known = {"keep_ratio": 0.25, "key_block": 8, "sink_tokens": 0, "dense_layers": 1}
    file = settings_file(tmp_path, model, mask_token_id=MASK, **known)
    options = {"settings": str(file), "lowering": "eager", "strict": True}
    if by == "environment":
        monkeypatch.setenv("FOCUS_COMPILE_SETTINGS", str(options.pop("settings")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FocusWarning)
        history = decode_two(torch.compile(model, backend="focus", options=options))
    assert [call.program for call in history] == ["refresh", "step"]
    assert history[1].keys["sparse-suffix"] == 32 + 64 // 4


def test_what_wins_over_what(tmp_path: Path) -> None:
    file = settings_file(tmp_path, small_model(), keep_ratio=0.25, window=3, expansion=2)
    environment = {"FOCUS_COMPILE_WINDOW": "5"}
    chosen = FocusConfig.from_options(
        {"settings": file, "keep_ratio": 0.75}, environment=environment
    )
    assert (chosen.keep_ratio, chosen.window, chosen.expansion) == (0.75, 3, 2)
    environment["FOCUS_COMPILE_SETTINGS"] = str(file)
    mirrored = FocusConfig.from_options({}, environment=environment)
    assert (mirrored.keep_ratio, mirrored.window, mirrored.expansion) == (0.25, 5, 2)
    without = FocusConfig.from_options({"settings": None}, environment=environment)
    assert (without.keep_ratio, without.window, without.expansion) == (0.5, 5, 4)
    moded = FocusConfig.from_options({"settings": file}, mode="dual-cache", environment={})
    assert (moded.policy, moded.window) == ("dual-cache", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; expected a file that focus-compile tune"),
        ("{", r"no JSON \("),
        ("[]", 'no objects "options" and "model"'),
        ('{"options": {}, "model": 3}', 'no objects "options" and "model"'),
        (
            '{"options": {"keep_rato": 1}, "model": {}}',
            r"bad.json: unknown option 'keep_rato'; did you mean 'keep_ratio'\?",
        ),
        ('{"options": {"settings": "x"}, "model": {}}', "unknown option 'settings'"),
        ('{"options": {"window": 0}, "model": {}}', "bad.json: option window=0 is not valid"),
    ],
)
def test_bad_settings_files(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(OptionError, match=message):
        FocusConfig.from_options({"settings": str(file)}, environment={})


def test_no_path_is_no_settings_file() -> None:
    with pytest.raises(OptionError, match="settings=3 is not valid; expected the path of a file"):
        FocusConfig.from_options({"settings": 3}, environment={})


@pytest.mark.parametrize("by", ["torch", "ours"])
def test_settings_of_another_model_warn_once_and_apply(tmp_path: Path, by: str) -> None:
    file = settings_file(tmp_path, small_model(), keep_ratio=0.25, mask_token_id=MASK)
    other = small_model(48)
    options = {"settings": str(file), "lowering": "eager"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if by == "ours":
            compiled = focus_compile.compile(other, **options)
        else:
            compiled = torch.compile(other, backend="focus", options=options)
        decode_two(compiled)
    messages = [str(w.message) for w in caught if issubclass(w.category, FocusWarning)]
    assert len(messages) == 1
    assert r"were measured on small (EuroBertForMaskedLM), and this EuroBert" in messages[0]
    assert "python -m focus_compile tune" in messages[0]


def test_copies_of_a_model_have_one_hash(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    copy = EuroBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert config_hash(copy.config) == config_hash(model.config)
    assert config_hash(small_model(48).config) != config_hash(model.config)


def test_another_version_is_told(tmp_path: Path) -> None:
    model = small_model()
    file = settings_file(tmp_path, model, keep_ratio=0.25)
    text = json.loads(file.read_text()) | {"focus_compile": "0.0.1"}
    file.write_text(json.dumps(text))
    with pytest.warns(FocusWarning, match=r"with focus_compile 0\.0\.1, and this is"):
        focus_compile.compile(model, settings=file)
