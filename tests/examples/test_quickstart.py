"""The notebook runs, and shows the answers it was stored with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"


def printed(notebook: Any) -> list[str]:
    """Standard output of every cell."""
    return [
        "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
def test_the_notebook_gives_the_answers_it_shows() -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3").execute()
    answers = [text.splitlines()[0] for text in printed(fresh) if text]
    assert answers[:2] == [text.splitlines()[0] for text in printed(stored) if text][:2]
    assert "refresh" in answers[2]
