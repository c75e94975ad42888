"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from focus_compile.demo.arms import Arm


@pytest.fixture
def quick_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms without Inductor: dense is the plain model, focus runs its programs op by op."""
    compile_arm = Arm.compile

    def compile_quickly(arm: Arm, model: Any) -> Any:
        return model if arm.options is None else compile_arm(arm, model)

    monkeypatch.setenv("FOCUS_COMPILE_LOWERING", "eager")
    monkeypatch.setattr(Arm, "compile", compile_quickly)
