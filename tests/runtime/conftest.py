"""Tensors this small only wait for a second thread; graphs serve all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from focus_compile.backend import focus
from tests.compiled import shared_graphs


@pytest.fixture(autouse=True, scope="module")
def graphs_of_the_file() -> Iterator[None]:
    with shared_graphs(recompile_limit=64):
        yield


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    yield
    focus.reset()  # type: ignore[attr-defined]
