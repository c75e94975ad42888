"""Block causality: what a model's own masks say about which keys a row sees.

Where a row sees all keys up to the end of its block and none beyond, rows of finished blocks never
change: their K/V are exact for ever, and a decode step needs no mask, only the number of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from focus_compile.passes.constant_masks import ancestors_of, evaluate_mask, negligible
from focus_compile.plan import Plan, Refusal

__all__ = [
    "BLOCK_MASK_REMEDY",
    "block_causal_mask",
    "block_length_of",
    "mask_inputs",
    "why_not_block_causal",
]

BLOCK_MASK_REMEDY = (
    "Call it with a block-causal 4D attention mask [batch, 1, tokens, tokens], as block-diffusion "
    "models are."
)


def block_causal_mask(length: int, block_length: int, device: torch.device | None = None) -> Tensor:
    """True where row i may read key j: j's block is not after i's. [1, 1, length, length] bool."""
    block = torch.arange(length, device=device) // block_length
    return (block[:, None] >= block)[None, None]


def block_length_of(keeps: Tensor) -> int | None:
    """Tokens in a block of a block-causal mask `keeps` bool [tokens, tokens]: 1 if it is causal,
    `tokens` if it hides nothing. None: it is not block-causal."""
    length = keeps.shape[0]
    block_length = int(keeps[0].sum())
    if block_length == 0:
        return None
    expected = block_causal_mask(length, block_length, keeps.device)[0, 0]
    return block_length if torch.equal(keeps, expected) else None


def mask_inputs(gm: fx.GraphModule, plan: Plan) -> list[str]:
    """Inputs of the graph, numbers included, that sites' masks are made from."""
    by_name = {node.name: node for node in gm.graph.nodes}
    masks = [by_name[site.node].args[3] for site in plan.sites]
    found = {n.name: None for m in masks if isinstance(m, fx.Node) for n in ancestors_of(m)}
    return [name for name in found if by_name[name].op == "placeholder"]


def why_not_block_causal(
    gm: fx.GraphModule, plan: Plan, inputs: Mapping[str, Any], block_length: int
) -> Refusal | None:
    """None if every site's mask is block-causal with this block length, else what is wrong.

    inputs: values of the graph's inputs that masks may be made from, by the placeholders' names.
    """
    checked: set[str] = set()
    for site in plan.sites:
        node = next(n for n in gm.graph.nodes if n.name == site.node)
        mask = node.args[3]
        where = f"{site.node}, {site.where}"
        if not isinstance(mask, fx.Node):
            return Refusal(
                f"layer {site.index} reads all keys, without a mask", where, BLOCK_MASK_REMEDY
            )
        if mask.name in checked:
            continue
        checked.add(mask.name)
        value = _value_of(gm, mask, inputs)
        if value is None:
            reason = f"the mask of layer {site.index} is made from inputs other than the mask's own"
            return Refusal(reason, where, BLOCK_MASK_REMEDY)
        keeps = value if value.dtype == torch.bool else value > negligible(value.dtype)
        heads = keeps.reshape(-1, *keeps.shape[-2:])
        if not all(torch.equal(heads[0], other) for other in heads[1:]):
            return Refusal(f"the mask of layer {site.index} differs between heads", where)
        if value.dtype != torch.bool and bool((value[keeps] != 0).any()):
            return Refusal(f"the mask of layer {site.index} adds a bias to keys it keeps", where)
        found = block_length_of(heads[0])
        if found is None:
            reason = f"the mask of layer {site.index} is not block-causal (a sliding window?)"
            return Refusal(reason, where, BLOCK_MASK_REMEDY)
        if found != block_length:
            kind = "causal" if found == 1 else f"block-causal with blocks of {found}"
            return Refusal(
                f"the mask of layer {site.index} is {kind}, not with blocks of {block_length}",
                where,
                f"Pass block_length={found}." if found > 1 else BLOCK_MASK_REMEDY,
            )
    return None


def _value_of(gm: fx.GraphModule, mask: fx.Node, inputs: Mapping[str, Any]) -> Tensor | None:
    order = ancestors_of(mask)
    known = {}
    for node in order:
        if node.op != "placeholder":
            continue
        if node.name not in inputs:
            return None
        value = inputs[node.name]
        known[node] = value.detach().cpu() if isinstance(value, Tensor) else value
    with torch.no_grad():
        return evaluate_mask(gm, order, mask, known)
