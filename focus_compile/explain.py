"""`focus_compile.explain`: the plan and what it takes, printed; nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from focus_compile.config import FocusConfig
from focus_compile.frontend import options_for

if TYPE_CHECKING:
    from focus_compile.backend import BackendCall
    from focus_compile.graph_report import GraphReport

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What the backend would do with each graph of a call.

    graphs: one entry per graph that Dynamo made, with its plan or refusals; options: as in force.
    """

    graphs: tuple[GraphReport, ...]
    options: dict[str, Any]

    @property
    def accepted(self) -> bool:
        """Whether some graph runs incrementally."""
        return any(not graph.refusals for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; sizes in bytes."""
        return {
            "accepted": self.accepted,
            "options": self.options,
            "graphs": [graph.to_dict() for graph in self.graphs],
        }

    def __str__(self) -> str:
        first = f"focus_compile: {len(self.graphs)} graph(s), policy {self.options['policy']}"
        return "\n".join([first, *map(str, self.graphs)])


def explain(
    model: Callable[..., Any],
    *example_inputs: Any,
    quiet: bool = False,
    kernels: bool = False,
    **options: Any,
) -> Explanation:
    """Trace one call of `model` without gradients, and print its plan and what it takes.

    Args:
        model: a module, or what torch.compile made of one.
        example_inputs: positional inputs of the call, such as ids int64 [batch, tokens]. With the
            response masked, the memory of `logits="response"` is known too.
        quiet: return the explanation without printing it.
        kernels: also compile the refresh and step programs, without running them, and list what
            they launch. Nothing with `lowering="eager"`.
        options: fields of FocusConfig; the mask id comes from `model.config` if it is there.

    Raises:
        OptionError: an unknown or invalid option.
    """
    from focus_compile.backend import BackendCall, trace_past_logging
    from focus_compile.graph_report import report

    trace_past_logging()
    model = getattr(model, "_orig_mod", model)
    config = FocusConfig.from_options(options_for(model, options))
    calls: dict[BackendCall, Sequence[Any]] = {}

    def collect(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        call = BackendCall(gm, inputs, config)
        calls[call] = inputs

        def run(*args: Any) -> Any:
            calls[call] = args
            return gm.forward(*args)

        return run

    with torch.no_grad():
        torch.compile(model, backend=collect)(*example_inputs)
        graphs = tuple(report(call, args, config, kernels) for call, args in calls.items())
    explanation = Explanation(graphs, config.to_dict())
    if not quiet:
        print(explanation)
    return explanation
