"""`focus_compile.compile`: torch.compile with what the model's own config already says."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from focus_compile.config import FocusConfig
from focus_compile.errors import OptionError

__all__ = ["compile", "known_mask_token_id", "options_for"]

Model = TypeVar("Model")
MASK_NAMES = ("mask_token_id", "mask_id", "mask_token_index")


def known_mask_token_id(model: Any) -> Any:
    """What `model.config` calls the mask token's id, or None."""
    config = getattr(model, "config", None)
    known = (getattr(config, name, None) for name in MASK_NAMES)
    return next((value for value in known if value is not None), None)


def options_for(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, with `mask_token_id` from `model.config` where neither they nor the environment
    give it.

    Raises:
        OptionError: an unknown or invalid option.
    """
    if FocusConfig.from_options(options).mask_token_id is None:
        mask_token_id = known_mask_token_id(model)
        if mask_token_id is not None:
            options = options | {"mask_token_id": mask_token_id}
            FocusConfig.from_options(options)
    return options


def compile(model: Model, **options: Any) -> Model:
    """`torch.compile(model, backend="focus", options=options)`, mask id filled in.

    Args:
        model: a module or a function over one. `model.config.mask_token_id` is used if it exists.
        options: fields of FocusConfig, plus `fullgraph` and `dynamic` of torch.compile.

    Raises:
        OptionError: an unknown or invalid option, at once rather than at the first call.
    """
    if "mode" in options:
        raise OptionError(
            f"focus_compile: mode= is torch.compile's; pass policy={options['mode']!r} instead."
        )
    ours = {k: v for k, v in options.items() if k not in ("fullgraph", "dynamic")}
    theirs = {k: v for k, v in options.items() if k in ("fullgraph", "dynamic")}
    from focus_compile.backend import focus

    return torch.compile(model, backend=focus, options=options_for(model, ours), **theirs)  # type: ignore[call-overload]
