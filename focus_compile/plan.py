"""The plan: what analysis found and decided. Frozen and printable; rewriting only reads it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
from torch import fx

from focus_compile.key_costs import KeyCosts

__all__ = [
    "FRAGMENT",
    "Factor",
    "InputRole",
    "Operand",
    "OutputRows",
    "Plan",
    "Ranks",
    "Refusal",
    "RowAxes",
    "RowOp",
    "Shards",
    "Site",
    "Tail",
]

REGIONS = ("dense-prefix", "sink-capture", "sparse-suffix", "dense-tail")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the exact program runs instead: what, where, and what to do about it."""

    reason: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.reason}{place}.{remedy}"

    def to_dict(self) -> dict[str, str]:
        return {"reason": self.reason, "where": self.where, "remedy": self.remedy}


FRAGMENT = Refusal("nothing in the graph reads weights or attends")
"""Of a part that Dynamo cut off a forward: no loss to run it as it is."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of one axis: the axis has size outer * factor * inner, row-major."""

    axis: int
    inner: sympy.Expr = sympy.S.One

    def __str__(self) -> str:
        return str(self.axis) if self.inner == 1 else f"{self.axis}/{self.inner}"


@dataclass(frozen=True, slots=True)
class RowAxes:
    """Where a value carries its rows: the axis of the batch (None: one sequence) and of tokens.

    order: the sort in whose order the rows are; empty: in their own.
    places: the value holds no rows but where they are (passes/sorted_rows.py).
    """

    token: Factor
    batch: Factor | None = None
    order: str = ""
    places: bool = False

    def __str__(self) -> str:
        order = f" in the order of {self.order}" if self.order else ""
        what = "places of " if self.places else ""
        return f"{what}tokens@{self.token}" + (f" batch@{self.batch}" if self.batch else "") + order


@dataclass(frozen=True, slots=True)
class Operand:
    """How a row-wise op reads one input.

    use: "rows" (recomputed rows), "gather" (computed in full, rows selected) or "full".
    axes and rank: for "gather", the rows' axes after left-padding the value to `rank` axes.
    """

    node: str
    use: str
    axes: RowAxes | None = None
    rank: int = 0


@dataclass(frozen=True, slots=True)
class RowOp:
    """A node that is instantiated at the active rows only, and how it reads its inputs."""

    node: str
    axes: RowAxes
    operands: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Site:
    """One attention subgraph in canonical form, in layer order."""

    index: int
    node: str
    key: str
    value: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    masked: bool
    spelling: str
    where: str
    region: str = "dense-prefix"

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class InputRole:
    """What an input of the captured graph is: "ids", "weight", "size", "guarded", or "tail" for
    one that only what follows the model reads."""

    position: int
    name: str
    role: str


@dataclass(frozen=True, slots=True)
class OutputRows:
    """An output of the captured graph: its node, the axes of its rows, and the bytes of a row."""

    node: str
    axes: RowAxes
    row_bytes: int = 0


