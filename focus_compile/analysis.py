"""The plan of a captured graph: ids, sites, regions, rows and ranks, or why it runs exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import sympy
import torch
from torch import fx

from focus_compile.capture import Capture
from focus_compile.config import BLOCK_POLICIES, COMBINED, EVICTING_POLICIES, FocusConfig
from focus_compile.distributed.agreement import group_named, of_first_rank
from focus_compile.errors import PassError
from focus_compile.graph_breaks import uncut
from focus_compile.key_costs import KeyShape, key_costs
from focus_compile.passes.block_causality import BLOCK_MASK_REMEDY
from focus_compile.passes.collectives import ranks_of
from focus_compile.passes.constant_masks import FoldConstantMasks
from focus_compile.passes.cut_tail import CutTail
from focus_compile.passes.graph_tools import concrete, shape_of, tensor_of
from focus_compile.passes.ids_and_logits import (
    find_ids,
    logits_index,
    output_values,
    output_widths,
)
from focus_compile.passes.match_attention import MatchAttention
from focus_compile.passes.postpone_slices import PostponeSlices
from focus_compile.passes.remove_no_ops import autocast_is_on
from focus_compile.passes.shard_nodes import shards_of
from focus_compile.passes.sites import sites_of
from focus_compile.passes.token_axis import NotTokenWise, prove_rows
from focus_compile.plan import FRAGMENT, InputRole, Plan, Ranks, Refusal, Site, Tail
from focus_compile.program_graphs import require_buildable

__all__ = ["plan_of"]


def plan_of(
    captured: Capture,
    gm: fx.GraphModule,
    config: FocusConfig,
    matching: MatchAttention,
    folding: FoldConstantMasks,
    dump: Callable[[str, fx.GraphModule], None],
) -> Plan:
    """The plan of `gm`, the canonical form of what was captured; a tail is cut off it in place.

    dump: is given the name and the graph of what that changed.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = {n for n, info in zip(placeholders, captured.inputs, strict=True) if info.is_weight}
    lengths = {n: i.length for n, i in zip(placeholders, captured.inputs, strict=True) if i.length}
    found = find_ids(gm.graph, weights, lengths, output_widths(gm.graph))
    empty = Plan(
        inputs=(), sites=(), rows=(), outputs=(), batch=sympy.Integer(0), length=sympy.Integer(0),
        vocabulary=0, logits=0, key_block=config.key_block, block_summary=config.block_summary,
        sink_tokens=config.sink_tokens, logits_rows=config.logits,
        partial_refresh=config.refresh == "adaptive" and config.policy not in BLOCK_POLICIES,
        list_reuse=config.list_reuse > 1 and config.policy not in BLOCK_POLICIES,
        merge_projections=_merges(captured, config), misses=tuple(matching.misses),
        evict_layer=config.evict_layer if config.policy in EVICTING_POLICIES else None,
        writes=captured.writes,
    )  # fmt: skip
    if found is None:
        part = not weights and not sites_of(gm.graph, config)
        return replace(empty, refusals=(FRAGMENT if part else _no_ids(gm.graph),))
    ids, vocabulary = found
    batch, length = shape_of(ids)
    plan = replace(
        empty,
        inputs=_roles(captured, placeholders, ids),
        sites=sites_of(gm.graph, config),
        batch=batch,
        length=length,
        vocabulary=vocabulary,
    )
    plan = _with_ranks(_with_key_costs(plan, ids, gm.graph, config), gm.graph, config)
    plan = _with_shards(plan, config)
    refusals = plan.refusals or _refusals(plan, gm.graph, matching, folding, config)
    if refusals:
        cached = not plan.sites and bool(matching.other_keys)
        return replace(plan, refusals=tuple(refusals), reads_cache=cached)
    whole: NotTokenWise | None = None
    try:
        if _must_cut(plan, gm.graph):
            raise NotTokenWise.of("the forward writes into its inputs")
        plan = _with_rows(plan, gm, ids, weights)
    except NotTokenWise as stuck:
        whole = stuck
    if whole is not None:
        # What follows the model may mix rows; where that is no remedy, the first reason stands.
        if config.policy in BLOCK_POLICIES:
            return replace(plan, refusals=(whole.refusal,))
        if PostponeSlices(ids).apply(gm):
            dump(PostponeSlices.name, gm)
        try:
            tail = CutTail(ids, weights, vocabulary).apply(gm)
            plan = _with_rows(_with_tail(plan, tail, placeholders), gm, ids, weights)
        except NotTokenWise:
            return replace(plan, refusals=(whole.refusal,))
        dump(CutTail.name, gm)
    try:
        require_buildable(plan, gm)
    except PassError as error:
        return replace(plan, refusals=(Refusal(str(error)),))
    return plan


