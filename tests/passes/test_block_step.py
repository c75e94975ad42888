"""The graphs of a block-diffusion step against the dense model, on lists of random rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from focus_compile.block_diffusion.programs import BlockPrograms, RowList
from focus_compile.block_diffusion.tracing import TracedModel, trace
from focus_compile.config import FocusConfig
from focus_compile.errors import PassError
from focus_compile.passes.block_causality import block_causal_mask
from focus_compile.passes.block_step import (
    CHOSEN_INPUTS,
    LISTED_INPUTS,
    BuildLeave,
    BuildPrefix,
    BuildSuffix,
    BuildWhole,
    frontier_of,
)
from tests.block_diffusion.tiny import MASK, VOCAB, decoder, traced_once
from tests.graphs import op_names

LENGTH = 24
BLOCK = 4
LAYERS = 3
CUTS = (1, 2)
quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def traced(name: str = "qwen3") -> TracedModel:
    config = FocusConfig(
        policy="dual-cache", mask_token_id=MASK, block_length=BLOCK, lowering="eager"
    )
    return traced_once(decoder(name, num_hidden_layers=LAYERS), config, LENGTH)


@dataclass
class Sequences:
    """Random tokens, and how many whole blocks of each sequence the caches hold already."""

    tokens: Tensor
    done: list[int]
    """Positions that are in the caches, of each sequence; the next block is the list."""
    slots: list[int]
    seed: int = 0
    padding: int = 0
    local: list[list[int]] = field(default_factory=list)
    """Rows of the block that are listed, of each sequence; all of them unless given."""

    def rows(self, at: int) -> list[int]:
        chosen = self.local[at] if self.local else list(range(BLOCK))
        return [self.done[at] + i for i in chosen]


@st.composite
def sequences(draw: st.DrawFn) -> Sequences:
    count = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    done = [BLOCK * draw(st.integers(0, LENGTH // BLOCK - 1)) for _ in range(count)]
    return Sequences(
        torch.randint(VOCAB, (count, LENGTH), generator=generator),
        done,
        draw(st.permutations(range(4)))[:count],
        seed,
        draw(st.integers(0, 5)),
    )


def dense(name: str, tokens: Tensor, length: int) -> Tensor:
    """Logits [length, V] of one sequence by the model's own forward."""
    model = decoder(name, num_hidden_layers=LAYERS)
    with torch.no_grad():
        mask = block_causal_mask(length, BLOCK)
        logits: Tensor = model(tokens[None, :length], attention_mask=mask, use_cache=False).logits
    return logits[0]


def listed(given: Sequences, rows: list[list[int]], lengths: list[int], padding: int) -> RowList:
    """The rows [S][..] of each sequence, and `padding` more that repeat the last of them."""
    flat = [(slot, at, p) for at, slot in enumerate(given.slots) for p in rows[at]]
    real = len(flat)
    flat += [flat[-1]] * padding
    starts = [0]
    for own in rows:
        starts.append(starts[-1] + len(own))
    return RowList(
        row_ids=torch.tensor([[int(given.tokens[at, p]) for _, at, p in flat]]),
        rows=torch.tensor([[p for _, _, p in flat]]),
        slots=torch.tensor([slot for slot, _, _ in flat]),
        places=torch.tensor([LENGTH if i >= real else p for i, (_, _, p) in enumerate(flat)]),
        owners=torch.tensor(given.slots),
        starts=torch.tensor(starts),
        lengths=torch.tensor(lengths),
    )


def everything(rows: RowList) -> tuple[Tensor, Tensor]:
    return torch.arange(rows.rows.shape[1])[None], rows.starts


