"""Makes the arm that a letter names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.suite.cells import BEYOND, Cell
from benchmarks.suite.loop import Arm
from benchmarks.suite.peers.compiled import Compiled
from benchmarks.suite.peers.dual_cache import FastDllm
from benchmarks.suite.peers.focus_eager import FocusEager
from benchmarks.suite.peers.focus_flex import FocusFlex
from benchmarks.suite.peers.vanilla import VanillaEager, VanillaInductor
from benchmarks.suite.policy import FocusSettings, known_options
from benchmarks.suite.shapes import Shape

__all__ = ["ArmOptions", "make_arm"]

POLICIES = {"d": "dual-cache", "g": "focus-dllm", "h": "focus-dllm", "i": "focus-dllm"}


@dataclass(frozen=True)
class ArmOptions:
    """How the arms are made. `focus` are fields of FocusConfig for all focus arms, `ours` for the
    compiled ones alone."""

    lowering: str = "inductor"
    dynamic: bool = False
    """Whether contexts share a compiled program: their canvases are marked."""
    focus: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def torch_dynamic(self) -> bool | None:
        """`torch.compile`'s: what is marked is dynamic, and nothing but sizes."""
        return None if self.dynamic else False

    def settings(self, shape: Shape, alpha: float) -> FocusSettings:
        return FocusSettings.of(shape, alpha, **self.focus)

    def compiled(self, shape: Shape, **fixed: Any) -> dict[str, Any]:
        """Options of `focus_compile.compile`; a refusal of the model is an error."""
        wanted = {"mask_token_id": shape.mask_token_id, "logits": "response", "strict": True}
        chosen = shape.options | self.focus | wanted | {"lowering": self.lowering}
        return known_options(**(chosen | self.ours | fixed)) | {"dynamic": self.torch_dynamic}


def make_arm(letter: str, model: nn.Module, shape: Shape, cell: Cell, options: ArmOptions) -> Arm:
    """The arm for a cell; nothing is compiled before its first call."""
    if letter == "a":
        return VanillaEager(model)
    if letter == "b":
        return VanillaInductor(model, options.lowering, options.torch_dynamic)
    if letter == "c":
        return FastDllm(model)
    if letter in POLICIES:
        fixed = {"policy": POLICIES[letter], "block_length": cell.block, "keep_ratio": cell.alpha}
        fixed |= BEYOND.get(letter, {})
        return Compiled(model, letter, **options.compiled(shape, **fixed))
    settings = options.settings(shape, cell.alpha)
    return {"e": FocusEager, "f": FocusFlex}[letter](model, settings)
