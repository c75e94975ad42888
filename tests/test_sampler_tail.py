"""A model and its sampler in one compiled function: the tokens are those of the compiled model and
the sampler beside it, logits of all rows are not kept, and nothing of a call outlives it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import focus_compile
from focus_compile import FocusWarning
from focus_compile.errors import CompileError, RefusalError
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.store import STORE
from tests.runtime.tiny import MASK, OPTIONS, SPEC, prompt, tiny_model

torch.set_num_threads(1)
Denoise = Callable[..., Tensor]


def predictions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Token and probability of every row, as published samplers spell it."""
    probabilities = torch.softmax(logits.double(), -1)
    tokens = logits.argmax(-1)
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]


def best(ids: Tensor, tokens: Tensor, probability: Tensor, count: int) -> Tensor:
    """The ids with the most probable masked rows decoded."""
    sure = torch.where(ids == MASK, probability, -torch.inf)
    chosen = torch.zeros_like(ids, dtype=torch.bool).scatter(1, sure.topk(count, -1).indices, True)
    return torch.where(chosen & (ids == MASK), tokens, ids)


def top_k(model: Any) -> Denoise:
    def denoise(ids: Tensor) -> Tensor:
        return best(ids, *predictions(model(ids)), 2)

    return denoise


def threshold(model: Any) -> Denoise:
    """Token-wise but for the best row of every sequence."""

    def denoise(ids: Tensor) -> Tensor:
        tokens, probability = predictions(model(ids))
        sure = torch.where(ids == MASK, probability, 0.0)
        chosen = (sure >= 0.4) | (sure == sure.amax(1, keepdim=True))
        return torch.where(chosen & (ids == MASK), tokens, ids)

    return denoise


def in_place(model: Any) -> Denoise:
    def denoise(ids: Tensor) -> Tensor:
        new = best(ids, *predictions(model(ids)), 2)
        ids[:] = new
        return ids

    return denoise


def copied_in_place(model: Any) -> Denoise:
    def denoise(ids: Tensor) -> Tensor:
        ids.copy_(best(ids, *predictions(model(ids)), 2))
        return ids

    return denoise


def random_tokens(model: Any) -> Denoise:
    """Gumbel noise over the vocabulary, as LLaDA's sampler draws it."""

    def denoise(ids: Tensor) -> Tensor:
        logits = model(ids).double()
        tokens = (logits.exp() / -torch.rand_like(logits).log()).argmax(-1)
        return best(ids, tokens, predictions(logits)[1], 2)

    return denoise


def shifted(model: Any) -> Denoise:
    """A row's prediction is made by the row before, as in Dream."""

    def denoise(ids: Tensor) -> Tensor:
        logits = model(ids)
        return best(ids, *predictions(torch.cat([logits[:, :1], logits[:, :-1]], 1)), 2)

    return denoise


def of_the_response(model: Any) -> Denoise:
    """Slices before it computes."""

    def denoise(ids: Tensor) -> Tensor:
        start = ids.shape[1] // 2
        response = best(ids[:, start:], *predictions(model(ids)[:, start:]), 2)
        return torch.cat([ids[:, :start], response], 1)

    return denoise


def of_the_response_in_place(model: Any) -> Denoise:
    def denoise(ids: Tensor) -> Tensor:
        start = ids.shape[1] // 2
        ids[:, start:] = best(ids[:, start:], *predictions(model(ids)[:, start:]), 2)
        return ids

    return denoise


def turned_round(model: Any) -> Denoise:
    """Reads logits of all rows."""

    def denoise(ids: Tensor) -> Tensor:
        logits = model(ids).flip(1).flip(1)
        return best(ids, *predictions(logits), 2)

    return denoise


def decode(denoise: Denoise, ids: Tensor) -> tuple[Tensor, list[str]]:
    """All masks decoded, and the programs that ran."""
    ids = ids.clone()
    torch.manual_seed(0)
    with focus_compile.record() as history, torch.no_grad():
        while (ids == MASK).any():
            ids = denoise(ids).clone()
    return ids, [step.program for step in history]


def fused(denoise: Denoise, **options: Any) -> Denoise:
    chosen = {"lowering": "eager"} | OPTIONS | options
    return torch.compile(denoise, backend="focus", dynamic=False, options=chosen)


def beside(model: nn.Module, **options: Any) -> Any:
    chosen = {"lowering": "eager"} | OPTIONS | options
    return torch.compile(model, backend="focus", dynamic=False, options=chosen)


@pytest.mark.parametrize(
    ("sampler", "policy"),
    [
        (top_k, "focus-dllm"),
        (threshold, "dual-cache"),
        (in_place, "focus-dllm"),
        (copied_in_place, "prefix-cache"),
        (shifted, "focus-dllm"),
        (of_the_response, "focus-dllm"),
        (of_the_response_in_place, "focus-dllm"),
        (turned_round, "dual-cache"),
    ],
)
def test_tokens_are_those_of_the_sampler_beside_the_model(sampler: Any, policy: str) -> None:
    ids = prompt(masks=8, length=16, batch=2)
    expected, programs = decode(sampler(beside(tiny_model(), policy=policy)), ids)
    found, ran = decode(fused(sampler(tiny_model()), policy=policy), ids)
    assert torch.equal(found, expected)
    assert ran == programs
    assert "step" in ran


