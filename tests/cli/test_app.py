"""The app: help, version, and errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
from typer.testing import CliRunner

from focus_compile.cli import app
from focus_compile.demo import showcase
from focus_compile.errors import RefusalError
from focus_compile.fallback import FocusWarning

runner = CliRunner()
COMMANDS = ("bench", "demo", "doctor", "explain", "fidelity", "generate")


def raising(error: BaseException) -> Any:
    def run(*arguments: object) -> None:
        raise error

    return run


def test_help_names_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f" {name} " in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output


def test_help_needs_no_transformers() -> None:
    program = "import sys, focus_compile.cli; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("focus-compile ")


def test_an_unknown_command_is_a_usage_error() -> None:
    result = runner.invoke(app, ["explian", "tiny"])
    assert result.exit_code == 2
    assert "Did you mean 'explain'" in result.output


def test_an_error_that_torch_wrapped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> None:
        try:
            raise RefusalError("layer 1 mixes tokens")
        except RefusalError as error:
            raise RuntimeError("backend failed") from error

    monkeypatch.setattr(showcase, "run", run)
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 2
    assert result.stderr == "error: layer 1 mixes tokens\n"


def test_errors_that_nobody_foresaw_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showcase, "run", raising(ZeroDivisionError("of [nothing]\nby zero")))
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ZeroDivisionError: of [nothing] (")
    assert result.stderr.count("\n") == 1
    assert "--debug" in result.stderr


def test_debug_keeps_the_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showcase, "run", raising(RefusalError("layer 1 mixes tokens")))
    result = runner.invoke(app, ["--debug", "demo"])
    assert isinstance(result.exception, RefusalError)
    # and only there
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 2


def test_warnings_of_ours_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> None:
        warnings.warn("runs the exact program", FocusWarning, stacklevel=2)
        raise RefusalError("stop")

    monkeypatch.setattr(showcase, "run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = runner.invoke(app, ["demo"])
    assert result.stderr == "warning: runs the exact program\nerror: stop\n"


def test_json_on_standard_output_is_alone_there(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = showcase.ArmResult(3, 3, 10.0, 20.0, 32, 6144)
    found = showcase.ShowcaseResult(arm, arm, same_answers=True, settings={"length": 192})
    monkeypatch.setattr(showcase, "run", lambda settings, console: found)
    result = runner.invoke(app, ["demo", "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["speedup"] == 1
    assert "the same answers as dense" in result.stderr
