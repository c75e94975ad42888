"""Runs written down: `recording`, `Record.load`, `replay`, `compare`. JSON, tensors beside it."""

from focus_compile.records.compare import Comparison, Difference, compare
from focus_compile.records.document import Record
from focus_compile.records.recorder import Recording, recording
from focus_compile.records.replay import replay

__all__ = ["Comparison", "Difference", "Record", "Recording", "compare", "recording", "replay"]
