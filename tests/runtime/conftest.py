"""Tensors this small only wait for a second thread; graphs serve all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from focus_compile.backend import focus


@pytest.fixture(autouse=True, scope="module")
def shared_graphs() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOCUS_COMPILE_VERIFY", "0")
        yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    yield
    focus.reset()  # type: ignore[attr-defined]
