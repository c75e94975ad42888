"""The pipeline, top to bottom: passes over the captured graph, then the analysis that plans."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from focus_compile.capture import Capture
from focus_compile.config import (
    BLOCK_POLICIES,
    COMBINED,
    EVICTING_POLICIES,
    VERIFY,
    FocusConfig,
    verify_level,
)
from focus_compile.distributed.agreement import group_named, of_first_rank
from focus_compile.errors import PassError
from focus_compile.graph_breaks import latest_break
from focus_compile.key_costs import KeyShape, key_costs
from focus_compile.passes.block_causality import BLOCK_MASK_REMEDY
from focus_compile.passes.collectives import NormalizeCollectives, ranks_of
from focus_compile.passes.constant_masks import FoldConstantMasks
from focus_compile.passes.cut_tail import CutTail
from focus_compile.passes.graph_tools import (
    arg,
    concrete,
    op_name,
    shape_of,
    size_expression,
    tensor_of,
    user_line,
)
from focus_compile.passes.match_attention import MatchAttention
from focus_compile.passes.merge_projections import MergedWeights, MergeProjections
from focus_compile.passes.partial_refresh import BuildPartialRefresh
from focus_compile.passes.refresh_program import BuildRefresh
from focus_compile.passes.remove_no_ops import RemoveNoOps, autocast_is_on
from focus_compile.passes.row_builder import kept_lists
from focus_compile.passes.shard_nodes import shards_of
from focus_compile.passes.sharded_refresh import BuildShardedRefresh
from focus_compile.passes.sharded_step import BuildShardedStep
from focus_compile.passes.step_program import BuildStep
from focus_compile.passes.token_axis import NotTokenWise, prove_rows
from focus_compile.plan import FRAGMENT, InputRole, Plan, Ranks, Refusal, Site, Tail
from focus_compile.torch_tools import trace_artifact
from focus_compile.verify import execute_on_random_inputs, same_results, verify

__all__ = [
    "DUMP",
    "VERIFY",
    "Pipeline",
    "ProgramGraphs",
    "build_programs",
    "plan_graph",
    "regions_of",
    "weight_rows",
]

DUMP = "FOCUS_COMPILE_DUMP"
"""Folder that receives the graph after every stage, and the plan."""


@dataclass
class ProgramGraphs:
    """The graphs made from one capture."""

    refresh: fx.GraphModule
    step: fx.GraphModule
    partial: fx.GraphModule | None = None
    """Where the plan has a partial refresh."""
    again: fx.GraphModule | None = None
    """A step that reads the keys chosen by an earlier one, where the plan has such."""
    merged: tuple[MergedWeights, ...] = ()
    """What the step's inputs after its state hold."""


GraphPass = RemoveNoOps | NormalizeCollectives | MatchAttention | FoldConstantMasks


class Pipeline:
    """Runs stages, verifies each and dumps it if asked."""

    def __init__(self, gm: fx.GraphModule, name: str = "graph") -> None:
        self.gm = gm
        self.level = verify_level(os.environ)
        self.folder = _new_folder(os.environ.get(DUMP), name)
        self.stage = 0
        self.inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        self.dump("captured", gm)

    def run(self, graph_pass: GraphPass) -> int:
        """Apply one pass in place; returns its number of rewrites."""
        before = execute_on_random_inputs(self.gm) if self.level >= 2 else ()
        started = time.perf_counter()
        rewrites = graph_pass.apply(self.gm)
        elapsed = (time.perf_counter() - started) * 1e3
        if self.level >= 1:
            verify(self.gm, self.inputs, graph_pass.name)
        if self.level >= 2:
            same_results(before, execute_on_random_inputs(self.gm), graph_pass.name)
        self.dump(graph_pass.name, self.gm, f"{rewrites} rewrites in {elapsed:.1f} ms")
        return rewrites

    def dump(self, stage: str, gm: fx.GraphModule, note: str = "") -> None:
        """Into the folder and into torch's trace, where these are asked for."""

        def text() -> str:
            return f"# {stage} {note}\n{gm.graph}\n"

        name = f"{self.stage:02}_{stage}"
        trace_artifact(name, text)
        if self.folder is not None:
            (self.folder / f"{name}.txt").write_text(text())
        self.stage += 1

    def dump_plan(self, plan: Plan) -> None:
        if self.folder is not None:
            (self.folder / "plan.json").write_text(json.dumps(plan.to_dict(), indent=2))


