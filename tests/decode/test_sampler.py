"""The sampler against an obvious slow one, and its rules one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile import demo
from focus_compile.decode import sampler
from focus_compile.decode.sampler import DecodeProgress, generate
from focus_compile.demo import retrieval
from focus_compile.errors import OptionError

MASK = 5
EOS = 2
VOCABULARY = 11
BANK_ROWS = 7


class BankModel:
    """Each row's logits are one of a few vectors, chosen by the ids up to it: many exact ties.

    Vectors differ clearly in their highest probability; one prefers the mask token, and one has two
    equally good tokens.
    """

    def __init__(self, seed: int) -> None:
        self.config = SimpleNamespace(mask_token_id=MASK)
        self.calls: list[Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        best = torch.randint(0, VOCABULARY, (BANK_ROWS,), generator=generator)
        best[0] = MASK
        self.bank = torch.zeros(BANK_ROWS, VOCABULARY)
        self.bank[torch.arange(BANK_ROWS), best] = 1.0 + torch.arange(BANK_ROWS)
        self.bank[1, (best[1] + 3) % VOCABULARY] = self.bank[1, best[1]]

    def __call__(self, ids: Tensor) -> Any:
        self.calls.append(ids.clone())
        position = torch.arange(ids.shape[1])
        chosen = (ids * (1 + position % 3)).cumsum(1) + 3 * position
        return SimpleNamespace(logits=self.bank[chosen % BANK_ROWS])


def slow_generate(
    model: BankModel,
    prompt: list[int],
    gen_length: int,
    block_length: int,
    steps: int,
    threshold: float | None,
    eos: int | None,
) -> tuple[list[int], list[int]]:
    """One sequence, position by position. Returns its ids and the model calls of each block."""
    ids = prompt + [MASK] * gen_length
    blocks = gen_length // block_length
    calls = []
    for start in range(len(prompt), len(ids), block_length):
        positions = range(start, start + block_length)
        calls.append(0)
        while any(ids[p] == MASK for p in positions):
            logits = model(torch.tensor([ids])).logits[0]
            found = []
            for p in positions:
                if ids[p] == MASK:
                    row = [-math.inf if v == MASK else x for v, x in enumerate(logits[p].tolist())]
                    total = sum(math.exp(x) for x in row)
                    found.append((round(math.exp(max(row)) / total, 5), -p, row.index(max(row))))
            found.sort(reverse=True)
            if threshold is None:
                per_block = steps // blocks
                count = block_length // per_block + (calls[-1] < block_length % per_block)
            else:
                count = max(1, sum(probability >= threshold for probability, _, _ in found))
            for _, negative, token in found[:count]:
                ids[-negative] = token
            calls[-1] += 1
        if eos is not None and eos in ids[start : start + block_length]:
            ids[start + block_length :] = [eos] * (len(ids) - start - block_length)
    return ids, calls


@st.composite
def runs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> dict[str, Any]:
    blocks = draw(st.integers(1, 3))
    block_length = draw(st.integers(1, 7))
    prompt = draw(st.integers(0, 5))
    tokens = st.integers(0, VOCABULARY - 1).filter(lambda token: token != MASK)
    row = st.lists(tokens, min_size=prompt, max_size=prompt)
    return {
        "prompts": draw(st.lists(row, min_size=1, max_size=3)),
        "gen_length": blocks * block_length,
        "block_length": block_length,
        "steps": blocks * draw(st.integers(1, block_length)),
        "threshold": draw(st.none() | st.sampled_from([0.0, 0.3, 0.63, 0.9, 0.99, 1.0])),
        "eos": draw(st.none() | st.just(EOS)),
    }


@given(run=runs(), seed=st.integers(0, 99))
@settings(deadline=None)
def test_equals_the_slow_sampler(run: dict[str, Any], seed: int) -> None:
    model = BankModel(seed)
    prompts = run.pop("prompts")
    eos = run.pop("eos")
    result = generate(model, torch.tensor(prompts, dtype=torch.int64), eos_token_id=eos, **run)
    assert result.model_calls == len(model.calls)
    alone = [slow_generate(BankModel(seed), prompt, eos=eos, **run) for prompt in prompts]
    assert result.ids.tolist() == [ids for ids, _ in alone]
    slowest = [max(calls) for calls in zip(*(calls for _, calls in alone), strict=True)]
    assert result.model_calls == sum(slowest)


@given(run=runs(), seed=st.integers(0, 99))
@settings(deadline=None)
def test_progress_tells_every_call(run: dict[str, Any], seed: int) -> None:
    prompts = torch.tensor(run.pop("prompts"), dtype=torch.int64)
    del run["eos"]
    seen: list[DecodeProgress] = []
    before = [torch.cat([prompts, prompts.new_full((len(prompts), run["gen_length"]), MASK)], 1)]

    def watch(progress: DecodeProgress) -> None:
        seen.append(progress)
        changed = before[-1] != progress.ids
        assert torch.equal(changed, progress.decoded)
        assert (before[-1][changed] == MASK).all()
        before.append(progress.ids.clone())

    result = generate(BankModel(seed), prompts, progress=watch, **run)
    assert torch.equal(before[-1], result.ids)
    assert not (result.ids == MASK).any()
    assert [progress.step for progress in seen] == list(range(1, result.model_calls + 1))
    total = None if run["threshold"] is not None else run["steps"]
    assert {progress.total for progress in seen} == {total}


def test_a_block_is_split_by_floor_and_remainder() -> None:
    counts: list[int] = []
    generate(
        BankModel(0),
        torch.tensor([[1, 2]]),
        gen_length=14,
        steps=6,
        block_length=7,
        progress=lambda progress: counts.append(int(progress.decoded.sum())),
    )
    assert counts == [3, 2, 2, 3, 2, 2]


def test_a_block_longer_than_the_response_is_one_block() -> None:
    prompt = torch.tensor([[1, 2]])
    short = generate(BankModel(3), prompt, gen_length=6, block_length=6)
    assert torch.equal(generate(BankModel(3), prompt, gen_length=6).ids, short.ids)


def test_the_prompt_is_left_alone() -> None:
    prompt = torch.tensor([[1, 2, 3]])
    result = generate(BankModel(0), prompt, gen_length=4)
    assert prompt.tolist() == [[1, 2, 3]]
    assert result.ids[:, :3].tolist() == [[1, 2, 3]]


def test_confidence_is_float32_over_the_masked_rows_of_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[tuple[torch.dtype, list[int]]] = []

    def spy(rows: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append((rows.dtype, list(rows.shape)))
        probability, token = rows.softmax(-1).max(-1)
        return probability, token

    monkeypatch.setattr(sampler, "confidence", spy)
    model = BankModel(0)
    model.bank = model.bank.bfloat16()
    generate(model, torch.tensor([[1], [4]]), gen_length=6, block_length=3)
    assert shapes == [(torch.float32, [2 * rows, VOCABULARY]) for rows in (3, 2, 1, 3, 2, 1)]


def test_the_model_runs_without_gradients() -> None:
    bank = BankModel(0)

    def model(ids: Tensor) -> Any:
        assert not torch.is_grad_enabled()
        return bank(ids)

    generate(model, torch.tensor([[1]]), gen_length=2, mask_token_id=MASK)


def test_the_models_logits_are_left_alone() -> None:
    model = BankModel(0)
    before = model.bank.clone()
    generate(model, torch.tensor([[1]]), gen_length=4)
    assert torch.equal(model.bank, before)


def test_a_mask_outside_the_vocabulary_is_fine() -> None:
    result = generate(BankModel(0), torch.tensor([[1]]), gen_length=4, mask_token_id=VOCABULARY)
    assert not (result.ids == VOCABULARY).any()


def test_the_attention_mask_is_extended_over_the_response() -> None:
    masks: list[list[list[int]]] = []
    bank = BankModel(0)

    def model(ids: Tensor, attention_mask: Tensor) -> Any:
        masks.append(attention_mask.tolist())
        return bank(ids)

    generate(
        model,
        torch.tensor([[0, 1], [1, 2]]),
        gen_length=2,
        mask_token_id=MASK,
        attention_mask=torch.tensor([[0, 1], [1, 1]]),
    )
    assert masks == [[[0, 1, 1, 1], [1, 1, 1, 1]]] * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_draws_from_the_tempered_softmax(temperature: float) -> None:
    samples = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 9.0])

    def model(ids: Tensor) -> Any:
        return SimpleNamespace(logits=logits.expand(*ids.shape, -1))

    drawn = generate(
        model,
        torch.zeros(samples, 1, dtype=torch.int64),
        gen_length=1,
        mask_token_id=MASK,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    ).ids[:, 1]
    expected = (logits[:MASK] / temperature).softmax(0)
    shares = torch.bincount(drawn, minlength=MASK) / samples
    error = (expected * (1 - expected) / samples).sqrt()
    assert ((shares - expected).abs() <= 5 * error).all()


def test_one_seed_gives_one_response() -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.tensor([[1, 2]])
        found = generate(BankModel(0), prompt, gen_length=32, temperature=1.5, generator=generator)
        return found.ids[0].tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


BAD_ARGUMENTS = [
    ({"gen_length": 0}, "gen_length=0"),
    ({"gen_length": -8}, "gen_length=-8"),
    ({"gen_length": 2.0}, "gen_length=2.0"),
    ({"block_length": 0}, "block_length=0"),
    ({"block_length": 3}, "gen_length=8 is not a multiple of block_length=3"),
    ({"block_length": 3, "threshold": 0.9}, "not a multiple of block_length=3"),
    ({"block_length": 4, "steps": 3}, "multiple of the 2 blocks"),
    ({"steps": 0}, "steps=0"),
    ({"steps": 16}, "at most gen_length=8"),
    ({"threshold": 1.5}, "threshold=1.5"),
    ({"threshold": math.nan}, "threshold=nan"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": math.nan}, "temperature=nan"),
    ({"mask_token_id": -1}, "mask_token_id=-1"),
    ({"input_ids": torch.tensor([1, 2])}, r"\[batch, prompt\]"),
    ({"input_ids": torch.tensor([[1.0, 2.0]])}, "int64"),
    ({"input_ids": torch.zeros(0, 2, dtype=torch.int64)}, r"shape \[0, 2\]"),
    ({"input_ids": torch.tensor([[1, MASK]])}, "holds the mask token 5"),
    ({"attention_mask": torch.ones(1, 3)}, r"\[1, 3\]"),
    ({"attention_mask": torch.tensor([[1, 0]])}, "on the left"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    given_arguments = {"input_ids": torch.tensor([[1, 2]]), "gen_length": 8} | arguments
    model = BankModel(0)
    with pytest.raises(OptionError, match=message):
        generate(model, **given_arguments)
    assert not model.calls


def test_a_model_without_a_mask_token_id() -> None:
    with pytest.raises(OptionError, match="pass mask_token_id"):
        generate(lambda ids: None, torch.tensor([[1]]), gen_length=1)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "got NoneType"),
        (torch.zeros(1, 2, 3), "got Tensor"),
        (SimpleNamespace(logits=torch.zeros(1, 1, 3)), r"logits of shape \[1, 1, 3\]"),
    ],
)
def test_a_model_without_logits_for_every_position(output: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate(lambda ids: output, torch.tensor([[1]]), gen_length=1, mask_token_id=MASK)


def test_the_tiny_dllm_answers_a_batch() -> None:
    model, tokenizer = demo.load()
    examples = [retrieval.make(tokenizer, 160, questions=2, response=32, seed=s) for s in (0, 1)]
    prompts = torch.tensor([example.prompt_ids for example in examples])
    for rule in ({"threshold": 0.9}, {"steps": 16}):
        result = generate(model, prompts, gen_length=32, block_length=16, **rule)
        assert result.model_calls <= 16
        for example, ids in zip(examples, result.ids, strict=True):
            assert example.score(tokenizer.decode(ids[prompts.shape[1] :])) == 2


def test_a_response_that_has_ended_is_filled_without_further_calls() -> None:
    prompt = torch.tensor([[1, 4], [6, 7]])
    options: dict[str, Any] = {"gen_length": 6, "block_length": 2, "mask_token_id": MASK}
    model, plain = BankModel(3), BankModel(3)
    expected = generate(plain, prompt, **options)
    seen: list[Tensor] = []

    def ended(responses: Tensor) -> Tensor:
        seen.append(responses.clone())
        return torch.tensor([True, responses.shape[1] == 4])

    found = generate(model, prompt, eos_token_id=VOCABULARY - 1, ended=ended, **options)
    assert [response.shape[1] for response in seen] == [2, 4, 6]
    assert found.model_calls == 4 < expected.model_calls
    assert found.ids[0, 4:].tolist() == [VOCABULARY - 1] * 4
    assert torch.equal(found.ids[0, :4], expected.ids[0, :4])
    assert found.ids[1, 6:].tolist() == [VOCABULARY - 1] * 2
    with pytest.raises(OptionError, match="eos_token_id"):
        generate(model, prompt, ended=ended, **options)