def test_random_numbers_are_drawn_as_beside_the_model() -> None:
    ids = prompt(masks=8, length=16)
    expected, _ = decode(random_tokens(beside(tiny_model())), ids)
    found, ran = decode(fused(random_tokens(tiny_model())), ids)
    assert torch.equal(found, expected)
    assert "step" in ran


def test_inductor_and_a_response_s_logits() -> None:
    ids = prompt(masks=8, length=16)
    options = {"lowering": "inductor", "logits": "response"}
    expected, programs = decode(top_k(beside(tiny_model(), logits="response")), ids)
    found, ran = decode(fused(top_k(tiny_model()), **options), ids)
    assert torch.equal(found, expected)
    assert ran == programs


def plan_of(denoise: Denoise, ids: Tensor, **options: Any) -> Any:
    chosen = {"lowering": "eager"} | OPTIONS | options
    with torch.no_grad():
        explained = focus_compile.explain(denoise, ids, **chosen)
    assert len(explained.graphs) == 1
    return explained.graphs[0]


@pytest.mark.parametrize(
    "sampler", [top_k, threshold, in_place, shifted, of_the_response, of_the_response_in_place]
)
def test_logits_of_all_rows_are_not_kept(sampler: Any) -> None:
    plan = plan_of(sampler(tiny_model()), prompt()).plan
    assert plan.tail is not None
    assert not plan.refusals
    assert (
        sum(output.row_bytes for output in plan.outputs) == 8 + 8 + 12
    )  # token, probability, their own
    assert plan.logits is None
    assert "in full behind the model" in str(plan)


@pytest.mark.parametrize(("sampler", "more"), [(random_tokens, [8]), (turned_round, [])])
def test_a_tail_that_needs_all_logits_gets_them_in_the_model_s_own_numbers(
    sampler: Any, more: list[int]
) -> None:
    plan = plan_of(sampler(tiny_model()), prompt()).plan
    assert [output.row_bytes for output in plan.outputs] == [4 * SPEC.vocab, *more]
    assert plan.logits == 0


def test_an_input_that_only_the_sampler_reads_ends_no_trajectory() -> None:
    model = tiny_model()

    def denoise(ids: Tensor, least: Tensor) -> Tensor:
        tokens, probability = predictions(model(ids))
        sure = torch.where(ids == MASK, probability, 0.0)
        chosen = (sure >= least) | (sure == sure.amax(1, keepdim=True))
        return torch.where(chosen & (ids == MASK), tokens, ids)

    step, ids = fused(denoise), prompt(masks=4, length=16)
    with focus_compile.record() as history, torch.no_grad():
        for least in (0.9, 0.8, 0.7):
            ids = step(ids, torch.tensor(least))
    assert [entry.program for entry in history] == ["refresh", "step", "step"]


def test_a_graph_without_a_model_is_no_refusal() -> None:
    """Dynamo cuts where the number of chosen tokens is not known; only one part has the model."""
    model = tiny_model()

    def denoise(ids: Tensor) -> Tensor:
        new = best(ids, *predictions(model(ids)), 2)
        ids[new != MASK] = new[new != MASK]
        return ids

    ids = prompt(masks=8, length=16)
    expected, programs = decode(top_k(beside(tiny_model())), ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FocusWarning)
        found, ran = decode(fused(denoise, strict=True), ids)
    assert torch.equal(found, expected)
    assert [program for program in ran if program != "exact"] == programs


def test_what_a_call_returned_never_changes() -> None:
    model = tiny_model()

    def rows(ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens, probability = predictions(model(ids))
        return tokens.unsqueeze(-1), probability.flip(1)

    step, ids = fused(rows), prompt(masks=4, length=16)
    kept = []
    with torch.no_grad(), focus_compile.record() as history:
        for _ in range(4):
            found = step(ids.clone())
            kept.append((found, [value.clone() for value in found]))
            where = (ids == MASK).nonzero()[0]
            ids[where[0], where[1]] = 1
    assert [entry.program for entry in history].count("step") == 3
    for found, copies in kept:
        assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))
        found[0].zero_()


def test_writing_into_ids_that_are_not_contiguous() -> None:
    ids = prompt(masks=4, length=16, batch=2)
    wide = torch.zeros(2, 32, dtype=torch.int64)
    view = wide[:, ::2]
    view.copy_(ids)
    expected, _ = decode(in_place(beside(tiny_model())), ids)
    step = fused(in_place(tiny_model()))
    with torch.no_grad():
        while (view == MASK).any():
            step(view)
    assert torch.equal(wide[:, ::2], expected)
    assert not wide[:, 1::2].any()