_NOT_CAUSAL = (
    "A causal model reuses its own KV cache; focus_compile is for bidirectional ones, and for "
    'those that are causal by blocks (policy="focus-evict").'
)


def _no_ids(graph: fx.Graph) -> Refusal:
    remedy = "Call the model with input_ids; inputs_embeds holds no ids to compare between calls."
    reason = "no input of token ids [batch, tokens] feeds an embedding"
    return Refusal(reason, remedy=uncut(remedy, graph))


def _with_rows(plan: Plan, gm: fx.GraphModule, ids: fx.Node, weights: set[fx.Node]) -> Plan:
    """The plan with the row-wise ops; NotTokenWise if some op is not."""
    proof = prove_rows(gm, ids, weights)
    _require_row_wise(plan.sites, {row.node for row in proof.rows})
    return replace(
        plan, rows=proof.rows, outputs=proof.outputs, operations=proof.operations,
        logits=logits_index(gm.graph, plan),
    )  # fmt: skip


def _must_cut(plan: Plan, graph: fx.Graph) -> bool:
    """Whether outputs may hold inputs, which rows that are not computed must not lose: in ids that
    are written in place, and where rows before the response are zero."""
    return bool(plan.writes) or (plan.logits_rows == "response" and len(output_values(graph)) > 1)


def _with_tail(plan: Plan, tail: Tail, placeholders: list[fx.Node]) -> Plan:
    """The plan of a graph whose tail was cut off; what only that reads is compared with nothing."""
    inputs = tuple(
        replace(item, role="tail")
        if item.role in ("guarded", "size") and not placeholders[item.position].users
        else item
        for item in plan.inputs
    )
    return replace(plan, tail=tail, inputs=inputs)


def _merges(captured: Capture, config: FocusConfig) -> bool:
    """Whether the step's linear layers of one input become one."""
    if config.merge_projections is not None:
        return config.merge_projections
    tensors = [value for value in captured.values if isinstance(value, torch.Tensor)]
    return any(tensor.is_cuda for tensor in tensors)


_SPARSE_AND_SPLIT = Refusal(
    f'policy="{COMBINED}" has no form for a model that is split over ranks',
    remedy='Use policy="focus-evict", or one whole model per rank.',
)


def _with_ranks(plan: Plan, graph: fx.Graph, config: FocusConfig) -> Plan:
    """The plan with the ranks that the model is split over, and what a step adds to their work."""
    ranks = ranks_of(graph)
    if ranks is not None and config.policy == COMBINED:
        return replace(plan, refusals=(_SPARSE_AND_SPLIT,))
    if isinstance(ranks, Refusal):
        return replace(plan, refusals=(ranks,))
    if ranks is None:
        return plan
    added = len(plan.sites_of("sparse-suffix")) + len(plan.sites_of("sink-capture"))
    added += config.policy in EVICTING_POLICIES
    return replace(plan, ranks=replace(ranks, added=added))


def _with_shards(plan: Plan, config: FocusConfig) -> Plan:
    """The plan with the ranks that hold its keys and values, if there are several."""
    if config.context_parallel is None or plan.refusals:
        return plan
    shards = shards_of(config.context_parallel)
    if shards.size == 1:
        return plan
    if plan.ranks is not None:
        return replace(plan, refusals=(_SPLIT_AND_SHARED,))
    captures, sparse = len(plan.sites_of("sink-capture")), len(plan.sites_of("sparse-suffix"))
    shards = replace(shards, joins=len(plan.sites), choices=captures + sparse)
    plan = replace(plan, shards=shards)
    length = plan.length
    short = plan.why_not_shared(int(length)) if length.is_Integer else None
    return plan if short is None else replace(plan, refusals=(Refusal(short),))