@dataclass(frozen=True)
class Tail:
    """What follows the model in its graph and mixes rows: graph of (*inputs at `inputs`, *outputs
    of the model at `reads`) -> the outputs of the whole graph."""

    graph: fx.GraphModule = field(repr=False, compare=False)
    inputs: tuple[int, ...]
    reads: tuple[str, ...]
    operations: int

    def __str__(self) -> str:
        return f"{self.operations} ops, which read {', '.join(self.reads)} of all rows"

    def to_dict(self) -> dict[str, Any]:
        return {"operations": self.operations, "reads": list(self.reads)}


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that a model is split over.

    group: its name in torch.distributed; collectives: the forward's own, by kind and number; added:
    what a step adds to them.
    """

    group: str
    size: int
    collectives: tuple[tuple[str, int], ...]
    added: int = 0

    def __str__(self) -> str:
        own = ", ".join(f"{count} {name}" for name, count in self.collectives)
        return (
            f"{self.size}; collectives of a forward: {own}; a step adds {self.added} of scores, "
            "a call one of its decisions"
        )

    def to_dict(self) -> dict[str, Any]:
        own = dict(self.collectives)
        return {"size": self.size, "collectives": own, "added_by_step": self.added}


@dataclass(frozen=True, slots=True)
class Shards:
    """The processes that the keys and values of every sequence are spread over, by position.

    group: its name in torch.distributed; rank: which of them this is; joins, choices: collectives
    of a step that join attention, and that bring scores together before keys are chosen.
    """

    group: str
    size: int
    rank: int
    joins: int = 0
    choices: int = 0

    def __str__(self) -> str:
        return (
            f"{self.size} hold the keys and values, by position; collectives of a step: "
            f"{self.joins} join attention, {self.choices} gather scores; a refresh gathers the "
            "keys and values of a layer at a time, a call has one of its decisions"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size, "joins": self.joins, "choices": self.choices}


@dataclass(frozen=True)
class Plan:
    """Everything the rewrites and the runtime need to know of one captured graph."""

    inputs: tuple[InputRole, ...]
    sites: tuple[Site, ...]
    rows: tuple[RowOp, ...]
    outputs: tuple[OutputRows, ...]
    batch: sympy.Expr
    length: sympy.Expr
    vocabulary: int
    logits: int | None
    """Which output holds the logits, [batch, length, vocabulary]; None: the last two outputs are
    their confidence and its token."""
    key_block: int
    block_summary: str
    sink_tokens: int
    logits_rows: str = "all"
    """Which rows a refresh returns: "all", or "response"."""
    merge_projections: bool = False
    """Whether the step's linear layers of one input become one."""
    list_reuse: bool = False
    """Whether a step may read the keys that an earlier one chose."""
    partial_refresh: bool = False
    """Whether there is a program that renews some rows with all keys."""
    evict_layer: int | None = None
    """The layer after whose keys and values rows leave, if some do."""
    tail: Tail | None = None
    """What follows the model in its graph and runs in full, if something does."""
    writes: tuple[tuple[int, int], ...] = ()
    """Outputs of the graph that are values of inputs written in place: (output, input)."""
    ranks: Ranks | None = None
    """Where the model is split over processes; its heads are then those of this one."""
    shards: Shards | None = None
    """Where keys and values are spread over processes; every one has the whole model."""
    key_costs: KeyCosts | None = None
    """What choosing keys and reading all would cost, where that was measured."""
    refusals: tuple[Refusal, ...] = ()
    reads_cache: bool = False
    """Whether it is refused because attention reads a cache that the forward was given."""
    misses: tuple[Refusal, ...] = ()
    operations: tuple[tuple[str, int], ...] = field(default=(), repr=False)

    @property
    def sink_blocks(self) -> int:
        """The first key blocks, which hold `sink_tokens` positions."""
        return -(-self.sink_tokens // self.key_block)

    @property
    def held_length(self) -> sympy.Expr:
        """Positions that the caches have room for: all, or a shard of whole key blocks."""
        return self.length if self.shards is None else self.shard_of(self.length)

    def shard_of(self, length: Any) -> Any:
        """Positions of a shard of a sequence so long; the last rank may have fewer."""
        assert self.shards is not None
        share = self.shards.size * self.key_block
        return (length + share - 1) // share * self.key_block

    def why_not_shared(self, length: int) -> str | None:
        """Why a sequence so long cannot be spread over the ranks, if so."""
        if self.shards is None or self.shard_of(length) * (self.shards.size - 1) < length:
            return None
        return (
            f"{length} tokens are too few to give each of {self.shards.size} ranks a part of whole "
            f"key blocks of {self.key_block} tokens"
        )

    @cached_property
    def ids(self) -> InputRole:
        """The input that holds the token ids."""
        return next(role for role in self.inputs if role.role == "ids")

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What each site is called where layers are told apart: `layer 3 sparse-suffix`."""
        return tuple(f"layer {site.index} {site.region}" for site in self.sites)

    def positions(self, role: str) -> tuple[int, ...]:
        """Positions of the graph inputs of one role."""
        return self._positions.get(role, ())

    @cached_property
    def _positions(self) -> dict[str, tuple[int, ...]]:
        """Asked for in every call: a large model has hundreds of inputs."""
        roles = {item.role for item in self.inputs}
        return {
            role: tuple(item.position for item in self.inputs if item.role == role)
            for role in roles
        }

    def sites_of(self, region: str) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.region == region)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        uses = Counter(operand.use for row in self.rows for operand in row.operands)
        return {
            "accepted": not self.refusals,
            "refusals": [refusal.to_dict() for refusal in self.refusals],
            "misses": [miss.to_dict() for miss in self.misses],
            "batch": str(self.batch),
            "length": str(self.length),
            "vocabulary": self.vocabulary,
            "key_block": self.key_block,
            "block_summary": self.block_summary,
            "sink_tokens": self.sink_tokens,
            "logits_rows": self.logits_rows,
            "merge_projections": self.merge_projections,
            "list_reuse": self.list_reuse,
            "partial_refresh": self.partial_refresh,
            "evict_layer": self.evict_layer,
            "key_costs": None if self.key_costs is None else self.key_costs.to_dict(),
            "ranks": None if self.ranks is None else self.ranks.to_dict(),
            "shards": None if self.shards is None else self.shards.to_dict(),
            "tail": None if self.tail is None else self.tail.to_dict(),
            "inputs": [
                {"position": item.position, "name": item.name, "role": item.role}
                for item in self.inputs
                if item.role != "weight"
            ],
            "weights": len(self.positions("weight")),
            "regions": {name: [s.index for s in self.sites_of(name)] for name in REGIONS},
            "sites": [site.to_dict() for site in self.sites],
            "row_operations": dict(self.operations),
            "operands": dict(sorted(uses.items())),
            "gathered": sorted(
                {o.node for row in self.rows for o in row.operands if o.use == "gather"}
            ),
            "outputs": [{"node": item.node, "axes": str(item.axes)} for item in self.outputs],
        }

    def __str__(self) -> str:
        if self.refusals:
            lines = ["plan: exact program (refused)"]
            lines += [f"  refused: {refusal}" for refusal in self.refusals]
        else:
            lines = [f"plan: {len(self.sites)} attention sites, [{self.batch}, {self.length}] ids"]
        lines += [f"  near miss: {miss}" for miss in self.misses]
        for site in self.sites:
            mask = " mask" if site.masked else ""
            shape = f"{site.heads}/{site.kv_heads} heads of {site.head_dim}"
            what = f"{site.region:<13} {site.spelling}, {shape}{mask}"
            lines.append(f"  layer {site.index:>2} {what}")
        if self.evict_layer is not None and not self.refusals:
            lines.append(
                f"  rows: some leave after the keys and values of layer {self.evict_layer}"
            )
        if self.partial_refresh and not self.refusals:
            lines.append("  a block entry may refresh some rows of the prompt")
        if self.key_costs is not None:
            lines.append(f"  keys: {self.key_costs}")
        if self.rows:
            counts = ", ".join(f"{name} {count}" for name, count in self.operations)
            lines.append(f"  row-wise: {len(self.rows)} ops ({counts})")
            gathered = self.to_dict()["gathered"]
            lines.append(f"  computed in full, rows selected: {', '.join(gathered) or 'nothing'}")
        if self.ranks is not None:
            lines.append(f"  ranks: {self.ranks}")
        if self.shards is not None:
            lines.append(f"  ranks: {self.shards}")
        if self.tail is not None:
            lines.append(f"  in full behind the model: {self.tail}")
        guarded = [item.name for item in self.inputs if item.role == "guarded"]
        lines.append(f"  trajectory guard: ids{''.join(', ' + name for name in guarded)}, weights")
        return "\n".join(lines)
