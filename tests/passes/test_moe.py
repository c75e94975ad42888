"""Mixtures of experts: accepted where tokens go their own ways, refused where they compete."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_compile.block_diffusion.batch_generator import BatchGenerator
from focus_compile.passes.block_causality import block_causal_mask
from tests import versions
from tests.compiled import compiled, run_call, seen_steps
from tests.graphs import rows_alone, trace
from tests.models import build_stock
from tests.oracle import Oracle
from tests.passes.test_token_axis import HIDDEN, Hook, assert_rows_alone_equal_dense, traced
from tests.test_families import MASK, OPTIONS, trajectory

torch.set_num_threads(1)
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
EXPERTS, CHOSEN = 8, 2


def experts_of(model: Any) -> Tensor:
    """[8, 8, 8], made of the positions' weights."""
    return model.positions.view(EXPERTS, HIDDEN, HIDDEN)


def routed(model: Any, hidden: Tensor, k: int = CHOSEN) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, 8], and the weight and the expert of each choice [N * k]."""
    tokens = hidden.reshape(-1, HIDDEN)
    weights, experts = model.mix(tokens).softmax(-1).topk(k, -1)
    return tokens, weights.reshape(-1), experts.reshape(-1)


def ends_of(experts: Tensor) -> Tensor:
    counts = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1)
    return counts.cumsum(0, dtype=torch.int32)


def grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    import transformers.integrations.moe  # noqa: F401

    return torch.ops.transformers.grouped_mm_fallback(rows, weights, ends)


def inverse_of(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return inverse


def mixture(
    model: Any,
    hidden: Tensor,
    *,
    k: int = CHOSEN,
    sort: Any = lambda e: e.sort(),
    enter: Any = lambda t, order, k: t[order // k],
    ends: Any = lambda e, sorted_e: ends_of(sorted_e),
    between: Any = lambda x, order, e: x,
    leave: Any = lambda x, order, k: x[inverse_of(order)].view(-1, k, HIDDEN).sum(1),
) -> Tensor:
    """Sort by expert, multiply the groups, sort back; each part may be replaced."""
    tokens, weights, experts = routed(model, hidden, k)
    sorted_experts, order = sort(experts)
    rows = enter(tokens, order, k)
    rows = grouped(rows, experts_of(model), ends(experts, sorted_experts)).tanh()
    rows = between(rows * weights[order][:, None], order, sorted_experts)
    return hidden + leave(rows, order, k).view(hidden.shape)


def gathered(model: Any, hidden: Tensor) -> Tensor:
    tokens, weights, experts = routed(model, hidden)
    rows = tokens.repeat_interleave(CHOSEN, 0)
    rows = torch.bmm(experts_of(model)[experts], rows[..., None])[..., 0] * weights[:, None]
    return hidden + rows.view(-1, CHOSEN, HIDDEN).sum(1).view(hidden.shape)


def added_back(rows: Tensor, order: Tensor, k: int) -> Tensor:
    return torch.zeros(rows.shape[0] // k, HIDDEN).index_add(0, order // k, rows)


def expert_gather(model: Any, hidden: Tensor) -> Tensor:
    _, weights, experts = routed(model, hidden)
    bias = experts_of(model)[experts].mean(1) * weights[:, None]
    return hidden + bias.view(*hidden.shape[:2], CHOSEN, HIDDEN).sum(2)


def by_argsort(e: Tensor) -> tuple[Tensor, Tensor]:
    order = e.argsort()
    return e[order], order


ACCEPTED: dict[str, Hook] = {
    "experts gathered": lambda m, h, i: gathered(m, h),
    "biases gathered": lambda m, h, i: expert_gather(m, h),
    "grouped": lambda m, h, i: mixture(m, h),
    "grouped, one choice": lambda m, h, i: mixture(m, h, k=1),
    "grouped, all experts": lambda m, h, i: mixture(m, h, k=EXPERTS),
    "argsort, and its argsort": lambda m, h, i: mixture(
        m, h, sort=by_argsort,
        leave=lambda x, order, k: x[order.argsort()].view(-1, k, HIDDEN).sum(1),
    ),
    "stable sort": lambda m, h, i: mixture(m, h, sort=lambda e: e.sort(stable=True)),
    "inverse by scatter": lambda m, h, i: mixture(
        m, h,
        leave=lambda x, order, k: x[
            torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0]))
        ].view(-1, k, HIDDEN).mean(1),
    ),
    "added back": lambda m, h, i: mixture(m, h, leave=added_back),
    "counted before the sort": lambda m, h, i: mixture(m, h, ends=lambda e, s: ends_of(e)),
    "biases in order": lambda m, h, i: mixture(
        m, h, between=lambda x, order, e: x + experts_of(m)[e].mean(1)
    ),
    "features apart in order": lambda m, h, i: mixture(
        m, h,
        between=lambda x, order, e: F.layer_norm(x.view(-1, 2, 4).softmax(-1).flatten(1), (8,)),
    ),
    "experts of the best group": lambda m, h, i: group_limited(m, h),
    "sorted by norm and back": lambda m, h, i: sorted_by_norm(m, h, inverse_of),
    "features picked": lambda m, h, i: h + h[..., [3, 1, 2, 0, 5, 4, 7, 6]],
    "repeated and averaged": lambda m, h, i: (
        h + m.mix(h.reshape(-1, HIDDEN).repeat_interleave(3, 0)).view(*h.shape[:2], 3, -1).mean(2)
    ),
}  # fmt: skip


def group_limited(model: Any, hidden: Tensor) -> Tensor:
    scores = model.mix(hidden).sigmoid()
    groups = scores.view(*hidden.shape[:2], 2, -1).amax(-1)
    mask = torch.zeros_like(groups).scatter(-1, groups.topk(1, -1).indices, 1)
    return hidden + scores * mask.repeat_interleave(EXPERTS // 2, -1)


def sorted_by_norm(model: Any, hidden: Tensor, back: Any) -> Tensor:
    tokens = hidden.reshape(-1, HIDDEN)
    order = tokens.norm(dim=-1).argsort()
    return hidden + model.mix(tokens[order]).tanh()[back(order)].view(hidden.shape)


def capacity_limited(model: Any, hidden: Tensor) -> Tensor:
    """Each expert takes the first two tokens that choose it."""
    tokens, weights, experts = routed(model, hidden, 1)
    chosen = F.one_hot(experts, EXPERTS)
    place = (chosen.cumsum(0) * chosen).sum(-1)
    rows = torch.bmm(experts_of(model)[experts], tokens[..., None])[..., 0] * weights[:, None]
    return hidden + (rows * (place <= 2)[:, None]).view(hidden.shape)


def expert_choice(model: Any, hidden: Tensor) -> Tensor:
    """Each expert chooses two tokens."""
    tokens = hidden.reshape(-1, HIDDEN)
    weights, chosen = model.mix(tokens).softmax(-1).topk(2, 0)
    rows = torch.einsum("ech,ehd->ecd", tokens[chosen.t()], experts_of(model))
    rows = (rows * weights.t()[..., None]).flatten(0, 1)
    return hidden + torch.zeros_like(tokens).index_add(0, chosen.t().flatten(), rows).view(
        hidden.shape
    )


def load_balanced(model: Any, hidden: Tensor) -> Tensor:
    """Rows of crowded experts count for less."""
    tokens, weights, experts = routed(model, hidden, 1)
    load = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1)
    return hidden + (tokens * (weights / load[experts])[:, None]).view(hidden.shape)


def two_sorts(model: Any, hidden: Tensor) -> Tensor:
    """Leaves the order of another sort than it entered."""
    _, _, experts = routed(model, hidden)
    return mixture(
        model, hidden,
        leave=lambda x, order, k: x[inverse_of((-experts).argsort())].view(-1, k, HIDDEN).sum(1),
    )  # fmt: skip


REFUSED: dict[str, tuple[Hook, str]] = {
    "capacity": (lambda m, h, i: capacity_limited(m, h), "cumsum.default is not token-wise: works"),
    "experts choose tokens": (lambda m, h, i: expert_choice(m, h), "index_add.default"),
    "scattered to tokens": (
        lambda m, h, i: h + torch.zeros_like(h).scatter(1, h.argmax(1, keepdim=True), h[:, :1]),
        "scatters along the token axis",
    ),
    "scattered from one token": (
        lambda m, h, i: h.scatter(2, h[:, :1].argmax(-1, keepdim=True), 1.0),
        "scatters from a value with other rows",
    ),
    "load": (lambda m, h, i: load_balanced(m, h), "index.Tensor is not token-wise: needs every"),
    "not put back": (
        lambda m, h, i: mixture(m, h, leave=lambda x, order, k: x.view(-1, k, HIDDEN).sum(1)),
        "nothing undoes the order of sort",
    ),
    "put back by the order": (
        lambda m, h, i: sorted_by_norm(m, h, lambda order: order), "nothing undoes the order"
    ),
    "put back by a descending sort": (
        lambda m, h, i: sorted_by_norm(m, h, lambda order: order.argsort(descending=True)),
        "is not token-wise",
    ),
    "put back from one": (
        lambda m, h, i: mixture(
            m, h,
            leave=lambda x, order, k: x[
                torch.zeros_like(order).scatter(0, order, torch.arange(1, order.shape[0] + 1) - 1)
            ].view(-1, k, HIDDEN).sum(1),
        ),
        "is not token-wise",
    ),
    "two sorts": (lambda m, h, i: two_sorts(m, h), "is not token-wise"),
    "neighbours in order": (
        lambda m, h, i: mixture(m, h, between=lambda x, o, e: x + x.roll(1, 0)),
        "roll.default is not token-wise: works along the token axis",
    ),
    "mean in order": (
        lambda m, h, i: mixture(m, h, between=lambda x, o, e: x - x.mean(0, keepdim=True)),
        "needs every token of",
    ),
    "pairs in order": (
        lambda m, h, i: mixture(
            m, h, between=lambda x, o, e: x.view(-1, 2, HIDDEN).softmax(1).view(x.shape)
        ),
        "cuts through the sorted rows",
    ),
    "first places only": (
        lambda m, h, i: mixture(
            m, h, between=lambda x, o, e: x * (torch.arange(x.shape[0]) < 6)[:, None]
        ),
        "by rows that are in the order of sort",
    ),
    "value of a place": (
        lambda m, h, i: mixture(m, h, between=lambda x, o, e: x * o[:, None].float().cos()),
        "is not token-wise",
    ),
    "value of an inverse": (
        lambda m, h, i: mixture(
            m, h,
            leave=lambda x, o, k: (x[inverse_of(o)] * inverse_of(o).float().cos()[:, None])
            .view(-1, k, HIDDEN).sum(1),
        ),
        "index_put.default is not token-wise",
    ),
    "other tokens": (
        lambda m, h, i: mixture(m, h, enter=lambda t, order, k: t[(order + 1) % t.shape[0]]),
        "is not token-wise",
    ),
    "neighbouring choices": (
        lambda m, h, i: mixture(
            m, h, enter=lambda t, order, k: torch.cat([t, t], 0)[order]
        ),
        "concatenates along the token axis",
    ),
    "wide bins": (
        lambda m, h, i: mixture(
            m, h,
            ends=lambda e, s: torch.histc(s.float(), 8, 0, 8).cumsum(0, dtype=torch.int32),
        ),
        "the histogram has 8 bins of 0 to 8 for 8 experts",
    ),
    "equal groups": (
        lambda m, h, i: mixture(
            m, h, ends=lambda e, s: (torch.arange(EXPERTS) + 1).int() * (e.shape[0] // EXPERTS)
        ),
        "their ends are no cumulative sum",
    ),
    "half of the rows": (
        lambda m, h, i: mixture(
            m, h, ends=lambda e, s: (torch.histc(s.float(), 8, 0, 7) / 2).cumsum(0).int()
        ),
        "their sizes are no histogram",
    ),
    "other histogram": (
        lambda m, h, i: mixture(m, h, ends=lambda e, s: ends_of((s + 1) % EXPERTS)),
        "does not sort by what the histogram counts",
    ),
    "shifted bins": (
        lambda m, h, i: mixture(
            m, h,
            ends=lambda e, s: torch.histc(s.float(), 8, 1, 8).cumsum(0, dtype=torch.int32),
        ),
        "the histogram has 8 bins of 1 to 8 for 8 experts",
    ),
    "descending": (
        lambda m, h, i: mixture(m, h, sort=lambda e: e.sort(descending=True)),
        "in ascending order",
    ),
    "no expert": (lambda m, h, i: mixture(m, h, sort=lambda e: (e - 1).sort()), "is not known"),
    "groups without a sort": (
        lambda m, h, i: h + grouped(
            h.reshape(-1, HIDDEN), experts_of(m), ends_of(routed(m, h, 1)[2])
        ).view(h.shape),
        "no sort has put rows of one expert together",
    ),
    "choices of all tokens first": (
        lambda m, h, i: h + m.mix(h.reshape(-1, HIDDEN).repeat(2, 1)).view(2, *h.shape).sum(0),
        "repeats the token axis",
    ),
    "rows in halves": (
        lambda m, h, i: (
            h + h.reshape(-1, HIDDEN).repeat_interleave(2, 0)[: h.shape[0] * h.shape[1]].view(
                h.shape
            )
        ),
        "slices the token axis",
    ),
}  # fmt: skip


@versions.grouped_experts
@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("batch", [1, 2])
def test_mixtures_are_accepted(name: str, batch: int) -> None:
    assert_rows_alone_equal_dense(traced(ACCEPTED[name], batch, 6))


@versions.grouped_experts
@pytest.mark.parametrize("name", REFUSED)
def test_tokens_that_compete_are_refused(name: str) -> None:
    hook, why = REFUSED[name]
    graph = traced(hook, 2, 8)
    assert why in graph.reason
    refusals = graph.call.refusals
    assert len(refusals) == 1
    if "token-wise" in refusals[0].reason:
        assert "test_moe.py:" in refusals[0].where, "the user's line, not torch's"


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen3_moe, one choice of eight": {"num_experts": 8, "num_experts_per_tok": 1},
    "qwen3_moe, every other layer": {"decoder_sparse_step": 2},
    "qwen2_moe": {},
}


def stock(case: str, experts: str, **options: Any) -> nn.Module:
    model: Any = build_stock(case.split(",")[0], **FAMILIES[case], **options)
    model.set_experts_implementation(experts)
    return model


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", FAMILIES)
def test_stock_mixtures_are_row_wise(case: str, experts: str) -> None:
    (graph,) = trace(stock(case, experts), *trajectory()[:1], dynamic_length=True)
    assert not graph.reason
    active = torch.zeros(2, 20, dtype=torch.bool)
    active[0, [0, 7, 12]] = True
    active[1, 19] = True
    for alone, dense in rows_alone(graph.programs(), graph.calls[0], active):
        torch.testing.assert_close(alone, dense, rtol=1e-5, atol=1e-5)


def test_the_grouped_product_of_bfloat16() -> None:
    """aten._grouped_mm: what runs on a GPU."""
    model = stock("qwen3_moe", "grouped_mm", dtype=torch.bfloat16, hidden_size=64)
    (graph,) = trace(model, trajectory()[0])
    assert dict(graph.plan.operations)["_grouped_mm"] == 6
    active = torch.zeros(2, 20, dtype=torch.bool)
    active[:, 5] = True
    for alone, dense in rows_alone(graph.programs(), graph.calls[0], active):
        torch.testing.assert_close(alone, dense, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("policy", ["focus-dllm", "dual-cache"])
@pytest.mark.parametrize("case", ["qwen3_moe", "qwen2_moe"])
def test_steps_equal_the_oracle(case: str, policy: str) -> None:
    options = OPTIONS | {"policy": policy}
    model = stock(case, "grouped_mm")
    oracle, focus = Oracle(model, **options), compiled(model, **options)
    programs = []
    with seen_steps() as seen:
        for ids in trajectory():
            expected = oracle.call(ids)
            logits, record = run_call(focus, ids)
            assert record.program == expected.program, record.why
            if record.program == "step":
                assert torch.equal(seen[-1].rows, expected.active)
            torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
            programs.append(record.program)
    assert programs[:3] == ["refresh", "step", "step"]


@pytest.mark.long
@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
def test_inductor_computes_the_same_for_any_number_of_rows(experts: str) -> None:
    """One artifact of a step serves every number of rows."""
    model = stock("qwen3_moe", experts)
    (graph,) = trace(model, trajectory()[0], options={"lowering": "inductor"})
    programs = graph.programs()
    for rows in (2, 3, 5, 8, 13):
        active = torch.zeros(2, 20, dtype=torch.bool)
        active[0, torch.randperm(20)[:rows]] = True
        active[1, torch.randperm(20)[:rows]] = True
        for alone, dense in rows_alone(programs, graph.calls[0], active):
            torch.testing.assert_close(alone, dense, rtol=1e-4, atol=1e-4)
    assert programs.step.compilations == 1


MAX_LENGTH, BLOCK = 48, 8


def block_by_block(model: nn.Module, prompt: list[int], tokens: int, threshold: float) -> list[int]:
    """Full forwards over the whole sequence; all masks that are likely enough, or the likeliest."""
    begin = len(prompt) // BLOCK * BLOCK
    ids = prompt + [MASK] * (begin + BLOCK - len(prompt))
    while True:
        while MASK in ids[begin:]:
            with torch.no_grad():
                mask = block_causal_mask(len(ids), BLOCK)
                logits = model(torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0]
            logits[:, MASK] = -float("inf")
            sure, best = logits.float().softmax(-1).max(-1)
            masked = [at for at in range(begin, len(ids)) if ids[at] == MASK]
            first = max(masked, key=lambda at: (float(sure[at]), -at))
            for at in masked:
                if at == first or sure[at] >= threshold:
                    ids[at] = int(best[at])
        if len(ids) - len(prompt) >= tokens:
            return ids[len(prompt) : len(prompt) + tokens]
        begin += BLOCK
        ids += [MASK] * BLOCK


@pytest.mark.parametrize(
    ("experts", "lowering"),
    [
        ("grouped_mm", "eager"),
        ("batched_mm", "eager"),
        pytest.param("grouped_mm", "inductor", marks=pytest.mark.long),
    ],
)
def test_block_diffusion_decodes_the_same_tokens(experts: str, lowering: str) -> None:
    model = stock("qwen3_moe", experts, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 38, (n,), generator=generator).tolist() for n in (5, 16, 11)]
    expected = [block_by_block(model, prompt, 16, 0.5) for prompt in prompts]
    made = BatchGenerator(
        model, block_length=BLOCK, max_length=MAX_LENGTH, max_batch=2, policy="block-diffusion",
        mask_token_id=MASK, threshold=0.5, lowering=lowering,
    )  # fmt: skip
    numbers = [made.submit(prompt, 16) for prompt in prompts]
    done = {completion.request: list(completion.tokens) for completion in made.results()}
    assert [done[number] for number in numbers] == expected


@pytest.mark.parametrize("policy", ["delayed-cache", "focus-evict"])
def test_rows_that_leave_are_those_of_dense_experts(policy: str) -> None:
    """Eviction cuts the program in two between layers of experts: both ways agree."""
    results = []
    for experts in IMPLEMENTATIONS:
        made = BatchGenerator(
            stock("qwen3_moe", experts, tie_word_embeddings=False), block_length=BLOCK,
            max_length=MAX_LENGTH, max_batch=2, policy=policy, mask_token_id=MASK, threshold=0.5,
            lowering="eager",
        )  # fmt: skip
        for length in (5, 16):
            made.submit(list(range(1, length + 1)), 16)
        results.append({done.request: list(done.tokens) for done in made.results()})
    assert results[0] == results[1]
