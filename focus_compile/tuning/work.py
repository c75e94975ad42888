"""What calls compute, in multiply-adds, by their records: the tuner's measure without a clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.errors import OptionError
from focus_compile.explain import explain
from focus_compile.passes.sites import regions_of
from focus_compile.plan import Plan
from focus_compile.runtime.record import StepRecord

__all__ = ["ModelShape"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's attention sites, and the weights that a row meets outside of them.

    key_width: multiply-adds of one row with one key, over the heads of a layer; summary_width:
    numbers of a key, over its heads; row_weights: elements of all matrices, the embedding left out
    where it is no output layer as well (of a mixture of experts, all of them).
    """

    layers: int
    key_width: int
    summary_width: int
    row_weights: int

    @classmethod
    def of(cls, model: Any, ids: Tensor, options: dict[str, Any]) -> ModelShape:
        """By the plan of one call; ids int64 [1, length], the response masked.

        Raises:
            OptionError: the model runs exactly, with the reason.
        """
        explanation = explain(model, ids, quiet=True, **options)
        sites = [
            site
            for graph in explanation.graphs
            if isinstance(graph.plan, Plan) and not graph.refusals
            for site in graph.plan.sites
        ]
        if not sites:
            refusals = [r for graph in explanation.graphs for r in graph.refusals]
            why = str(refusals[0]) if refusals else "no graph was compiled"
            raise OptionError(f"tune: the model runs exactly, so there is nothing to tune: {why}")
        site = sites[0]
        return cls(
            layers=len(sites),
            key_width=site.heads * (site.head_dim + site.value_dim),
            summary_width=site.kv_heads * site.head_dim,
            row_weights=_row_weights(model),
        )

    def dense(self, rows: int, keys: int) -> float:
        """Of a call that computes `rows` and reads `keys` in every layer."""
        return float(rows * (self.row_weights + self.layers * keys * self.key_width))

    def work(self, calls: Iterable[StepRecord], length: int, config: FocusConfig) -> float:
        """Of recorded calls of one sequence of `length` tokens.

        Rows times weights, rows times keys, and the scores of the key blocks; the comparison of
        ids, sampling and the summaries' making are left out.
        """
        layers = Counter(regions_of(self.layers, config))
        choosing = layers["sparse-suffix"] * self._choosing(length, config)
        total = 0.0
        for call in calls:
            keys = sum(count * call.keys.get(name, length) for name, count in layers.items())
            total += call.rows * (self.row_weights + keys * self.key_width)
            if call.program == "step" and call.rows and call.chosen is not False:
                total += choosing
        return total

    def _choosing(self, length: int, config: FocusConfig) -> float:
        """Of scoring the key blocks of one layer in one step."""
        numbers = 2 if config.block_summary == "bound" else 1
        return -(-length // config.key_block) * numbers * self.summary_width


def _row_weights(model: torch.nn.Module) -> int:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = id(getattr(head, "weight", None))
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    } - {kept}
    return sum(
        weight.numel()
        for weight in model.parameters()
        if weight.dim() > 1 and id(weight) not in embeddings
    )
