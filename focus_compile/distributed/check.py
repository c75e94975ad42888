"""What a split model must be like, asked before any work starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from focus_compile.errors import RanksError

__all__ = ["check_split"]

_HEADS = ("num_attention_heads", "num_key_value_heads")
_OF_HEADS = ("q_proj", "k_proj", "v_proj", "query", "key", "value")


def check_split(model: Any) -> None:
    """Check a model whose weights may be DTensors; does nothing if none is.

    Raises:
        RanksError: this process is in no mesh of the weights, ranks would hold parts of heads, or
            weights are split in several dtypes.
    """
    if not isinstance(model, nn.Module) or not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor, Shard

    weights = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
    split = {
        name: weight
        for name, weight in weights.items()
        if any(isinstance(placement, Shard) for placement in weight.placements)
    }
    for name, weight in split.items():
        mesh = weight.device_mesh
        if mesh.get_coordinate() is None:
            raise RanksError(
                f"focus_compile: this process (rank {torch.distributed.get_rank()} of "
                f"{torch.distributed.get_world_size()}) is not in the mesh of {mesh.size()} ranks "
                f"that {name} is split over. Start as many processes as the mesh has ranks."
            )
    dtypes = {str(w.dtype).removeprefix("torch."): n for n, w in split.items()}
    if len(dtypes) > 1:
        listed = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise RanksError(
            f"focus_compile: split weights are of several dtypes: {listed}. Cast the model before "
            "it is split: model.to(torch.bfloat16)."
        )
    of_heads = [w for n, w in split.items() if any(part in n for part in _OF_HEADS)]
    if of_heads:
        _check_heads(model, _ranks_of(of_heads[0]))


def _ranks_of(weight: Any) -> int:
    """How many ranks a weight is split over."""
    from torch.distributed.tensor import Shard

    at = next(i for i, placement in enumerate(weight.placements) if isinstance(placement, Shard))
    return int(weight.device_mesh.size(at))


def _check_heads(model: nn.Module, ranks: int) -> None:
    config = getattr(model, "config", None)
    for name in _HEADS:
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % ranks:
            what = name.removeprefix("num_").replace("_", " ")
            raise RanksError(
                f"focus_compile: {heads} {what} cannot be split evenly over {ranks} ranks. "
                f"Choose a number of ranks that divides {heads}, and split the rest of the work by "
                "prompts (docs/distributed.md)."
            )
