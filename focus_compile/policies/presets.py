"""The policy that a configuration names."""

from __future__ import annotations

from focus_compile.config import LOSSLESS, FocusConfig
from focus_compile.policies.base import Policy
from focus_compile.policies.block_caches import DualCache, PrefixCache
from focus_compile.policies.focus_dllm import FocusDllm

__all__ = ["policy_for"]


def policy_for(config: FocusConfig) -> Policy | None:
    """None for "exact": every call runs the exact program."""
    if config.policy == "focus-dllm":
        return FocusDllm(config.expansion, config.window)
    if config.policy in ("dual-cache", LOSSLESS):
        return DualCache()
    if config.policy == "prefix-cache":
        return PrefixCache()
    return None
