"""What a cold start consists of."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cold_start import PHASES, child, is_deep


def test_every_phase_is_measured(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--context", "128", "--lowering", "eager"]
    found = child(arguments, str(tmp_path))
    assert list(found) == list(PHASES)
    assert all(seconds >= 0 for seconds in found.values())
    assert found["trace_s"] > 0 < found["passes_s"]


def test_deep_shapes_are_also_compiled_in_one_graph() -> None:
    assert is_deep("llada", None)
    assert is_deep("tiny", 8)
    assert not is_deep("tiny", None)
    assert not is_deep("llada", 7)
