"""A case: an architecture, its weights, options and trajectories, all as JSON holds them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from focus_compile.config import BLOCK_POLICIES, COMBINED
from tests.fuzz.architecture import CHOICES, MASK, PAD, VOCAB, Architecture
from tests.fuzz.source import source_of
from tests.strategies import (
    EVERYTHING,
    ORDERS,
    Trajectory,
    TrajectorySpec,
    growing_specs,
    policy_options,
    seeds,
    trajectory_specs,
)

__all__ = ["CORPUS", "Case", "architectures", "cases", "reproduction"]

CORPUS = Path(__file__).parent / "corpus"
"""Cases that were once wrong, one a file."""
POLICIES = ("focus-dllm", "dual-cache", "prefix-cache")
BLOCK_LENGTHS = (8, 4)


@dataclass(frozen=True)
class Case:
    """One model, compiled once, that decodes one trajectory after another."""

    architecture: Architecture
    trajectories: tuple[TrajectorySpec, ...]
    options: dict[str, Any]
    dynamic: bool | None = False
    """`torch.compile`'s: None makes the length a symbol when it changes."""
    seed: int = 0
    """Of the weights."""

    def calls(self) -> list[Trajectory]:
        return [spec.make(VOCAB, MASK, PAD) for spec in self.trajectories]

    def to_dict(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture.to_dict(),
            "trajectories": [dataclasses.asdict(spec) for spec in self.trajectories],
            "options": self.options,
            "dynamic": self.dynamic,
            "seed": self.seed,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        return cls(
            Architecture(**values["architecture"]),
            tuple(TrajectorySpec(**_tuples(spec)) for spec in values["trajectories"]),
            _tuples(values["options"]),
            values["dynamic"],
            values["seed"],
        )

    @classmethod
    def from_json(cls, text: str) -> Case:
        return cls.from_dict(json.loads(text))


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def reproduction(case: Case, device: str, lowering: str) -> str:
    """The case as a script: its model as source, and the judge that it failed before."""
    arguments = f"Case.from_json(CASE), {device!r}, {lowering!r}"
    return (
        f"{source_of(case.architecture)}\n\n"
        f'CASE = """{case.to_json()}"""\n\n'
        'if __name__ == "__main__":  # in the root of the repository\n'
        "    from tests.fuzz.case import Case\n"
        "    from tests.fuzz.judge import judge\n\n"
        f"    print(judge({arguments}))\n"
    )


Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def architectures(draw: Draw) -> Architecture:
    """Any architecture; fields that exclude one another are drawn one after another."""
    chosen: dict[str, Any] = {}

    def pick(name: str, *barred: Any) -> None:
        allowed = [value for value in CHOICES[name] if value not in barred]
        chosen[name] = draw(st.sampled_from(allowed))

    for name in ("attention", "position", "groups", "wide_values"):
        barred = ("grouped_einsum",) if name == "attention" and draw(st.booleans()) else ()
        pick(name, *barred)
    if chosen["attention"] == "grouped_einsum" and chosen["position"] in ("alibi", "relative"):
        chosen["position"] = "rope"
    equal = chosen["groups"] == 1 and not chosen["wide_values"]
    pick("qkv", *(() if equal else ("chunk", "unbind", "per_head")))
    pick("grouping", *(() if chosen["attention"] == "sdpa" else ("enable_gqa",)))
    pick("score_cap", *((True,) if chosen["attention"] == "sdpa" else ()))
    pick("block_causal")
    if chosen["block_causal"]:
        chosen |= {"padding": False, "window": None, "position_ids": "arange"}
    for name in CHOICES:
        if name not in chosen:
            pick(name)
    return Architecture(**chosen)


@st.composite
def cases(draw: Draw) -> Case:
    """A model with exact or approximate options, and one or two trajectories."""
    architecture = draw(architectures())
    if architecture.block_causal:
        return draw(_block_diffusion(architecture))
    exact = not architecture.known_to_oracle or draw(st.integers(0, 2)) == 0
    fixed: dict[str, Any] = {"block_length": draw(st.sampled_from([16, 8, 32, 4, 1]))}
    if exact:
        everything = draw(st.sampled_from([EVERYTHING, {"refresh": "every-step", "logits": "all"}]))
        fixed |= {"policy": "focus-dllm", **everything}
    else:
        fixed["policy"] = draw(st.sampled_from(POLICIES))
    options = draw(policy_options(**fixed))
    options["buckets"] = draw(st.sampled_from([None, None, (2, 8)]))
    dynamic = draw(st.sampled_from([False, None]))
    reads_padding = architecture.padding or architecture.position_ids == "mask"
    specs = trajectory_specs(
        padded=None if reads_padding else False,
        min_calls=3,
        max_calls=10,
        max_per_step=2,
        min_length=draw(st.sampled_from([8, 2])),
        min_masks=draw(st.sampled_from([6, 6, 0])),
        orders=ORDERS,
        edits=True,
    )
    trajectories = draw(st.lists(specs, min_size=1, max_size=2))
    return Case(architecture, tuple(trajectories), options, dynamic, draw(seeds()))


@st.composite
def _block_diffusion(draw: Draw, architecture: Architecture) -> Case:
    """A block-causal model under the policies that are made for one."""
    block_length = draw(st.sampled_from(BLOCK_LENGTHS))
    options: dict[str, Any] = {
        "policy": draw(st.sampled_from(BLOCK_POLICIES)),
        "block_length": block_length,
        "evict_alpha": draw(st.sampled_from([1.5, 1.0, 4.0])),
        "merge_projections": draw(st.booleans()),
        "logits": draw(st.sampled_from(["all", "response"])),
    }
    if options["policy"] == COMBINED:
        options |= {
            "key_block": draw(st.sampled_from([4, 2])),
            "keep_ratio": draw(st.sampled_from([0.5, 0.0, 1.0])),
            "sink_tokens": draw(st.integers(0, 4)),
            "dense_layers": draw(st.integers(0, 1)),
            "block_summary": draw(st.sampled_from(["bound", "mean"])),
        }
    trajectories = draw(st.lists(growing_specs(block_length), min_size=1, max_size=2))
    return Case(architecture, tuple(trajectories), options, None, draw(seeds()))
