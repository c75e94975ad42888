"""What a cold start consists of."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cold_start import PHASES, child


def test_every_phase_is_measured(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--context", "128", "--lowering", "eager"]
    found = child(arguments, str(tmp_path))
    assert list(found) == list(PHASES)
    assert all(seconds >= 0 for seconds in found.values())
    assert found["trace_s"] > 0 < found["passes_s"]
