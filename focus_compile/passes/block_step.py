"""The programs of a block-diffusion step: listed rows of many sequences, some of which go on.

Rows are a list: the rows of several sequences one after another, each at a position of its own.
Token-wise ops do not care whose row they compute; only attention does, so only there the list has
an inner structure (`kernels.ragged`). A program has two stages. The first computes all listed rows
up to the keys and values of one layer, the *cut*; the second takes the rows that go on through the
rest of it. At the last layer that spares the head the rows whose logits nobody reads (`BuildWhole`,
one graph). At an early layer it is token eviction (FOCUS, arXiv 2601.23278): there the rows are
chosen by what the first stage computed, so it is two graphs and the way from one to the other
(`BuildPrefix`, `BuildLeave`, `BuildSuffix`).

In a layer of the sparse suffix (Focus-dLLM, arXiv 2602.02159) the rows of a sequence read some of
its finished key blocks, which their queries choose anew in every layer, and all that comes after.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from focus_compile.errors import PassError
from focus_compile.kernels.importance import op as _importance  # noqa: F401
from focus_compile.kernels.ragged_attention import op as _attention  # noqa: F401
from focus_compile.kernels.ragged_selection import op as _selection  # noqa: F401
from focus_compile.kernels.ragged_sparse_attention import op as _sparse  # noqa: F401
from focus_compile.passes.collectives import insert_sum_over_ranks
from focus_compile.passes.graph_tools import shape_of, tensor_of
from focus_compile.passes.row_builder import RowBuilder
from focus_compile.passes.row_values import RowValues
from focus_compile.plan import Operand, Plan, RowAxes, RowOp, Site

__all__ = [
    "CHOSEN_INPUTS",
    "KEY_INPUTS",
    "LISTED",
    "LISTED_INPUTS",
    "BuildLeave",
    "BuildPrefix",
    "BuildSuffix",
    "BuildWhole",
    "Frontier",
    "frontier_of",
    "listed_inputs",
]

aten = torch.ops.aten
LISTED = sympy.Symbol("listed_rows", integer=True, positive=True)
"""Rows of the list per sequence of the graph's batch, wherever a size names it."""
LISTED_INPUTS = ("row_ids", "rows", "slots", "places", "owners", "starts", "lengths")
"""Inputs of a list of b * R rows after the model's own. row_ids, rows int64 [b, R]: token id and
absolute position of each row. slots, places int64 [b * R]: where its K/V are written, out of reach
for padding. owners int64 [S]: cache slot of each sequence; starts [S + 1]: where its rows start;
lengths int64 [S]: the keys that it sees."""
KEY_INPUTS = ("weights", "candidates", "keep")
"""Inputs after those where a layer chooses its keys. weights float32 [b, R]: how much each row's
queries count in the choice; candidates, keep int64 [S]: the key blocks that a sequence can choose
from, and those that it reads."""
CHOSEN_INPUTS = ("chosen", "chosen_starts")
"""The rows that go on, int64 [b, K] indices into the list, and where their sequences start."""


def listed_inputs(plan: Plan) -> tuple[str, ...]:
    """Names of a list's inputs."""
    return (*LISTED_INPUTS, *(KEY_INPUTS if plan.sites_of("sparse-suffix") else ()))


@dataclass(frozen=True)
class Frontier:
    """A value of the first stage that the second reads: its node, and its rows' axes."""

    node: str
    axes: RowAxes
    shape: tuple[sympy.Expr, ...]
    """With `LISTED` in place of the tokens."""

    @property
    def input(self) -> str:
        """Name of the suffix's input that takes it."""
        return f"listed_{self.node}"


