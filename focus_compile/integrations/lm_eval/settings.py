"""What `--model_args` mean: options of FocusConfig, of the sampler and of the likelihood."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from focus_compile.config import BLOCK_POLICIES, FocusConfig
from focus_compile.errors import OptionError
from focus_compile.fallback import warn_once

__all__ = ["BACKENDS", "LMSettings", "Request", "split_arguments"]

BACKENDS = ("focus", "inductor", "eager")
PADDINGS = ("left", "none")
NEUTRAL = {"do_sample", "temperature", "until", "max_gen_toks"}
"""Generation arguments of any model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LMSettings:
    """How `focus_dllm` decodes and scores; every field is a model argument."""

    backend: str = "focus"
    """What runs the model while it decodes: "focus", or the dense model: "inductor" compiled,
    "eager" as it is. Likelihoods are always those of the dense model, compiled unless "eager"."""
    tokens_per_step: int = 1
    """Tokens of each sequence that a call decodes. Also in gen_kwargs."""
    threshold: float | None = None
    """Decode all that is at least so probable, instead of a fixed number. Also in gen_kwargs."""
    gen_length: int | None = None
    """Tokens of every response, whatever the task's `max_gen_toks` says."""
    padding: str = "left"
    """Prompts of different length in one batch: padded on the "left" under an attention mask, or
    "none": only prompts of one length share a batch, and the model gets no mask."""
    block_diffusion: bool | None = None
    """The model attends block-causally, given the mask. None: where its config has a
    `block_length`, or the policy is one for block diffusion."""
    shift_logits: bool | None = None
    """The row before a position scores it, as in Dream. None: where config.model_type is Dream."""
    mc_num: int = 128
    """Random masks per likelihood."""
    check_greedy: bool = True
    """Whether likelihoods say if greedy decoding gives the continuation (`is_greedy`)."""
    seed: int = 0
    """Of the random masks, and of sampling at a temperature."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise OptionError.unknown(str(self.backend), BACKENDS, kind="backend")
        if self.padding not in PADDINGS:
            raise OptionError.unknown(str(self.padding), PADDINGS, kind="padding")
        for name in ("tokens_per_step", "mc_num"):
            _check_whole(name, getattr(self, name))
        if self.gen_length is not None:
            _check_whole("gen_length", self.gen_length)
        _check_threshold(self.threshold)

    def is_block_diffusion(self, model_config: Any, policy: str | None) -> bool:
        """Whether the model is called under a block-causal mask."""
        if self.block_diffusion is not None:
            return self.block_diffusion
        named = getattr(model_config, "block_length", None) is not None
        return named if policy is None else policy in BLOCK_POLICIES

    def is_shifted(self, model_config: Any) -> bool:
        """Whether the row before a position scores it."""
        if self.shift_logits is not None:
            return self.shift_logits
        return str(getattr(model_config, "model_type", "")).lower() == "dream"


@dataclass(frozen=True, slots=True)
class Request:
    """How one prompt is continued: lm-eval's gen_kwargs over the model arguments."""

    max_tokens: int
    stop: tuple[str, ...]
    temperature: float
    tokens_per_step: int
    threshold: float | None

    @classmethod
    def of(cls, gen_kwargs: Mapping[str, Any], settings: LMSettings, max_gen_toks: int) -> Request:
        """From gen_kwargs as lm-eval normalises them.

        Raises:
            OptionError: a value out of range. Arguments that nothing reads are reported once.
        """
        own: dict[str, Any] = {
            "tokens_per_step": settings.tokens_per_step,
            "threshold": settings.threshold,
        }
        for name in sorted(set(gen_kwargs) - NEUTRAL - set(own)):
            warn_once(f"focus_dllm does not read the generation argument {name!r}")
        own |= {name: gen_kwargs[name] for name in own if name in gen_kwargs}
        _check_whole("tokens_per_step", own["tokens_per_step"])
        _check_threshold(own["threshold"])
        length = settings.gen_length or gen_kwargs.get("max_gen_toks") or max_gen_toks
        _check_whole("max_gen_toks", length)
        stop = tuple(text for text in gen_kwargs.get("until") or () if text)
        temperature = float(gen_kwargs.get("temperature") or 0.0)
        return cls(int(length), stop, temperature, own["tokens_per_step"], own["threshold"])


def split_arguments(
    arguments: Mapping[str, Any], theirs: Iterable[str]
) -> tuple[LMSettings, dict[str, Any], dict[str, Any]]:
    """(settings, options of FocusConfig, arguments of lm-eval's own Hugging Face model).

    theirs: names that lm-eval's model takes; others go on to `from_pretrained`.

    Raises:
        OptionError: a value out of range, or a name close to one of ours.
    """
    own = {field.name for field in dataclasses.fields(LMSettings)}
    options = {field.name for field in dataclasses.fields(FocusConfig)}
    found: tuple[dict[str, Any], ...] = ({}, {}, {})
    theirs = set(theirs)
    for name, value in arguments.items():
        known = (name in own, name in options, True)
        found[known.index(True)][name] = value
        if name not in own | options | theirs and difflib.get_close_matches(
            name, own | options, n=1, cutoff=0.8
        ):
            raise OptionError.unknown(name, own | options, kind="model argument")
    FocusConfig.from_options(found[1])
    return LMSettings(**found[0]), found[1], found[2]


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError.invalid(name, value, "a whole number >= 1")


def _check_threshold(value: object) -> None:
    if value is not None and (not isinstance(value, (int, float)) or not 0 <= value <= 1):
        raise OptionError.invalid("threshold", value, "a probability between 0 and 1")
