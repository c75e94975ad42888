"""SGLang: token eviction inside its dLLM forward, as the algorithm `FocusEvict`.

SGLang finds `register` by the entry point `focus` of `sglang.srt.plugins`, in all its processes:

    sglang serve --model-path JetLM/SDAR-1.7B-Chat --dllm-algorithm FocusEvict --disable-cuda-graph

docs/howto/serving.md says what was run, and what is refused.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from focus_compile.errors import FocusError
from focus_compile.fallback import warn_once

__all__ = ["TESTED", "register"]

TESTED = "0.5.23"
"""The version of SGLang that this was run with."""
ALGORITHM = "FocusEvict"


def register() -> None:
    """Make `FocusEvict` known to SGLang; may be called several times.

    Raises:
        FocusError: SGLang is missing, or is of a version that has no such hook.
    """
    found = _version()
    try:
        from sglang.srt.dllm.algorithm import algo_name_to_cls
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        from focus_compile.integrations.sglang.algorithm import FocusEvict
    except ImportError as error:
        raise FocusError(
            f"focus_compile: SGLang {found} lacks what the algorithm {ALGORITHM} is built on "
            f"({error}); it is known to work with {TESTED}"
        ) from error
    if found != TESTED:
        warn_once(f"focus_compile: {ALGORITHM} was tested with SGLang {TESTED}, this is {found}")
    if algo_name_to_cls.get(ALGORITHM) is FocusEvict:
        return
    algo_name_to_cls[ALGORITHM] = FocusEvict
    HookRegistry.register(
        "sglang.srt.dllm.config.DllmConfig.from_server_args", _with_mask, HookType.AFTER
    )


def _with_mask(config: Any, *arguments: Any, **named: Any) -> Any:
    """SGLang knows the mask of a model by its architecture; a file of settings may say another."""
    if config is not None and config.algorithm == ALGORITHM:
        config.mask_id = config.algorithm_config.get("mask_token_id", config.mask_id)
    return config


def _version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        raise FocusError(
            f"focus_compile: SGLang is not installed; pip install sglang=={TESTED}, or decode with "
            "focus_compile.decode.BatchGenerator, which needs no server"
        ) from None
