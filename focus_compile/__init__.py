"""focus_compile: a torch.compile backend that makes diffusion language models fast.

model = torch.compile(model, backend="focus", options={"mask_token_id": 3})
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from focus_compile.config import FocusConfig
from focus_compile.errors import (
    FocusError,
    OptionError,
    RanksError,
    RecordError,
    RefusalError,
    SelfCheckError,
)
from focus_compile.explain import Explanation, explain
from focus_compile.fallback import FocusWarning
from focus_compile.frontend import compile, warmup
from focus_compile.runtime.record import StepRecord, record
from focus_compile.runtime.warm_up import WarmUp

if TYPE_CHECKING:
    from focus_compile.records.recorder import Recording, recording

__all__ = [
    "Explanation",
    "FocusConfig",
    "FocusError",
    "FocusWarning",
    "OptionError",
    "RanksError",
    "RecordError",
    "Recording",
    "RefusalError",
    "SelfCheckError",
    "StepRecord",
    "WarmUp",
    "__version__",
    "compile",
    "explain",
    "record",
    "recording",
    "warmup",
]

__version__: str

_MODULES = ("decode", "demo", "records", "report")
_RECORDER = ("Recording", "recording")


def __getattr__(name: str) -> Any:
    """Modules and names that are imported when first used, so that importing this one is light, and
    the version."""
    if name in _MODULES:
        return importlib.import_module(f"focus_compile.{name}")
    if name in _RECORDER:
        return getattr(importlib.import_module("focus_compile.records.recorder"), name)
    if name == "__version__":
        return importlib.metadata.version("focus-compile")
    raise AttributeError(f"module 'focus_compile' has no attribute {name!r}")
