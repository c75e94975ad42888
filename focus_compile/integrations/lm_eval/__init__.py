"""lm-evaluation-harness with diffusion language models: importing this registers `focus_dllm`.

lm-eval finds no models by entry points, so one of these imports it:

    focus-compile eval MODEL --tasks ...                         dense against focus, side by side
    python -m focus_compile.integrations.lm_eval run --model focus_dllm ...      lm-eval's own CLI
    import focus_compile.integrations.lm_eval                    before `lm_eval.simple_evaluate`

`TASKS` is the folder with this package's own tasks, for `include_path`.
"""

from __future__ import annotations

from pathlib import Path

from focus_compile.errors import OptionError

try:
    import lm_eval as _lm_eval  # noqa: F401
except ImportError as error:
    raise OptionError(
        "focus_compile.integrations.lm_eval needs lm-eval: pip install 'focus-compile[lm-eval]'"
    ) from error

from focus_compile.integrations.lm_eval.model import FocusLM
from focus_compile.integrations.lm_eval.settings import LMSettings
from focus_compile.integrations.lm_eval.work import Work

__all__ = ["TASKS", "FocusLM", "LMSettings", "Work"]

TASKS = Path(__file__).resolve().parents[1] / "tasks"
"""The folder of `focus_retrieval`, a long-context task that needs no download."""