_SPLIT_AND_SHARED = Refusal(
    "the model is split over ranks, and so would be its keys and values (context_parallel)",
    remedy="Use one of both.",
)


def _roles(captured: Capture, placeholders: list[fx.Node], ids: fx.Node) -> tuple[InputRole, ...]:
    roles = []
    for at, (node, info) in enumerate(zip(placeholders, captured.inputs, strict=True)):
        role = "guarded"
        if node is ids:
            role = "ids"
        elif tensor_of(node) is None:
            role = "size"
        elif info.is_weight:
            role = "weight"
        roles.append(InputRole(at, info.name, role))
    return tuple(roles)


def _with_key_costs(plan: Plan, ids: fx.Node, graph: fx.Graph, config: FocusConfig) -> Plan:
    """The plan with all keys in every layer where choosing some would cost more. Ranks that share a
    model go by the times of the first: each by its own could choose otherwise."""
    sparse = plan.sites_of("sparse-suffix")
    tensor = tensor_of(ids)
    if tensor is None or not sparse:
        return plan
    if config.context_parallel is not None:  # what a collective costs is not known here
        return plan
    if not (tensor.is_cuda if config.dense_if_faster is None else config.dense_if_faster):
        return plan
    batch, length = (concrete(size) for size in tensor.shape)
    site = sparse[0]
    blocks = length // config.key_block
    rows = config.block_length if config.policy == COMBINED else config.focus_rows
    costs = key_costs(
        KeyShape(
            batch=batch, heads=site.heads, kv_heads=site.kv_heads, head_dim=site.head_dim,
            length=length, rows=min(rows, length),
            key_block=config.key_block, kept=math.ceil(blocks * config.keep_ratio),
            sinks=config.sink_tokens, block_summary=config.block_summary, sparse=len(sparse),
            dtype=getattr(torch, site.dtype), device=tensor.device,
        )
    )  # fmt: skip
    ranks = ranks_of(graph)
    if isinstance(ranks, Ranks):
        costs = of_first_rank(group_named(ranks.group), costs)
    if costs is None:
        return plan
    sites = plan.sites
    if costs.dense_wins:
        sites = tuple(replace(site, region="dense-prefix") for site in sites)
    return replace(plan, sites=sites, key_costs=costs)


def _refusals(
    plan: Plan,
    graph: fx.Graph,
    matching: MatchAttention,
    folding: FoldConstantMasks,
    config: FocusConfig,
) -> list[Refusal]:
    if autocast_is_on(graph):
        return [Refusal("autocast is on", remedy="Cast the model: model.to(torch.bfloat16).")]
    causal = [*matching.causal, *folding.causal]
    if causal:
        remedy = _NOT_CAUSAL if config.policy not in BLOCK_POLICIES else BLOCK_MASK_REMEDY
        return [replace(causal[0], remedy=remedy)]
    if not plan.sites:
        return [_no_attention(matching, graph)]
    if plan.length.is_Integer and plan.length < 2:
        return [Refusal("the input has fewer than 2 tokens")]
    if config.mask_token_id is not None and config.mask_token_id >= plan.vocabulary:
        reason = f"mask_token_id={config.mask_token_id} is outside the {plan.vocabulary} embeddings"
        return [Refusal(reason, remedy="Set it to the tokenizer's mask_token_id.")]
    if plan.writes and config.policy in BLOCK_POLICIES:
        reason = (
            f'the forward writes into its inputs, which policy="{config.policy}" has no form of'
        )
        return [Refusal(reason, remedy="Compile the model alone, without the sampler.")]
    return []


def _no_attention(matching: MatchAttention, graph: fx.Graph) -> Refusal:
    if matching.other_keys:
        nearest = matching.other_keys[0]
        remedy = "Call the model on the whole sequence, without a cache; focus_compile keeps one."
        return Refusal(f"attention reads a cache ({nearest.reason})", nearest.where, remedy)
    hint = "The nearest: " + str(matching.misses[0]) if matching.misses else ""
    return Refusal("no attention was recognised", remedy=uncut(hint, graph))


def _require_row_wise(sites: tuple[Site, ...], rows: set[str]) -> None:
    for site in sites:
        if site.node not in rows:
            where = f"{site.node}, {site.where}"
            raise NotTokenWise(Refusal("attention over values that are no hidden states", where))