class _ListedRows(RowBuilder):
    """Row ops at the rows of the list. Masks are not read: a row sees its sequence's first
    `lengths` keys, which `block_causality` proved."""

    stage_starts = "starts"

    def __init__(
        self, gm: fx.GraphModule, plan: Plan, inputs: Sequence[str], max_rows: int
    ) -> None:
        super().__init__(gm, plan, tuple(inputs))
        self.max_rows = max_rows
        self.before: Set[str] = frozenset()
        """Nodes before the cut that the list crossed already: their K/V are written."""
        self.ids = gm.graph.find_nodes(op="placeholder")[plan.ids.position].name

    def argument(self, argument: Any, row: RowOp) -> Any:
        if isinstance(argument, fx.Node) and argument.name == self.ids:
            return self.inputs["row_ids"]
        return super().argument(argument, row)

    def site(self, node: fx.Node, row: RowOp, site: Site) -> fx.Node:
        key, value = self.write(site, row)
        query = self.flat(self.argument(node.args[0], row))
        inputs, ops, scale = self.inputs, torch.ops.focus_compile, node.args[4]
        owners, starts, lengths = inputs["owners"], inputs[self.stage_starts], inputs["lengths"]
        if site.region == "sparse-suffix":
            blocks = self.values.call(
                ops.ragged_select_blocks.default,
                query, self.weights(), inputs[f"summaries_{site.index}"], owners, starts,
                inputs["candidates"], inputs["keep"], self.plan.sink_blocks, self.max_rows,
            )  # fmt: skip
            attended = self.values.call(
                ops.ragged_sparse_attention.default,
                query, key, value, owners, starts, lengths, blocks, inputs["candidates"],
                self.plan.key_block, self.max_rows, scale,
            )  # fmt: skip
        else:
            attended = self.values.call(
                ops.ragged_attention.default,
                query, key, value, owners, starts, lengths, self.max_rows, scale,
            )  # fmt: skip
        if self.plan.batch == 1:
            return self.values.call(aten.unsqueeze.default, attended, 0)
        sizes = [site.heads, self.values.size(self.plan.batch), -1, site.value_dim]
        attended = self.values.call(aten.reshape.default, attended, sizes)
        return self.values.call(aten.transpose.int, attended, 0, 1)

    def write(self, site: Site, row: RowOp) -> tuple[fx.Node, fx.Node]:
        """The site's caches, with the K and V of these rows in them."""
        caches = self.caches(site)
        if site.key in self.before:
            return caches
        at = [self.inputs["slots"], None, self.inputs["places"]]
        for cache, name in zip(caches, (site.key, site.value), strict=True):
            values = self.flat(self.argument(self.by_name[name], row))
            values = self.values.call(aten.transpose.int, values, 0, 1)
            self.values.call(aten.index_put_.default, cache, at, values)
        return caches

    def caches(self, site: Site) -> tuple[fx.Node, fx.Node]:
        """Keys and values of all sequences, [slots, Hkv, N, d] each."""
        return self.inputs[f"key_cache_{site.index}"], self.inputs[f"value_cache_{site.index}"]

    def weights(self) -> fx.Node:
        """Of these rows' queries in the choice of keys, [b * R]."""
        return self.values.call(aten.flatten.using_ints, self.inputs["weights"])

    def flat(self, heads: fx.Node) -> fx.Node:
        """[b, H, R, d] as [H, b * R, d]."""
        if self.plan.batch == 1:
            return self.values.call(aten.select.int, heads, 0, 0)
        heads = self.values.call(aten.transpose.int, heads, 0, 1)
        return self.values.call(aten.flatten.using_ints, heads, 1, 2)


class _ChosenRows(_ListedRows):
    """Row ops at those rows of the list that go on; values of the list are selected once each."""

    stage_starts = "chosen_starts"

    def __init__(self, listed: _ListedRows, first: set[str]) -> None:
        """first: nodes of the first stage."""
        self.__dict__.update(listed.__dict__)
        self.listed, self.first = listed, first
        self.active = {}
        rows, chosen = self.inputs["rows"], self.inputs["chosen"]
        batch, length, ids = self.plan.batch, self.plan.length, self.full[self.ids]
        self.between = RowValues(self.graph, chosen, rows, batch, LISTED)
        positions = self.between.call(aten.gather.default, rows, 1, chosen)
        for node in (positions, chosen):
            node.meta["device"] = rows.meta["device"]
        self.values = RowValues(self.graph, positions, ids, batch, length)

    def argument(self, argument: Any, row: RowOp) -> Any:
        if isinstance(argument, fx.Node) and argument.name == self.ids:
            raise PassError("the token ids are read again behind the cut")
        return super().argument(argument, row)

    def at_rows(self, node: fx.Node, axes: Any) -> fx.Node:
        if node.name not in self.active and node.name in self.listed.active:
            shape = listed_shape(node, axes, self.plan)
            operand = Operand(node.name, "gather", axes, len(shape))
            self.active[node.name] = self.between.select(
                self.listed.active[node.name], shape, operand
            )
        return super().at_rows(node, axes)

    def write(self, site: Site, row: RowOp) -> tuple[fx.Node, fx.Node]:
        if site.key in self.first:
            return self.listed.write(site, row)
        return super().write(site, row)

    def weights(self) -> fx.Node:
        chosen = self.values.call(
            aten.gather.default, self.inputs["weights"], 1, self.inputs["chosen"]
        )
        return self.values.call(aten.flatten.using_ints, chosen)


