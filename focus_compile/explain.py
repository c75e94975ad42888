"""`focus_compile.explain`: the plan, printed; nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from focus_compile.config import FocusConfig
from focus_compile.frontend import options_for

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What the backend would do with each graph of a call.

    graphs: one entry per graph that Dynamo made, with its plan or refusals; options: as in force.
    """

    graphs: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def accepted(self) -> bool:
        """Whether some graph runs incrementally."""
        return any(not graph.refusals for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "accepted": self.accepted,
            "options": self.options,
            "graphs": [
                graph.plan.to_dict()
                if graph.plan is not None
                else {"accepted": False, "refusals": [r.to_dict() for r in graph.refusals]}
                for graph in self.graphs
            ],
        }

    def __str__(self) -> str:
        lines = [f"focus_compile: {len(self.graphs)} graph(s), policy {self.options['policy']}"]
        for graph in self.graphs:
            if graph.plan is not None:
                lines.append(str(graph.plan))
            else:
                lines.append("plan: exact program (refused)")
                lines += [f"  refused: {refusal}" for refusal in graph.refusals]
        return "\n".join(lines)


def explain(
    model: Callable[..., Any], *example_inputs: Any, quiet: bool = False, **options: Any
) -> Explanation:
    """Trace one call of `model` without gradients and print its plan.

    Args:
        model: a module, or what torch.compile made of one.
        example_inputs: positional inputs of the call, such as ids int64 [batch, tokens].
        quiet: return the explanation without printing it.
        options: fields of FocusConfig; the mask id comes from `model.config` if it is there.

    Raises:
        OptionError: an unknown or invalid option.
    """
    from focus_compile.backend import BackendCall

    model = getattr(model, "_orig_mod", model)
    config = FocusConfig.from_options(options_for(model, options))
    graphs: list[BackendCall] = []

    def collect(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(BackendCall(gm, inputs, config))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=collect)(*example_inputs)
    explanation = Explanation(tuple(graphs), config.to_dict())
    if not quiet:
        print(explanation)
    return explanation
