"""Options: validated when given, with a hint at what was meant."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import focus_compile
from focus_compile.config import (
    COMBINED,
    DEBUG_VARIABLES,
    POLICIES,
    TORCH_MODES,
    FocusConfig,
    options_from_text,
    verify_level,
)
from focus_compile.errors import OptionError
from focus_compile.fallback import FocusWarning, forget
from focus_compile.frontend import options_for

FIELDS = [field.name for field in dataclasses.fields(FocusConfig)]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mask_token", "mask_token_id"), ("mask_id", "mask_token_id"),
        ("blocklength", "block_length"), ("windows", "window"),
        ("keep-ratio", "keep_ratio"), ("sinks", "sink_tokens"),
        ("dense_layer", "dense_layers"), ("polcy", "policy"), ("refesh", "refresh"),
    ],
)  # fmt: skip
def test_misspelt_options(name: str, meant: str) -> None:
    message = rf"focus_compile: unknown option '{name}'; did you mean '{meant}'\?"
    with pytest.raises(OptionError, match=message):
        FocusConfig.from_options({name: 1}, environment={})


def test_an_option_like_no_other_lists_them_all() -> None:
    with pytest.raises(OptionError, match="known: block_length, ") as error:
        FocusConfig.from_options({"zzz": 1}, environment={})
    assert all(name in str(error.value) for name in FIELDS)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("policy", "focus", "unknown policy 'focus'; did you mean 'focus-dllm'?"),
        ("policy", 3, "policy=3 is not valid; expected one of focus-dllm, dual-cache"),
        ("refresh", "blocks", "unknown refresh 'blocks'; did you mean 'block'?"),
        ("tolerance", -0.1, "a number >= 0"),
        ("refresh_rows", 1.5, "a share between 0 and 1"),
        ("max_age", 0, "a whole number >= 1"),
        ("guard", 2, "a share between 0 and 1"),
        ("guard_agreement", "high", "a share between 0 and 1"),
        ("refresh", 0, 'expected "block", "adaptive", "every-step" or a number of calls >= 1'),
        ("refresh", True, 'expected "block", "adaptive", "every-step" or a number of calls >= 1'),
        ("refresh", 1.5, 'expected "block", "adaptive", "every-step" or a number of calls >= 1'),
        ("mask_token_id", -1, "expected a whole number >= 0"),
        ("mask_token_id", "[MASK]", "expected a whole number >= 0"),
        ("block_length", 0, "expected a whole number >= 1"),
        ("block_length", 32.0, "expected a whole number >= 1"),
        ("dense_layers", -1, "expected a whole number >= 0"),
        ("dense_tail_layers", None, "expected a whole number >= 0"),
        ("expansion", 0, "expected a whole number >= 1"),
        ("window", True, "expected a whole number >= 1"),
        ("keep_ratio", 1.1, "expected a share between 0 and 1"),
        ("keep_ratio", -0.1, "expected a share between 0 and 1"),
        ("keep_ratio", float("nan"), "expected a share between 0 and 1"),
        ("keep_ratio", "half", "expected a share between 0 and 1"),
        ("sink_tokens", -1, "expected a whole number >= 0"),
        ("key_block", 0, "expected a whole number >= 1"),
        ("buckets", (), "expected ascending row counts >= 2"),
        ("buckets", (1, 2), "expected ascending row counts >= 2"),
        ("buckets", (8, 8), "expected ascending row counts >= 2"),
        ("buckets", 8, "expected ascending row counts >= 2"),
        ("strict", 1, "expected True or False"),
        ("dryrun", "yes", "expected True or False"),
        ("lowering", "cuda", "unknown lowering 'cuda'; known: eager, inductor."),
    ],
)
def test_values_out_of_range(name: str, value: Any, expected: str) -> None:
    with pytest.raises(OptionError) as error:
        FocusConfig(**{name: value})
    assert expected in str(error.value)
    assert str(error.value).startswith("focus_compile: ")
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 4096), ("keep_ratio", 0), ("keep_ratio", 1), ("sink_tokens", 0), ("refresh", 3),
        ("dense_layers", 0), ("buckets", [8, 64]), ("mask_token_id", None), ("expansion", 10**6),
    ],
)  # fmt: skip
def test_values_at_the_edge(name: str, value: Any) -> None:
    found = getattr(FocusConfig(**{name: value}), name)
    assert found == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("POLICY", "dual-cache", "dual-cache"), ("MASK_TOKEN_ID", "3", 3),
        ("MASK_TOKEN_ID", "none", None),
        ("DENSE_LAYERS", "", None), ("KEEP_RATIO", "0.25", 0.25), ("REFRESH", "4", 4),
        ("REFRESH", "every-step", "every-step"), ("BUCKETS", "8, 16", (8, 16)),
        ("STRICT", "1", True),
        ("DRYRUN", "false", False), ("LOWERING", "eager", "eager"), ("WINDOW", "16", 16),
    ],
)  # fmt: skip
def test_environment_mirrors(name: str, text: str, value: Any) -> None:
    config = FocusConfig.from_options(environment={f"FOCUS_COMPILE_{name}": text})
    assert getattr(config, name.lower()) == value


def test_every_field_has_a_mirror() -> None:
    values = FocusConfig(mask_token_id=1, dense_layers=1, buckets=(8,)).to_dict()
    mirrors = {
        f"FOCUS_COMPILE_{name.upper()}": ",".join(map(str, value))
        if isinstance(value, list)
        else str(value).lower()
        for name, value in values.items()
    }
    assert FocusConfig.from_options(environment=mirrors).to_dict() == values


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("WINDOW", "wide", "FOCUS_COMPILE_WINDOW='wide' is not valid; expected a whole number"),
        ("STRICT", "maybe", "option FOCUS_COMPILE_STRICT='maybe' is not valid; expected 1 or 0"),
        ("BUCKETS", "8;16", "option FOCUS_COMPILE_BUCKETS='8;16' is not valid; expected whole"),
        ("KEEP_RATIO", "half", "FOCUS_COMPILE_KEEP_RATIO='half' is not valid; expected a number"),
        ("KEEP_RATIO", "2", "keep_ratio=2.0 is not valid"),
        ("POLICY", "fast", "unknown policy 'fast'"),
    ],
)  # fmt: skip
def test_mirrors_out_of_range(name: str, text: str, expected: str) -> None:
    with pytest.raises(OptionError) as error:
        FocusConfig.from_options(environment={f"FOCUS_COMPILE_{name}": text})
    assert expected in str(error.value)


@pytest.mark.parametrize("text", ["abc", "3", "-1", "", "true"])
def test_verify_levels_out_of_range(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"option FOCUS_COMPILE_VERIFY={text!r} is not valid; expected 0, 1 or 2"
    monkeypatch.setenv("FOCUS_COMPILE_VERIFY", text)
    with pytest.raises(OptionError, match=message):
        FocusConfig.from_options()
    with pytest.raises(OptionError, match=message):
        focus_compile.compile(object())


@pytest.mark.parametrize("text", ["0", "1", "2"])
def test_verify_levels(text: str) -> None:
    assert verify_level({"FOCUS_COMPILE_VERIFY": text}) == int(text)
    assert verify_level({}) == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("POLCY", "did you mean 'FOCUS_COMPILE_POLICY'?"),
        ("KEEPRATIO", "did you mean 'FOCUS_COMPILE_KEEP_RATIO'?"),
        ("VERFY", "did you mean 'FOCUS_COMPILE_VERIFY'?"),
        ("DUMPS", "did you mean 'FOCUS_COMPILE_DUMP'?"),
        ("ZZZ", "known: FOCUS_COMPILE_BLOCK_LENGTH, "),
    ],
)
def test_misspelt_variables_are_reported_once(name: str, hint: str) -> None:
    forget()
    environment = {f"FOCUS_COMPILE_{name}": "1", "OTHER_COMPILE_POLCY": "1"}
    with pytest.warns(FocusWarning) as caught:
        configs = [FocusConfig.from_options(environment=environment) for _ in range(2)]
    assert configs == [FocusConfig()] * 2
    (warning,) = caught
    unknown = f"focus_compile: unknown environment variable 'FOCUS_COMPILE_{name}'; {hint}"
    assert str(warning.message).startswith(unknown)
    assert warning.filename == __file__


def test_known_variables_are_not_reported() -> None:
    names = [*DEBUG_VARIABLES, "WINDOW"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FocusConfig.from_options(environment={f"FOCUS_COMPILE_{name}": "1" for name in names})


def test_options_win_over_mode_and_environment() -> None:
    environment = {"FOCUS_COMPILE_WINDOW": "3", "FOCUS_COMPILE_POLICY": "exact"}
    config = FocusConfig.from_options({"window": 5}, environment=environment)
    assert (config.window, config.policy) == (5, "exact")
    config = FocusConfig.from_options(mode="prefix-cache", environment=environment)
    assert (config.window, config.policy) == (3, "prefix-cache")
    config = FocusConfig.from_options(mode="default", environment=environment)
    assert config.policy == "exact"


@pytest.mark.parametrize("mode", POLICIES)
def test_modes_are_policies(mode: str) -> None:
    assert FocusConfig.from_options(mode=mode, environment={}).policy == mode


@pytest.mark.parametrize("mode", TORCH_MODES)
def test_torchs_modes_choose_no_policy(mode: str) -> None:
    assert FocusConfig.from_options(mode=mode, environment={}) == FocusConfig()


@pytest.mark.parametrize("mode", ["reduce_overhead", "focus_dllm"])
def test_other_modes(mode: str) -> None:
    with pytest.raises(OptionError, match=f"unknown mode '{mode}'"):
        FocusConfig.from_options(mode=mode, environment={})


@pytest.mark.parametrize(
    ("layers", "given", "expected"),
    [(1, None, 0), (4, None, 1), (17, None, 5), (18, None, 6), (40, None, 6), (4, 9, 4), (4, 0, 0)],
)
def test_default_dense_layers(layers: int, given: int | None, expected: int) -> None:
    assert FocusConfig(dense_layers=given).dense_layers_for(layers) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "policy": st.sampled_from(POLICIES),
            "mask_token_id": st.none() | st.integers(0, 10**6),
            "keep_ratio": st.floats(0, 1),
            "refresh": st.sampled_from(["block", "every-step"]) | st.integers(1, 99),
            "buckets": st.none() | st.sets(st.integers(2, 999), min_size=1).map(sorted),
        },
    )
)
def test_json_round_trip(options: dict[str, Any]) -> None:
    assume("refresh" not in options or options.get("policy") != COMBINED)  # which does not read it
    config = FocusConfig.from_options(options, environment={})
    assert FocusConfig(**json.loads(json.dumps(config.to_dict()))) == config
    hash(config)


class Named:
    """A model of which only the config matters."""

    def __init__(self, **config: Any) -> None:
        self.config = type("Config", (), config)()


def test_the_mask_id_comes_from_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOCUS_COMPILE_MASK_TOKEN_ID", raising=False)
    assert options_for(Named(mask_token_id=5), {}) == {"mask_token_id": 5}
    assert options_for(Named(mask_token_id=0), {}) == {"mask_token_id": 0}
    assert options_for(Named(mask_id=7), {}) == {"mask_token_id": 7}
    assert options_for(Named(mask_token_id=5), {"mask_token_id": 6}) == {"mask_token_id": 6}
    assert options_for(Named(mask_token_id=None), {}) == {}
    assert options_for(object(), {}) == {}
    monkeypatch.setenv("FOCUS_COMPILE_MASK_TOKEN_ID", "9")
    assert options_for(Named(mask_token_id=5), {}) == {}


def test_compile_raises_at_once() -> None:
    with pytest.raises(OptionError, match="did you mean 'window'"):
        focus_compile.compile(object(), windw=3)
    with pytest.raises(OptionError, match=r"mode= is torch\.compile's; pass policy='dual-cache'"):
        focus_compile.compile(object(), mode="dual-cache")


def test_options_written_as_text() -> None:
    texts = ["keep-ratio=0.25", "refresh=3", "buckets=32,64", "strict=1", "merge_projections=none"]
    found = options_from_text(texts)
    assert found == {
        "keep_ratio": 0.25,
        "refresh": 3,
        "buckets": (32, 64),
        "strict": True,
        "merge_projections": None,
    }
    FocusConfig.from_options(found)
    assert options_from_text([]) == {}