@dataclass(frozen=True)
class _Build:
    """plan: of the canonical graph; max_rows: of a sequence in the list; cut: the site whose keys
    and values end the first stage."""

    plan: Plan = field(repr=False)
    max_rows: int
    cut: int

    def first_stage(self, rows: RowBuilder, cut: int) -> set[str]:
        """What is computed up to the keys and values of a layer."""
        _require_cut(self.plan, cut)
        sites = self.plan.sites
        names = [sites[cut].key, sites[cut].value]
        first = rows.ancestors(names + [site.node for site in sites[:cut]])
        return first | _elements_of(first, rows.by_name)

    def needed_in_full(self, rows: _ListedRows) -> set[str]:
        """What rows are selected from, but for the ids, which come by row, and the masks."""
        masks = {str(rows.by_name[site.node].args[3]) for site in self.plan.sites}
        names = {o.node for row in self.plan.rows for o in row.operands if o.use != "rows"}
        needed = rows.ancestors(sorted(names - masks - {rows.ids}))
        if rows.ids in needed:
            raise PassError(
                "position ids or another table are computed from all token ids; pass position_ids"
            )
        return needed

    def walk(self, listed: _ListedRows, chosen: _ListedRows | None, first: set[str]) -> None:
        """Build the ops of both stages, and in full what their rows come from.

        chosen: None builds the first one only.
        """
        needed = self.needed_in_full(listed)
        for node in listed.gm.graph.nodes:
            if node.name in needed and node.name not in listed.full:
                listed.full[node.name] = listed.copy(node)
            if node.name in listed.rows_of and node.name not in listed.before:
                rows = listed if node.name in first else chosen
                if rows is not None:
                    rows.active[node.name] = rows.row_op(node, rows.rows_of[node.name])


class BuildWhole(_Build):
    """All listed rows up to the cut, the chosen ones through the rest: logits of some, where the
    cut is the last layer. Does not change the graph."""

    name: ClassVar[str] = "build-whole"

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, listed_inputs, CHOSEN_INPUTS, state) -> (*outputs)."""
        names = (*listed_inputs(self.plan), *CHOSEN_INPUTS)
        listed = _ListedRows(gm, self.plan, names, self.max_rows)
        first = self.first_stage(listed, self.cut)
        chosen = _ChosenRows(listed, first)
        self.walk(listed, chosen, first)
        return chosen.finish()


class BuildPrefix(_Build):
    """All listed rows up to the cut: their importance in the layers that rank them, and whatever
    the rest of the model reads. Does not change the graph."""

    name: ClassVar[str] = "build-prefix"

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, listed_inputs, masked [b * R], state) -> (importance [b * R]
        in the cut's layer, and in the one before it, *frontier)."""
        names = (*listed_inputs(self.plan), "masked")
        listed = _ListedRows(gm, self.plan, names, self.max_rows)
        first = self.first_stage(listed, self.cut)
        crossing = frontier_of(gm, self.plan, self.cut)
        for item in crossing:  # the cut's own queries are made here as well
            first |= listed.ancestors([item.node])
        self.walk(listed, None, first)
        at_cut, before = self.plan.sites[self.cut], self.plan.sites[self.cut - 1]
        listed.write(at_cut, listed.rows_of[at_cut.node])
        ranked = [self._importance(listed, site) for site in (at_cut, before)]
        if self.plan.ranks is not None:
            both = listed.values.call(aten.stack.default, ranked)
            both = insert_sum_over_ranks(listed.graph, both, self.plan.ranks.group)
            ranked = [listed.values.call(aten.select.int, both, 0, at) for at in (0, 1)]
        listed.graph.output((*ranked, *(listed.active[item.node] for item in crossing)))
        listed.graph.lint()
        return fx.GraphModule(gm, listed.graph)

    def _importance(self, listed: _ListedRows, site: Site) -> fx.Node:
        node, row = listed.by_name[site.node], listed.rows_of[site.node]
        query, key = (listed.flat(listed.argument(arg, row)) for arg in node.args[:2])
        inputs = listed.inputs
        return listed.values.call(
            torch.ops.focus_compile.importance.default,
            query, key, inputs["masked"], inputs["starts"], self.max_rows, node.args[4],
        )  # fmt: skip


