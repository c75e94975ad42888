"""`doctor`: what it finds, and a self-test that can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from focus_compile import demo
from focus_compile.cli import app
from focus_compile.doctor import hardware, settings, software
from focus_compile.doctor.check import NOTE, OK, PROBLEM, Check
from focus_compile.doctor.self_test import SelfTest, check_inductor, self_test

runner = CliRunner()


def statuses(environment: dict[str, str]) -> dict[str, str]:
    return {check.name: check.status for check in settings.checks(environment)}


def test_a_sound_installation_passes() -> None:
    result = runner.invoke(app, ["doctor", "--json", "-"])
    found = json.loads(result.stdout)
    names = [check["name"] for check in found["checks"]]
    for name in ("python", "torch", "transformers", "triton", "CPU", "GPU", "self-test"):
        assert any(name in each for each in names)
    test = found["self_test"]
    assert test["focus_right"] == test["dense_right"] == test["asked"] == 2
    assert test["programs"] == {"refresh": 2, "step": 30}
    assert test["same_tokens"] == 32
    expected = not any(check["status"] == PROBLEM for check in found["checks"])
    assert found["ok"] is expected
    assert result.exit_code == (0 if expected else 1)
    assert "self-test" in result.stderr


def test_an_error_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(demo, "load", load)
    monkeypatch.setattr("focus_compile.doctor.examine", list)
    monkeypatch.setattr(
        "focus_compile.doctor.self_test.check_inductor", lambda device: Check("Inductor", OK, "")
    )
    result = runner.invoke(app, ["doctor", "--json", "-"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["ok"]
    assert found["self_test"] is None
    assert found["checks"][-1]["found"] == "RuntimeError: no such kernel"
    with pytest.raises(RuntimeError, match="no such kernel"):
        self_test(debug=True)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, OK, "32 of 32 tokens"),
        ({"same_tokens": 30}, NOTE, "30 of 32 tokens"),
        ({"dense_right": 0, "focus_right": 0}, PROBLEM, "the plain model answers wrongly"),
        ({"focus_right": 1}, PROBLEM, "focus answers wrongly"),
        ({"programs": {"exact": 32}}, PROBLEM, "no call was incremental"),
    ],
)
def test_verdicts_of_the_self_test(changes: dict[str, Any], status: str, words: str) -> None:
    known: dict[str, Any] = {
        "lowering": "eager",
        "device": "cpu",
        "tokens": 32,
        "same_tokens": 32,
        "dense_right": 2,
        "focus_right": 2,
        "asked": 2,
        "programs": {"refresh": 2, "step": 30},
        "seconds": 1.0,
    }
    check = SelfTest(**(known | changes)).check()
    assert check.status == status
    assert words in check.found


def test_variables_of_the_environment() -> None:
    assert statuses({}) == {"environment": OK}
    assert statuses({"FOCUS_COMPILE_KEEP_RATIO": "0.25"}) == {"FOCUS_COMPILE_KEEP_RATIO": OK}
    assert statuses({"FOCUS_COMPILE_REFERENCE": "1"}) == {"FOCUS_COMPILE_REFERENCE": NOTE}
    assert statuses({"FOCUS_COMPILE_VERIFY": "2"}) == {"FOCUS_COMPILE_VERIFY": NOTE}
    assert statuses({"FOCUS_COMPILE_VERIFY": "1"}) == {"FOCUS_COMPILE_VERIFY": OK}
    assert statuses({"FOCUS_COMPILE_WINDW": "4"}) == {"environment": NOTE}
    assert statuses({"FOCUS_COMPILE_WINDOW": "no"}) == {"environment": PROBLEM}
    assert statuses({"TORCHDYNAMO_DISABLE": "1"}) == {"TORCHDYNAMO_DISABLE": PROBLEM}
    (unknown,) = settings.checks({"FOCUS_COMPILE_WINDW": "4"})
    assert "did you mean 'FOCUS_COMPILE_WINDOW'" in unknown.found


def test_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    check = software._compiler()
    assert check.status == PROBLEM
    assert "g++" in check.advice
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    assert "Python.h is missing" in software._compiler().found


def test_what_inductor_raises_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Any) -> Any:
        raise OSError("g++: not found")

    monkeypatch.setattr(torch, "compile", compile)
    check = check_inductor("cpu")
    assert check.status == PROBLEM
    assert check.found == "OSError: g++: not found"


def test_triton_interpreted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert software.triton().status == PROBLEM
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert software.triton().status == OK


def test_releases_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert "newer than" in software._torch_release().found
    monkeypatch.setattr(software, "requires", lambda name: ["torch>=3", "no-such-package>=1"])
    old, missing = software._required()
    assert (old.status, missing.status) == (PROBLEM, PROBLEM)
    assert ">=3 is needed" in old.found
    assert missing.advice == 'pip install "no-such-package>=1"'


@pytest.mark.parametrize(
    ("capability", "free", "status"),
    [
        ((9, 0), 1 << 36, OK),
        ((9, 0), 1 << 30, NOTE),
        ((7, 5), 1 << 36, NOTE),
        ((6, 1), 1 << 36, PROBLEM),
    ],
)
def test_verdicts_on_gpus(capability: tuple[int, int], free: int, status: str) -> None:
    assert hardware.gpu_check("GPU 0", "a GPU", capability, free).status == status


def test_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: 1 << 29)
    check = hardware._memory()
    assert check is not None
    assert check.status == NOTE
    assert check.found == "512.00 MiB available"
