"""What must hold before anything is reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.arms import ArmOptions, make_arm
from benchmarks.suite.cells import BEYOND, Cell
from benchmarks.suite.floors import Floor
from benchmarks.suite.loop import Canvas, commit, counts_of_block
from benchmarks.suite.measure import Measurement
from benchmarks.suite.peers.compiled import Compiled
from benchmarks.suite.peers.vanilla import VanillaEager
from benchmarks.suite.shapes import Shape, build

__all__ = [
    "Refused",
    "check_everything_active",
    "check_floor",
    "check_measurement",
    "peers_agreement",
]

SMALL_LAYERS = 4
SMALL_CONTEXT = 1024
CHECKED_CALLS = 6
ROW_ERROR = {torch.bfloat16: 5e-2, torch.float32: 1e-3}
"""Largest relative error of a row of logits, ||row - vanilla row|| / ||vanilla row||."""


class Refused(Exception):
    """A check is red, so nothing of this model is reported."""


def check_everything_active(
    shape: Shape, device: torch.device, dtype: torch.dtype, block: int, **options: Any
) -> dict[str, Any]:
    """alpha=1 with windows over the whole sequence must decode vanilla's tokens.

    On a shallow model of the same shape, a block entered and stepped through, both arms called on
    vanilla's ids. Where a chosen position or token differs, the rows' logits must still agree
    within rounding (a tie). Outputs are poisoned after each call.

    Raises:
        Refused: they differ, or a value is not finite.
    """
    small = _shallow(shape)
    model = build(small, device, dtype)
    canvas = Canvas.random(small, _context(shape), 2 * block, block, device, seed=7)
    vanilla = VanillaEager(model)
    chosen = shape.options | options
    chosen |= {"keep_ratio": 1.0, "window": 2 * canvas.length, "block_length": block}
    ours = Compiled(model, "g", mask_token_id=shape.mask_token_id, strict=True, **chosen)
    same, worst, programs = 0, 0.0, []
    per_step = max(1, block // (CHECKED_CALLS // 2))
    calls = 0
    for index in range(2):
        at = canvas.block(index)
        for count in counts_of_block(block, per_step):
            theirs = vanilla(canvas, at).clone()
            logits = ours(canvas, at)
            worst = max(worst, _row_error(logits, theirs))
            programs.append(ours.ran.program)
            copy = Canvas(canvas.ids.clone(), canvas.prompt, block, canvas.mask_token_id)
            finite = bool(commit(copy, at, logits, count))
            ours.poison()
            commit(canvas, at, theirs, count)
            same += bool(torch.equal(copy.ids, canvas.ids))
            calls += 1
            limit = ROW_ERROR[dtype]
            if not finite or not worst <= limit:
                raise Refused(
                    f"alpha=1 with all rows active: call {calls} ({ours.ran.program}) differs from "
                    f"vanilla by {worst:.2g} of a row (limit {limit:g}), finite={finite}"
                )
    ours.release()
    expected = [p for _ in range(2) for p in ["refresh"] + ["step"] * (calls // 2 - 1)]
    if programs != expected:
        raise Refused(f"alpha=1: the calls ran {programs}, not {expected}")
    return {"calls": calls, "same_tokens": same, "worst_row_error": worst, "layers": small.layers}


def peers_agreement(
    shape: Shape, device: torch.device, block: int, options: ArmOptions, alpha: float = 0.5
) -> dict[str, float]:
    """Largest relative error of a row of (d) against (c), and of (f) and (g) against (e).

    In float32 on a shallow model, on the same ids, one block entered and stepped through. Not a
    refusal: choices of blocks that differ by rounding show here too.
    """
    small = _shallow(shape)
    model = build(small, device, torch.float32)
    cell = Cell(shape.name, _context(shape), block, max(1, block // CHECKED_CALLS), alpha)
    found: dict[str, float] = {}
    for reference, others in (("c", "d"), ("e", "fg")):
        canvas = Canvas.random(small, cell.context, block, block, device, seed=11)
        chosen = replace(options, ours=options.ours | {"dense_if_faster": False})
        arms = {a: make_arm(a, model, small, cell, chosen) for a in reference + others}
        for arm in arms.values():
            arm.begin(canvas)
        at = canvas.block(0)
        for count in counts_of_block(block, cell.per_step):
            logits = {letter: arm(canvas, at).clone() for letter, arm in arms.items()}
            for letter in others:
                error = _row_error(logits[letter], logits[reference])
                name = f"{letter} against {reference}"
                found[name] = max(found.get(name, 0.0), error)
            commit(canvas, at, logits[reference], count)
        for arm in arms.values():
            arm.release()
    return found


def _shallow(shape: Shape) -> Shape:
    """Few layers, yet some in every region."""
    return shape.with_layers(SMALL_LAYERS + shape.options.get("dense_tail_layers", 0))


def _context(shape: Shape) -> int:
    return 128 if shape.name == "tiny" else SMALL_CONTEXT


def _row_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.float(), theirs.float()
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)
    return float(error.max()) if bool(error.isfinite().all()) else float("inf")


def check_measurement(arm: str, measured: Measurement) -> None:
    """Finite outputs, and exactly one refresh per block, at its entry.

    Raises:
        Refused: otherwise.
    """
    if not all(call.finite for call in measured.cold + measured.calls):
        raise Refused(f"arm {arm}: logits are not finite (or a row was never written)")
    if arm in "ab":
        return
    per_block = len(measured.calls) // measured.blocks
    steps = ["step"] * (per_block - 1)
    later = ["partial" if arm in BEYOND else "refresh", *steps]
    expected = ["refresh", *steps, *later * (measured.blocks - 1)]
    programs = [call.program for call in measured.calls]
    if programs != expected:
        raise Refused(
            f"arm {arm}: {len(measured.refreshes)} refreshes in {measured.blocks} blocks of "
            f"{per_block} calls, or not at their entry"
        )


def check_floor(what: str, milliseconds: float, floor: Floor, slack: float = 0.05) -> None:
    """A time below what the ceilings of this run allow means that something was not computed.

    Raises:
        Refused: more than `slack` below; clocks vary by as much between calls.
    """
    if milliseconds < floor.impossible_ms * (1 - slack):
        raise Refused(
            f"{what} took {milliseconds:.3f} ms, below its floor of {floor.impossible_ms:.3f} ms"
        )