class BuildLeave(_Build):
    """What the rows that stay carry over the cut."""

    name: ClassVar[str] = "build-leave"

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (rows [b, R], chosen [b, K], *frontier of the list) -> (*frontier of the
        chosen rows)."""
        graph = fx.Graph()
        rows, chosen = graph.placeholder("rows"), graph.placeholder("chosen")
        ids = tensor_of(gm.graph.find_nodes(op="placeholder")[self.plan.ids.position])
        assert ids is not None
        for node in (rows, chosen):
            node.meta["device"] = ids.device
        between = RowValues(graph, chosen, rows, self.plan.batch, LISTED)
        picked = []
        for item in frontier_of(gm, self.plan, self.cut):
            shape = list(item.shape)
            operand = Operand(item.node, "gather", item.axes, len(shape))
            picked.append(between.select(graph.placeholder(item.input), shape, operand))
        graph.output(tuple(picked))
        graph.lint()
        return fx.GraphModule(gm, graph)


class BuildSuffix(_Build):
    """A list of rows that stayed, from the cut's attention on, and logits of the chosen ones. Does
    not change the graph."""

    name: ClassVar[str] = "build-suffix"

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A graph of (model inputs, listed_inputs, CHOSEN_INPUTS, *frontier, state) -> (*outputs),
        whose list are the rows that stayed."""
        crossing = frontier_of(gm, self.plan, self.cut)
        names = (*listed_inputs(self.plan), *CHOSEN_INPUTS, *(item.input for item in crossing))
        listed = _ListedRows(gm, self.plan, names, self.max_rows)
        before = self.first_stage(listed, self.cut)
        for item in crossing:
            before |= listed.ancestors([item.node])
            listed.active[item.node] = listed.inputs[item.input]
        listed.before = before
        first = self.first_stage(listed, len(self.plan.sites) - 1)
        chosen = _ChosenRows(listed, first | before)
        self.walk(listed, chosen, first)
        return chosen.finish()


def frontier_of(gm: fx.GraphModule, plan: Plan, cut: int) -> tuple[Frontier, ...]:
    """What the second stage reads of the first, in graph order: the cut's queries, the residual
    stream, and any other row value that is used on both sides."""
    _require_cut(plan, cut)
    by_name = {node.name: node for node in gm.graph.nodes}
    rows = {row.node: row for row in plan.rows}
    site = plan.sites[cut]
    query = by_name[site.node].args[0]
    assert isinstance(query, fx.Node)
    first: set[str] = set()
    pending = [site.key, site.value, query.name, *(s.node for s in plan.sites[:cut])]
    while pending:
        name = pending.pop()
        if name not in first:
            first.add(name)
            pending.extend(n.name for n in by_name[name].all_input_nodes)
    first |= _elements_of(first, by_name)
    crossing: dict[str, RowAxes] = {}
    for row in plan.rows:
        if row.node in first:
            continue
        keys = () if row.node != site.node else (site.key, site.value)
        for operand in row.operands:
            if operand.use == "rows" and operand.node in first and operand.node not in keys:
                assert operand.axes is not None
                crossing[operand.node] = operand.axes
    for output in plan.outputs:
        if output.node in first:
            crossing[output.node] = output.axes
    order = [name for name in rows if name in crossing]
    return tuple(
        Frontier(name, crossing[name], tuple(listed_shape(by_name[name], crossing[name], plan)))
        for name in order
    )


def _require_cut(plan: Plan, cut: int) -> None:
    """Rows leave between two layers."""
    layers = len(plan.sites)
    if layers < 2:
        raise PassError("a block-diffusion step needs two layers of attention")
    if not 1 <= cut < layers:
        raise PassError(f"rows cannot leave at layer {cut} of {layers}; set evict_layer")


def _elements_of(names: Set[str], by_name: Mapping[str, fx.Node]) -> set[str]:
    """The elements of tuples among the nodes: they are where the tuple is, since only tensors
    cross over."""
    users = (user for name in names for user in by_name[name].users)
    return {user.name for user in users if user.target is operator.getitem}


def listed_shape(node: fx.Node, axes: RowAxes, plan: Plan) -> list[sympy.Expr]:
    """The node's shape with `LISTED` in place of the tokens."""
    shape = shape_of(node)
    axis = axes.token.axis
    shape[axis] = sympy.cancel(shape[axis] * LISTED / plan.length)
    return shape