def _new_folder(root: str | None, name: str) -> Path | None:
    """A folder of its own for each graph, so that graphs do not overwrite one another."""
    if not root:
        return None
    number = 0
    while (folder := Path(root) / f"{name}_{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


def plan_graph(captured: Capture, config: FocusConfig) -> tuple[Pipeline, Plan]:
    """Canonicalise the captured graph in place and plan its incremental form.

    A plan with refusals means: run exactly.
    """
    pipeline = Pipeline(captured.graph_module)
    matching, folding = MatchAttention(), FoldConstantMasks(captured.buffers())
    passes: list[GraphPass] = [RemoveNoOps(), matching, folding]
    if captured.local is not None:
        passes.insert(1, NormalizeCollectives())
    for graph_pass in passes:
        pipeline.run(graph_pass)
    plan = _analyse(captured, pipeline, config, matching, folding)
    pipeline.dump_plan(plan)
    return pipeline, plan


def build_programs(pipeline: Pipeline, plan: Plan) -> ProgramGraphs:
    """The refresh and step graphs of an accepted plan."""
    refresh = _refresh_of(plan, pipeline.gm)
    step = _step_of(plan, pipeline.gm)
    pipeline.dump("refresh", refresh)
    pipeline.dump("step", step)
    again = _step_of(plan, pipeline.gm, choose=False) if kept_lists(plan) else None
    if again is not None:
        pipeline.dump("step-again", again)
    merged: tuple[MergedWeights, ...] = ()
    if plan.merge_projections:
        merging = MergeProjections(weight_rows(pipeline.gm, plan))
        merged = merging.apply(step)
        pipeline.dump(MergeProjections.name, step)
        if again is not None:
            merged_again = merging.apply(again)
            assert merged_again == merged
    partial = None
    if plan.partial_refresh:
        partial = BuildPartialRefresh(plan).apply(pipeline.gm)
        pipeline.dump("partial-refresh", partial)
    return ProgramGraphs(refresh, step, partial, again, merged)


def _refresh_of(plan: Plan, gm: fx.GraphModule) -> fx.GraphModule:
    return (BuildRefresh if plan.shards is None else BuildShardedRefresh)(plan).apply(gm)


def _step_of(plan: Plan, gm: fx.GraphModule, choose: bool = True) -> fx.GraphModule:
    return (BuildStep if plan.shards is None else BuildShardedStep)(plan, choose).apply(gm)


def weight_rows(gm: fx.GraphModule, plan: Plan) -> dict[str, int]:
    """Length of the first axis of the weights, by the name of their placeholder."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = [placeholders[at] for at in plan.positions("weight")]
    shapes = [(node.name, shape_of(node)) for node in weights]
    return {name: int(shape[0]) for name, shape in shapes if shape and shape[0].is_Integer}


def _analyse(
    captured: Capture,
    pipeline: Pipeline,
    config: FocusConfig,
    matching: MatchAttention,
    folding: FoldConstantMasks,
) -> Plan:
    gm = pipeline.gm
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = {n for n, info in zip(placeholders, captured.inputs, strict=True) if info.is_weight}
    lengths = {n: i.length for n, i in zip(placeholders, captured.inputs, strict=True) if i.length}
    found = _find_ids(gm.graph, weights, lengths, _output_widths(gm.graph))
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
        part = not weights and not _sites(gm.graph, config)
        return replace(empty, refusals=(FRAGMENT if part else _no_ids(),))
    ids, vocabulary = found
    batch, length = shape_of(ids)
    plan = replace(
        empty,
        inputs=_roles(captured, placeholders, ids),
        sites=_sites(gm.graph, config),
        batch=batch,
        length=length,
        vocabulary=vocabulary,
    )
    plan = _with_ranks(_with_key_costs(plan, ids, gm.graph, config), gm.graph, config)
    plan = _with_shards(plan, config)
    refusals = plan.refusals or _refusals(plan, gm.graph, matching, folding, config)
    if refusals:
        return replace(plan, refusals=tuple(refusals))
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
        try:
            tail = CutTail(ids, weights, vocabulary).apply(gm)
            plan = _with_rows(_with_tail(plan, tail, placeholders), gm, ids, weights)
        except NotTokenWise:
            return replace(plan, refusals=(whole.refusal,))
        pipeline.dump(CutTail.name, gm)
    try:
        _refresh_of(plan, gm)
        _step_of(plan, gm)
        if plan.partial_refresh:
            BuildPartialRefresh(plan).apply(gm)
    except PassError as error:
        return replace(plan, refusals=(Refusal(str(error)),))
    return plan


_NOT_CAUSAL = (
    "A causal model reuses its own KV cache; focus_compile is for bidirectional ones, and for "
    'those that are causal by blocks (policy="focus-evict").'
)


def _no_ids() -> Refusal:
    remedy = "Call the model with input_ids; inputs_embeds holds no ids to compare between calls."
    return Refusal("no input of token ids [batch, tokens] feeds an embedding", "", _uncut(remedy))


def _uncut(remedy: str) -> str:
    """The remedy, and where Dynamo last cut a forward, if it did."""
    cut = latest_break()
    if not cut:
        return remedy
    return (
        f"{remedy} {cut} (TORCH_LOGS=graph_breaks says why): no graph holds the whole of it. Where "
        'experts in a loop are why, model.set_experts_implementation("grouped_mm") avoids it.'
    )


def _with_rows(plan: Plan, gm: fx.GraphModule, ids: fx.Node, weights: set[fx.Node]) -> Plan:
    """The plan with the row-wise ops; NotTokenWise if some op is not."""
    proof = prove_rows(gm, ids, weights)
    _require_row_wise(plan.sites, {row.node for row in proof.rows})
    return replace(
        plan, rows=proof.rows, outputs=proof.outputs, operations=proof.operations,
        logits=_logits_index(gm.graph, plan),
    )  # fmt: skip


def _must_cut(plan: Plan, graph: fx.Graph) -> bool:
    """Whether outputs may hold inputs, which rows that are not computed must not lose: in ids that
    are written in place, and where rows before the response are zero."""
    return bool(plan.writes) or (plan.logits_rows == "response" and len(_output_values(graph)) > 1)


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


def _find_ids(
    graph: fx.Graph, weights: set[fx.Node], lengths: dict[fx.Node, int], widths: list[int]
) -> tuple[fx.Node, int] | None:
    """The input that indexes the embedding table, and the table's rows.

    Of several tables (positions, segments) it is one with as many rows as some output is wide,
    else the largest. lengths: rows of tables of which this rank may hold a part; ids of other ranks
    are then masked before they are looked up.
    """
    best: tuple[fx.Node, int] | None = None
    for node in graph.nodes:
        if op_name(node) != "embedding.default":
            continue
        table, index = arg(node, 0), arg(node, 1)
        rows = _behind_reshape(table)
        if rows in lengths:
            index = _masked_ids(index)
        if index.op != "placeholder" or index in weights or len(shape_of(index)) != 2:
            continue
        size = lengths.get(rows, int(shape_of(table)[0]))
        if best is None or (size in widths, size) > (best[1] in widths, best[1]):
            best = (index, size)
    return best


def _behind_reshape(node: fx.Node) -> fx.Node:
    while op_name(node) in ("reshape.default", "clone.default"):
        node = arg(node, 0)
    return node


def _masked_ids(index: fx.Node) -> fx.Node:
    """The only input that the look-ups of a table's part are made from, or the index itself."""
    found: set[fx.Node] = set()
    pending = [index]
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            found.add(node)
        pending.extend(node.all_input_nodes)
    return found.pop() if len(found) == 1 else index


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


def _sites(graph: fx.Graph, config: FocusConfig) -> tuple[Site, ...]:
    nodes = graph.find_nodes(op="call_function", target=torch.ops.focus_compile.attention.default)
    regions = regions_of(len(nodes), config)
    return tuple(
        _site(index, node, region)
        for index, (node, region) in enumerate(zip(nodes, regions, strict=True))
    )


def _site(index: int, node: fx.Node, region: str) -> Site:
    arguments: tuple[Any, ...] = node.args
    query, key, value, mask = arguments[:4]
    tensor = tensor_of(key)
    assert tensor is not None
    return Site(
        index=index,
        node=node.name,
        key=key.name,
        value=value.name,
        heads=int(shape_of(query)[1]),
        kv_heads=int(shape_of(key)[1]),
        head_dim=int(shape_of(key)[3]),
        value_dim=int(shape_of(value)[3]),
        dtype=str(tensor.dtype).removeprefix("torch."),
        masked=mask is not None,
        spelling=node.meta["spelling"],
        where=user_line(node),
        region=region,
    )


def regions_of(layers: int, config: FocusConfig) -> list[str]:
    """dense-prefix x l, sink-capture, sparse-suffix, dense-tail; all dense if nothing is sparse.

    Where the sinks are the first positions, no layer captures them.
    """
    dense = config.dense_layers_for(layers)
    captures = int(config.policy != COMBINED)
    tail_at = max(0, layers - config.dense_tail_layers)
    sparse = tail_at - dense - captures
    if config.policy not in ("focus-dllm", COMBINED) or sparse <= 0:
        return ["dense-prefix"] * layers
    tail = layers - tail_at
    return (
        ["dense-prefix"] * dense
        + ["sink-capture"] * captures
        + ["sparse-suffix"] * sparse
        + ["dense-tail"] * tail
    )


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
        return [_no_attention(matching)]
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


def _no_attention(matching: MatchAttention) -> Refusal:
    if matching.other_keys:
        nearest = matching.other_keys[0]
        remedy = "Call the model on the whole sequence, without a cache; focus_compile keeps one."
        return Refusal(f"attention reads a cache ({nearest.reason})", nearest.where, remedy)
    hint = "The nearest: " + str(matching.misses[0]) if matching.misses else ""
    return Refusal("no attention was recognised", remedy=hint)


def _require_row_wise(sites: tuple[Site, ...], rows: set[str]) -> None:
    for site in sites:
        if site.node not in rows:
            where = f"{site.node}, {site.where}"
            raise NotTokenWise(Refusal("attention over values that are no hidden states", where))


def _output_values(graph: fx.Graph) -> list[Any]:
    output = graph.output_node().args[0]
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _output_widths(graph: fx.Graph) -> list[int]:
    """The width of each output of the form of logits, [batch, tokens, width] in floating point; 0
    for others, and where it is symbolic."""
    tensors = [tensor_of(value) for value in _output_values(graph)]
    sizes = [
        [size_expression(size) for size in tensor.shape[2:]]
        if tensor is not None and tensor.dim() == 3 and tensor.is_floating_point()
        else []
        for tensor in tensors
    ]
    return [int(size[0]) if size and size[0].is_Integer else 0 for size in sizes]


def _logits_index(graph: fx.Graph, plan: Plan) -> int | None:
    """The output whose last axis is the vocabulary; None where a cut left none of them."""
    vocabulary = plan.vocabulary
    if not all(isinstance(value, fx.Node) for value in _output_values(graph)):
        raise NotTokenWise(Refusal("the graph returns something that is no tensor"))
    widths = _output_widths(graph)
    if plan.tail is not None and vocabulary not in widths:
        return None
    if vocabulary not in widths:
        reason = f"no output is logits over the {vocabulary} embeddings (widths {widths})"
        remedy = _uncut("Compile the whole model, head included.")
        raise NotTokenWise(Refusal(reason, remedy=remedy))
    return widths.index(vocabulary)
