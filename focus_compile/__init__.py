"""focus_compile: a torch.compile backend that makes diffusion language models fast.

model = torch.compile(model, backend="focus", options={"mask_token_id": 3})
"""

import importlib
from types import ModuleType

from focus_compile.config import FocusConfig
from focus_compile.errors import FocusError, OptionError, RefusalError, SelfCheckError
from focus_compile.explain import Explanation, explain
from focus_compile.fallback import FocusWarning
from focus_compile.frontend import compile, warmup
from focus_compile.runtime.record import StepRecord, record
from focus_compile.runtime.warm_up import WarmUp

__all__ = [
    "Explanation",
    "FocusConfig",
    "FocusError",
    "FocusWarning",
    "OptionError",
    "RefusalError",
    "SelfCheckError",
    "StepRecord",
    "WarmUp",
    "compile",
    "explain",
    "record",
    "warmup",
]


def __getattr__(name: str) -> ModuleType:
    """`focus_compile.decode` and `focus_compile.demo`, imported when first named."""
    if name in ("decode", "demo"):
        return importlib.import_module(f"focus_compile.{name}")
    raise AttributeError(f"module 'focus_compile' has no attribute {name!r}")