class Programs:
    """The three programs, op by op, with caches of four slots that are NaN until written."""

    def __init__(self, name: str, cut: int) -> None:
        model = traced(name)
        self.args = model.arguments
        self.made = BlockPrograms.build(
            model.captured, model.pipeline, model.plan, BLOCK, cut, "eager"
        )
        self.made.merge(self.args)
        self.caches = self.made.allocate(4, LENGTH, torch.device("cpu"))
        for cache in self.caches:
            cache.fill_(float("nan"))

    def whole(self, block: RowList, chosen: Tensor, starts: Tensor) -> Tensor:
        """Logits [K, V]."""
        outputs = self.made.run_whole(self.args, self.caches, block, chosen, starts)
        return outputs[self.made.plan.logits][0]

    def prefix(self, block: RowList, masked: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return self.made.run_prefix(self.args, self.caches, block, masked)

    def suffix(
        self, block: RowList, chosen: Tensor, starts: Tensor, frontier: Sequence[Tensor]
    ) -> Tensor:
        """Logits [K, V]."""
        outputs = self.made.run_suffix(self.args, self.caches, block, chosen, starts, frontier)
        return outputs[self.made.plan.logits][0]

    def leave(self, block: RowList, chosen: list[int], frontier: Sequence[Tensor]) -> Any:
        """The frontier of some rows of a list."""
        return self.made.run_leave(block, torch.tensor([chosen]), frontier)


def fill(programs: Programs, given: Sequences) -> None:
    """K/V of what is done, one list per block."""
    for first in range(0, LENGTH, BLOCK):
        at = [i for i, done in enumerate(given.done) if first < done]
        if at:
            some = replace(given, tokens=given.tokens[at], slots=[given.slots[i] for i in at])
            block = list(range(first, first + BLOCK))
            rows = listed(some, [block] * len(at), [first + BLOCK] * len(at), 0)
            programs.whole(rows, *everything(rows))


def compute(programs: Programs, given: Sequences, *, split: bool) -> Tensor:
    """Logits [R, V] of the listed block of every sequence, by one graph or by two."""
    rows = [given.rows(at) for at in range(len(given.slots))]
    lengths = [done + BLOCK for done in given.done]
    block = listed(given, rows, lengths, given.padding)
    if not split:
        return programs.whole(block, *everything(block))
    masked = torch.arange(block.rows.shape[1]) < block.starts[-1]
    _, _, frontier = programs.prefix(block, masked)
    return programs.suffix(block, *everything(block), frontier)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
@given(given_=sequences())
@quick
def test_lists_of_several_sequences_equal_the_dense_model(name: str, given_: Sequences) -> None:
    """Also by prefix and suffix, where all rows go on; padding and caches never written do not
    matter."""
    expected = torch.cat(
        [dense(name, given_.tokens[at], done + BLOCK)[done:] for at, done in enumerate(given_.done)]
    )
    for cut in (None, *CUTS):
        programs = Programs(name, cut or 1)
        fill(programs, given_)
        logits = compute(programs, given_, split=cut is not None)
        close(logits[: len(expected)], expected)
        assert not logits.isnan().any()


@given(given_=sequences(), data=st.data())
@quick
def test_chosen_rows_have_their_logits_in_any_order(given_: Sequences, data: st.DataObject) -> None:
    """Only the last layer's rows are narrowed, so all others are as before; a row may repeat."""
    programs = Programs("qwen3", 1)
    fill(programs, given_)
    given_.padding = 0
    logits = compute(programs, given_, split=False)
    counts = [data.draw(st.integers(0, BLOCK)) for _ in given_.slots]
    chosen, starts = [], [0]
    for at, count in enumerate(counts):
        own = data.draw(st.lists(st.integers(0, BLOCK - 1), min_size=count, max_size=count))
        chosen += [at * BLOCK + i for i in own]
        starts.append(len(chosen))
    spare = data.draw(st.integers(1, 3))
    index = torch.tensor([chosen + [0] * spare])
    rows = [given_.rows(at) for at in range(len(given_.slots))]
    block = listed(given_, rows, [done + BLOCK for done in given_.done], 0)
    some = programs.whole(block, index, torch.tensor(starts))
    close(some[: len(chosen)], logits[chosen])


@pytest.mark.parametrize("cut", CUTS)
@given(given_=sequences(), data=st.data())
@quick
def test_rows_that_leave_change_only_the_deeper_layers(
    cut: int, given_: Sequences, data: st.DataObject
) -> None:
    """Caches up to the cut hold the whole list; behind it, the kept rows are written and no other
    place is touched."""
    programs = Programs("qwen3", cut)
    fill(programs, given_)
    before = [cache.clone() for cache in programs.caches]
    count = len(given_.slots)
    keep = [data.draw(st.sets(st.integers(0, BLOCK - 1), min_size=1)) for _ in range(count)]
    rows = [given_.rows(at) for at in range(count)]
    lengths = [done + BLOCK for done in given_.done]
    block = listed(given_, rows, lengths, given_.padding)
    _, _, frontier = programs.prefix(block, torch.zeros(block.rows.shape[1], dtype=torch.bool))
    kept = [[given_.done[at] + i for i in sorted(keep[at])] for at in range(count)]
    extents = [own[-1] + 1 for own in kept]
    # All in front of the last kept row must have been computed: the rest of the block first.
    logits = programs.suffix(block, *everything(block), frontier)
    last = torch.arange(1, count + 1) * BLOCK - 1
    close(programs.suffix(block, last[None], torch.arange(count + 1), frontier), logits[last])
    whole = [cache.clone() for cache in programs.caches]
    for cache, old in zip(programs.caches[2 * cut + 2 :], before[2 * cut + 2 :], strict=True):
        cache.copy_(old)
    narrow = listed(given_, kept, extents, 0)
    chosen = [at * BLOCK + i for at in range(count) for i in sorted(keep[at])]
    handed = programs.leave(block, chosen, frontier)
    programs.suffix(narrow, *everything(narrow), handed)
    for at, (slot, done) in enumerate(zip(given_.slots, given_.done, strict=True)):
        own = [p - done for p in kept[at]]
        gone = [i for i in range(BLOCK) if i not in own]
        for number, cache in enumerate(programs.caches):
            here = cache[slot, :, done : done + BLOCK]
            if number < 2 * cut + 2:
                close(here, whole[number][slot, :, done : done + BLOCK])
            else:
                old = before[number][slot, :, done : done + BLOCK]
                assert torch.equal(here[:, gone].isnan(), old[:, gone].isnan())
            elsewhere = torch.ones(LENGTH, dtype=torch.bool)
            elsewhere[done : done + BLOCK] = False
            same = cache[slot, :, :LENGTH][:, elsewhere]
            expected = before[number][slot, :, :LENGTH][:, elsewhere]
            torch.testing.assert_close(same, expected, rtol=0, atol=0, equal_nan=True)


@given(given_=sequences(), data=st.data())
@quick
def test_importance_is_that_of_the_two_layers(given_: Sequences, data: st.DataObject) -> None:
    """Sums to heads x masked rows for each sequence, and is nothing elsewhere."""
    programs = Programs("qwen3", 1)
    fill(programs, given_)
    rows = [given_.rows(at) for at in range(len(given_.slots))]
    block = listed(given_, rows, [done + BLOCK for done in given_.done], given_.padding)
    size = block.rows.shape[1]
    flags = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    masked = torch.tensor(flags)
    at_cut, before, _ = programs.prefix(block, masked)
    starts = block.starts.tolist()
    for scores in (at_cut, before):
        assert scores.shape == (size,)
        assert scores[~masked].count_nonzero() == 0
        assert scores[starts[-1] :].count_nonzero() == 0
        for first, end in pairwise(starts):
            total = 4.0 * int(masked[first:end].sum())
            close(scores[first:end].sum(), torch.tensor(total))


def linear_rows(graph: Any) -> int:
    return sum(name == "linear.default" for name in op_names(graph))


def test_each_stage_has_its_layers() -> None:
    """The prefix ends with the cut's projections, the suffix begins behind them."""
    model = traced()
    gm, plan = model.graph, model.plan
    dense_count = linear_rows(gm)
    assert dense_count == 7 * LAYERS + 1
    for cut in CUTS:
        prefix = BuildPrefix(plan, BLOCK, cut).apply(gm)
        suffix = BuildSuffix(plan, BLOCK, cut).apply(gm)
        names = op_names(prefix)
        assert names.count("focus_compile.importance.default") == 2
        assert names.count("focus_compile.ragged_attention.default") == cut
        assert names.count("index_put_.default") == 2 * (cut + 1)
        assert linear_rows(prefix) == 7 * cut + 3, "with the cut's queries"
        assert linear_rows(suffix) == dense_count - linear_rows(prefix)
        names = op_names(suffix)
        assert names.count("focus_compile.importance.default") == 0
        assert names.count("focus_compile.ragged_attention.default") == LAYERS - cut
        assert names.count("index_put_.default") == 2 * (LAYERS - cut - 1)
    whole = BuildWhole(plan, BLOCK, LAYERS - 1).apply(gm)
    assert linear_rows(whole) == dense_count
    assert op_names(whole).count("focus_compile.ragged_attention.default") == LAYERS


def test_the_model_graph_is_not_changed() -> None:
    model = traced()
    before = str(model.graph.graph)
    for build in (BuildWhole(model.plan, BLOCK, 2), BuildPrefix(model.plan, BLOCK, 1),
                  BuildLeave(model.plan, BLOCK, 1), BuildSuffix(model.plan, BLOCK, 1)):  # fmt: skip
        build.apply(model.graph)
    assert str(model.graph.graph) == before


def test_inputs_are_the_models_then_the_lists_then_the_caches() -> None:
    model = traced()
    gm, plan = model.graph, model.plan
    own = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    caches = [f"{what}_cache_{site.index}" for site in plan.sites for what in ("key", "value")]
    handed = [item.input for item in frontier_of(gm, plan, 1)]
    expected = {
        BuildWhole: [*LISTED_INPUTS, *CHOSEN_INPUTS],
        BuildPrefix: [*LISTED_INPUTS, "masked"],
        BuildSuffix: [*LISTED_INPUTS, *CHOSEN_INPUTS, *handed],
    }
    for build, names in expected.items():
        graph = build(plan, BLOCK, 1).apply(gm)
        placeholders = [n.name for n in graph.graph.find_nodes(op="placeholder")]
        assert placeholders == [*own, *names, *caches]
    assert len(handed) == 2, "queries and residual"


def test_positions_computed_from_all_ids_are_told() -> None:
    """Their rows cannot be known from a list."""

    def call(model: Any, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        at = (ids >= 0).long().cumsum(1) - 1
        logits: Tensor = model(ids, attention_mask=mask, position_ids=at, use_cache=False).logits
        return logits

    config = FocusConfig(
        policy="dual-cache", mask_token_id=MASK, block_length=BLOCK, lowering="eager"
    )
    model = trace(decoder("qwen3", num_hidden_layers=2), config, LENGTH, call)
    with pytest.raises(PassError, match="pass position_ids"):
        BuildWhole(model.plan, BLOCK, 1).apply(model.graph)
