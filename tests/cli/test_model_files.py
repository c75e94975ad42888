"""Names of models: what is asked of the hub, how often, and what is said where it has nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    Qwen3Config,
    ViTConfig,
)

from focus_compile.errors import OptionError
from focus_compile.model_files import language_model_class, source_of


class HubError(Exception):
    """Stands for errors of the HTTP library."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the hub; answers are taken from the end."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answers: list[Any] = []
    questions: list[Any] = [answers]

    def metadata(url: str, **given: Any) -> None:
        questions.append((url, given))
        if answers:
            raise answers.pop()

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return questions


def without_response(kind: Any, text: str) -> Exception:
    """An error of the hub, whose class wants the response that it came with."""
    error: Exception = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (HubError("Name or service not known"), r"is not reached: Name or service not known\)"),
        (without_response(RepositoryNotFoundError, "404"), r"hf auth login"),
        (without_response(EntryNotFoundError, "404"), r"it has no config\.json"),
    ],
)
def test_the_hub_is_asked_once(asked: list[Any], answer: Exception, message: str) -> None:
    asked[0].append(answer)
    with pytest.raises(OptionError, match=message):
        source_of("nobody/nothing-1B")
    [(url, given)] = asked[1:]
    assert url.endswith("/nobody/nothing-1B/resolve/main/config.json")
    assert given == {"timeout": 10}


def test_a_model_that_the_hub_has(asked: list[Any]) -> None:
    assert source_of("somebody/something-1B") == "somebody/something-1B"
    assert len(asked) == 2


def test_offline_the_hub_is_not_asked(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert source_of("somebody/something-1B") == "somebody/something-1B"
    assert asked[1:] == []


def test_a_name_that_is_none(asked: list[Any]) -> None:
    asked[0].append(HubError("no network"))
    with pytest.raises(OptionError, match=r"tinny: .*did you mean 'tiny'\? Bundled: tiny"):
        source_of("tinny")
    with pytest.raises(OptionError, match="not a name of the hub"):
        source_of("two words")


@pytest.mark.parametrize(
    ("config", "trusted", "expected"),
    [
        (BertConfig(), False, AutoModelForMaskedLM),
        (BertConfig(architectures=["BertForCausalLM"]), False, AutoModelForCausalLM),
        (BertConfig(architectures=["BertModel"]), False, AutoModelForMaskedLM),
        (Qwen3Config(architectures=["Qwen3ForMaskedLM"]), False, AutoModelForCausalLM),
        (SimpleNamespace(auto_map={"AutoModel": "a.B"}), True, AutoModel),
        (
            SimpleNamespace(auto_map={"AutoModel": "a.B", "AutoModelForCausalLM": "a.C"}),
            True,
            AutoModelForCausalLM,
        ),
    ],
)
def test_the_class_that_loads_it(config: Any, trusted: bool, expected: Any) -> None:
    assert language_model_class("model", config, trusted) is expected


@pytest.mark.parametrize("config", [ViTConfig(), SimpleNamespace(auto_map={"AutoModel": "a.B"})])
def test_no_language_model(config: Any) -> None:
    with pytest.raises(OptionError, match=r"model: no language model of transformers has a "):
        language_model_class("model", config, False)
