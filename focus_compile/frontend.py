"""`focus_compile.compile`: torch.compile with what the model's own config already says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from focus_compile.config import FocusConfig
from focus_compile.distributed.check import check_split
from focus_compile.errors import OptionError
from focus_compile.runtime.record import record
from focus_compile.runtime.warm_up import WarmUp, warming_up
from focus_compile.settings_file import settings_in

__all__ = ["compile", "known_mask_token_id", "options_for", "warmup"]

Model = TypeVar("Model")
MASK_NAMES = ("mask_token_id", "mask_id", "mask_token_index")


def known_mask_token_id(model: Any) -> Any:
    """What `model.config` calls the mask token's id, or None."""
    config = getattr(model, "config", None)
    known = (getattr(config, name, None) for name in MASK_NAMES)
    return next((value for value in known if value is not None), None)


def options_for(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, with `mask_token_id` from `model.config` where neither they nor the environment
    give it. Warns where their settings file is another model's.

    Raises:
        OptionError: an unknown or invalid option.
    """
    if FocusConfig.from_options(options).mask_token_id is None:
        mask_token_id = known_mask_token_id(model)
        if mask_token_id is not None:
            options = options | {"mask_token_id": mask_token_id}
            FocusConfig.from_options(options)
    settings = settings_in(options)
    if settings is not None:
        settings.check_model(model)
    return options


def compile(model: Model, **options: Any) -> Model:
    """`torch.compile(model, backend="focus", options=options)`, mask id filled in.

    Args:
        model: a module or a function over one. `model.config.mask_token_id` is used if it exists.
        options: fields of FocusConfig, `settings` (a file that `focus-compile tune` wrote), plus
            `fullgraph` and `dynamic` of torch.compile.

    Raises:
        OptionError: an unknown or invalid option, at once rather than at the first call.
        RanksError: the model is split over ranks in a way that cannot work.
    """
    if "mode" in options:
        raise OptionError(
            f"focus_compile: mode= is torch.compile's; pass policy={options['mode']!r} instead."
        )
    ours = {k: v for k, v in options.items() if k not in ("fullgraph", "dynamic")}
    theirs = {k: v for k, v in options.items() if k in ("fullgraph", "dynamic")}
    from focus_compile.backend import focus, trace_past_logging

    trace_past_logging()
    check_split(model)
    return torch.compile(model, backend=focus, options=options_for(model, ours), **theirs)  # type: ignore[call-overload]


def warmup(model: Callable[..., Any], *inputs: Any, **named: Any) -> tuple[WarmUp, ...]:
    """Compile a focus-compiled model and capture its steps before the first prompt arrives.

    Calls the model once, then runs a step of every bucket of up to 256 rows twice: on a GPU each is
    a CUDA graph afterwards. What was captured serves every later prompt of these sizes (with
    `logits="response"`, of the same split into prompt and response). The next call starts anew.

    Args:
        model: what `focus_compile.compile` or `torch.compile(backend="focus")` returned.
        inputs, named: of a call: ids whose response is masks, and whatever else calls will have.
            Tensors among them are copied: what a loop in one function with its sampler writes into
            its ids stays here.

    Returns:
        What was prepared, for each graph of the model.

    Raises:
        OptionError: the call ran the exact program; says why.
    """
    inputs, named = tree_map_only(torch.Tensor, torch.clone, (inputs, named))
    with torch.no_grad(), record() as history, warming_up() as found:
        model(*inputs, **named)
    if not found:
        why = history[-1].why if history else "the model is not compiled by focus_compile"
        raise OptionError(f"warmup: nothing was prepared: {why}.")
    return tuple(found)
