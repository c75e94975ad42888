"""A model compiled for block diffusion: what all generators of it share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from focus_compile.block_diffusion.programs import BlockPrograms
from focus_compile.block_diffusion.self_check import FirstBlocks
from focus_compile.block_diffusion.tracing import ModelCall, trace
from focus_compile.config import COMBINED, FocusConfig
from focus_compile.errors import OptionError, PassError, RefusalError

__all__ = ["COMPILED_KEY_OPTIONS", "BlockModel"]

COMPILED_KEY_OPTIONS = (
    "dense_layers", "dense_tail_layers", "sink_tokens", "key_block", "block_summary",
)  # fmt: skip
"""Options of the keys that programs depend on."""


@dataclass
class BlockModel:
    """Programs with the weights that they run on.

    arguments: the captured graph's inputs; weights are the model's own. max_length: tokens that its
    position tables reach.
    """

    programs: BlockPrograms
    arguments: Sequence[Any]
    config: FocusConfig
    max_length: int
    cut: int
    unchecked: FirstBlocks | None = field(default=None, repr=False)
    """What is compared with the model's own forward before the first step."""
    _versions: tuple[int, ...] = ()

    @classmethod
    def compile(
        cls,
        model: nn.Module,
        config: FocusConfig,
        max_length: int,
        cut: int,
        call: ModelCall,
    ) -> BlockModel:
        """Capture a call of `max_length` tokens, prove it block-causal, and build its programs.

        Raises:
            OptionError: the cut is no layer of the model that another one follows.
            RefusalError: the model cannot be captured, or is not block-causal with this block
                length; says where.
        """
        traced = trace(model, config, max_length, call)
        layers = len(traced.plan.sites)
        if cut >= layers:
            raise OptionError.invalid("cut", cut, f"a layer from 1 to {layers - 1}")
        try:
            programs = BlockPrograms.build(
                traced.captured, traced.pipeline, traced.plan, config.block_length, cut,
                config.lowering,
            )  # fmt: skip
        except PassError as error:
            raise RefusalError(f"focus_compile: no block-diffusion program: {error}") from None
        first_blocks = FirstBlocks(model, call, traced)
        made = cls(programs, traced.arguments, config, max_length, cut, first_blocks)
        made.refresh_weights()
        return made

    @property
    def device(self) -> torch.device:
        """Where the model's weights are, and with them all state."""
        ids: Tensor = self.arguments[self.programs.plan.ids.position]
        return ids.device

    def check_shared(self, config: FocusConfig, max_length: int) -> None:
        """Raise OptionError unless a generator with these options can run these programs."""
        combined = config.policy == COMBINED
        if combined and self.config.policy != COMBINED:
            raise OptionError(
                "BatchGenerator: the model is compiled to read all keys; pass the module itself "
                f"to compile it for {COMBINED}"
            )
        for name in ("block_length", *(COMPILED_KEY_OPTIONS if combined else ())):
            mine, given = getattr(self.config, name), getattr(config, name)
            if given != mine:
                raise OptionError.invalid(name, given, f"{mine!r}, as the model is compiled")
        if max_length > self.max_length:
            expected = f"at most {self.max_length}, as the model is compiled"
            raise OptionError.invalid("max_length", max_length, expected)

    def check_once(self) -> None:
        """Compare two blocks with the model's own forward, the first time only.

        Raises:
            RefusalError: they differ, now and in every later call.
        """
        if self.unchecked is not None:
            self.unchecked.check(self.programs, self.arguments)
            self.unchecked = None

    def refresh_weights(self) -> None:
        """Copy merged weights anew if any of the model's changed in place."""
        weights = (self.arguments[at] for at in self.programs.plan.positions("weight"))
        versions = tuple(0 if weight.is_inference() else weight._version for weight in weights)
        if versions != self._versions:
            self.programs.merge(self.arguments)
            self._versions = versions
