"""A model compiled for block diffusion: what all generators of it share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from focus_compile.block_diffusion.programs import BlockPrograms
from focus_compile.block_diffusion.tracing import ModelCall, trace
from focus_compile.config import FocusConfig
from focus_compile.errors import OptionError, PassError, RefusalError

__all__ = ["BlockModel"]


@dataclass
class BlockModel:
    """Programs with the weights that they run on.

    arguments: the captured graph's inputs; weights are the model's own. max_length: tokens that its
    position tables reach.
    """

    programs: BlockPrograms
    arguments: Sequence[Any]
    block_length: int
    max_length: int
    mask_token_id: int
    cut: int
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
        assert config.mask_token_id is not None
        traced = trace(model, config, max_length, call)
        layers = len(traced.plan.sites)
        if cut >= layers:
            raise OptionError.invalid("cut", cut, f"a layer from 1 to {layers - 1}")
        length = config.block_length
        try:
            programs = BlockPrograms.build(
                traced.captured, traced.pipeline, traced.plan, length, cut, config.lowering
            )
        except PassError as error:
            raise RefusalError(f"focus_compile: no block-diffusion program: {error}") from None
        made = cls(programs, traced.arguments, length, max_length, config.mask_token_id, cut)
        made.refresh_weights()
        return made

    @property
    def device(self) -> torch.device:
        """Where the model's weights are, and with them all state."""
        ids: Tensor = self.arguments[self.programs.plan.ids.position]
        return ids.device

    def check_shared(self, block_length: int, max_length: int) -> None:
        """Raise OptionError unless a generator of these sizes can run these programs."""
        if block_length != self.block_length:
            raise OptionError.invalid(
                "block_length",
                block_length,
                f"{self.block_length}, which the model is compiled for",
            )
        if max_length > self.max_length:
            raise OptionError.invalid(
                "max_length",
                max_length,
                f"at most {self.max_length}, which the model is compiled for",
            )

    def refresh_weights(self) -> bool:
        """Copy merged weights anew if any of the model's changed in place; whether one did."""
        weights = (self.arguments[at] for at in self.programs.plan.positions("weight"))
        versions = tuple(0 if weight.is_inference() else weight._version for weight in weights)
        if versions == self._versions:
            return False
        self.programs.merge(self.arguments)
        self._versions = versions
        return True