def test_a_loss_beside_the_logits_is_computed_in_full() -> None:
    model = tiny_model()

    def scored(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(ids)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    ids = prompt(masks=4, length=16)
    labels = torch.arange(16)[None] % MASK
    with torch.no_grad():
        found = fused(scored)(ids, labels)
        expected = scored(ids, labels)
    torch.testing.assert_close(found, expected)


def test_block_policies_have_no_tail() -> None:
    options = {"policy": "focus-evict", "block_length": 4, "mask_token_id": MASK, "strict": True}
    step = torch.compile(in_place(tiny_model()), backend="focus", dynamic=False, options=options)
    refused = pytest.raises(BackendCompilerFailed, match=r"RefusalError: .*writes into its inputs")
    with torch.no_grad(), refused:
        step(prompt(masks=4, length=16))


def test_a_result_without_rows_is_computed_from_all_of_them() -> None:
    model = tiny_model()

    def features(ids: Tensor) -> Tensor:
        return model(ids)[..., :5].sum(1)

    ids = prompt()
    with torch.no_grad():
        torch.testing.assert_close(fused(features)(ids), features(ids))


def test_without_logits_the_exact_program_runs() -> None:
    model = tiny_model()
    model.head = nn.Identity()

    def features(ids: Tensor) -> Tensor:
        return model(ids).sum(1)

    with torch.no_grad(), pytest.warns(FocusWarning, match="one row a token"):
        fused(features)(prompt())


def test_a_prompt_written_in_place_stays_where_rows_before_the_response_are_zero() -> None:
    model = tiny_model()

    def denoise(ids: Tensor) -> Tensor:
        logits = model(ids)
        ids += (logits.argmax(-1) - ids) * (ids == MASK)
        return logits

    ids = prompt(masks=4, length=16)
    given = ids.clone()
    with torch.no_grad(), focus_compile.record() as history:
        fused(denoise, logits="response")(ids)
    assert history[0].program == "refresh"
    assert torch.equal(ids[:, :12], given[:, :12])
    assert not (ids == MASK).any()


def test_rows_that_only_a_refresh_returns_strided() -> None:
    def top_two(model: Any) -> Denoise:
        def denoise(ids: Tensor) -> Tensor:
            probability, tokens = torch.softmax(model(ids), -1).topk(2)
            return best(ids, tokens[..., 0], probability[..., 0] - probability[..., 1], 2)

        return denoise

    ids = prompt(masks=8, length=16)
    expected, _ = decode(top_two(beside(tiny_model())), ids)
    found, ran = decode(fused(top_two(tiny_model()), lowering="inductor"), ids)
    assert torch.equal(found, expected)
    assert "step" in ran


def test_as_many_tokens_as_the_vocabulary_has() -> None:
    ids = prompt(masks=4, length=SPEC.vocab)
    plan = plan_of(top_k(tiny_model()), ids).plan
    assert plan.tail is not None
    assert plan.logits is None
    expected, _ = decode(top_k(beside(tiny_model())), ids)
    assert torch.equal(decode(fused(top_k(tiny_model())), ids)[0], expected)


def test_out_of_memory_in_the_tail_is_answered_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError

    model = tiny_model()
    ids = prompt(masks=4, length=16)
    with torch.no_grad():
        expected = top_k(model)(ids)
    step = fused(top_k(model))
    monkeypatch.setattr(Programs, "run_tail", fails)
    STORE.clear()
    with torch.no_grad(), focus_compile.record() as history, pytest.warns(FocusWarning):
        assert torch.equal(step(ids), expected)
    assert history[-1].program == "exact"
    assert STORE.nbytes == 0


def test_under_strict_a_tail_that_cannot_be_compiled_raises_in_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise CompileError("no such kernel")

    step = fused(top_k(tiny_model()), strict=True)
    monkeypatch.setattr(Programs, "run_tail", fails)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RefusalError, match="no such kernel"):
            step(prompt(masks=4, length=16))


def test_a_warm_up_leaves_the_ids_as_they_are() -> None:
    ids = prompt(masks=4, length=16)
    before = ids.clone()
    step = fused(in_place(tiny_model()))
    focus_compile.warmup(step, ids)
    assert torch.equal(ids, before)
    expected, _ = decode(in_place(beside(tiny_model())), ids)
    assert torch.equal(decode(step, ids)[0], expected)


def test_a_head_over_all_tokens_in_one_axis() -> None:
    model = tiny_model()
    head = model.head

    class Flat(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return head(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:2], -1)

    model.head = Flat()
    plan = plan_of(turned_round(model), prompt(masks=4, length=16, batch=2)).plan
    assert not plan.refusals
    assert [output.row_bytes for output in plan.outputs] == [4 * SPEC.vocab]


def test_a_view_of_ids_written_in_place_is_refused() -> None:
    model = tiny_model()

    def denoise(ids: Tensor) -> Tensor:
        ids.copy_(best(ids, *predictions(model(ids)), 2))
        return ids[:, 8:]

    ids = prompt(masks=4, length=16)
    with torch.no_grad(), pytest.warns(FocusWarning, match="a view of an input"):
        found = fused(denoise)(ids)
    found.fill_(1)
    assert (ids[:, 8:] == 1).all()
