"""Options, prompts and models that do not work: each is told by its name, before anything runs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from focus_compile.block_diffusion.batch_generator import BatchGenerator
from focus_compile.errors import FocusError, OptionError, RefusalError
from tests.block_diffusion.tiny import MASK, decoder, generate, generator


def small() -> nn.Module:
    return decoder("qwen2", num_hidden_layers=2)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("policy", ["dual-cache", "", "focus-evicts"]),
        ("commit", ["lazy", ""]),
        ("block_length", [0, 1, -4, True, 2.0, "8", None]),
        ("max_length", [0, -1, 7, 15.5, "16", True]),
        ("max_batch", [0, -1, True, 1.5, "2"]),
        ("threshold", [-0.1, 1.01, math.nan, math.inf, "0.9", None]),
        ("alpha", [0, 0.99, -1, math.nan, -math.inf, "1.5", None]),
        ("cut", [0, 2, -1, 1.5, "1", True]),
        ("mask_token_id", [-1, "mask", 1.5, True]),
        ("lowering", ["compiled", ""]),
        ("eos_token_id", ["</s>", [1, "2"], 2.5]),
    ],
)
def test_bad_options_are_told_by_name(option: str, values: list[Any]) -> None:
    problems = []
    for value in values:
        options = {"block_length": 8, option: value}
        try:
            generator(small(), **options)
            problems.append(f"{value!r} is accepted")
        except OptionError as error:
            if option not in str(error):
                problems.append(f"{value!r}: {error}")
        except Exception as error:
            problems.append(f"{value!r}: {type(error).__name__}: {error}")
    assert not problems


def test_a_close_spelling_is_suggested() -> None:
    with pytest.raises(
        OptionError, match=r"unknown policy 'focus-evic'; did you mean 'focus-evict'"
    ):
        generator(small(), block_length=8, policy="focus-evic")


def test_the_mask_token_may_come_from_the_config() -> None:
    model = copy.copy(small())
    with pytest.raises(OptionError, match="mask_token_id"):
        BatchGenerator(model, block_length=8, max_length=48, lowering="eager")
    model.config = copy.copy(model.config)
    model.config.mask_token_id = MASK
    made = BatchGenerator(model, block_length=8, max_length=48, lowering="eager")
    assert made.state.mask_token_id == MASK


@pytest.mark.parametrize(
    ("prompt", "tokens", "stop", "named"),
    [
        ([], 5, (), "prompt is empty"),
        ([1, MASK, 2], 5, (), f"mask token {MASK}"),
        ([1] * 48, 5, (), "max_length=48"),
        ([1] * 60, 5, (), "max_length=48"),
        ([1], 0, (), "max_new_tokens"),
        ([1], -1, (), "max_new_tokens"),
        ([1], 2.5, (), "max_new_tokens"),
        ([1], "5", (), "max_new_tokens"),
        ([1], None, (), "max_new_tokens"),
        ([1], True, (), "max_new_tokens"),
        ([1], 5, [[]], "stop"),
        ([1], 5, [[1], []], "stop"),
        ([1], 5, [3], "stop"),
        ([1, -1], 5, (), "prompt"),
        ([1.5], 5, (), "prompt"),
        ("ab", 5, (), "prompt"),
    ],
    ids=repr,
)
def test_bad_requests_are_told(prompt: Any, tokens: Any, stop: Any, named: str) -> None:
    made = generator(small(), block_length=8)
    with pytest.raises(OptionError) as caught:
        made.submit(prompt, tokens, stop)
    assert named in str(caught.value)
    assert made.pending == 0


def test_a_refused_request_leaves_no_gap() -> None:
    made = generator(small(), block_length=8)
    with pytest.raises(OptionError):
        made.submit([], 5)
    assert made.submit([1], 5) == 0


@pytest.mark.parametrize("prompt", [[1], torch.tensor([1]), torch.tensor([[1]]), (1,)], ids=repr)
def test_prompts_of_any_kind(prompt: Any) -> None:
    made = generator(small(), block_length=8, threshold=0.5)
    [completion] = generate(made, [prompt], 5)
    [expected] = generate(generator(small(), block_length=8, threshold=0.5), [[1]], 5)
    assert completion.tokens == expected.tokens


def test_logits_that_are_no_numbers_end_in_an_error() -> None:
    """And not in a loop that decodes nothing."""
    model = copy.deepcopy(small())
    model.lm_head.weight.data.fill_(math.nan)
    made = generator(model, block_length=8)
    made.submit([1, 2], 5)
    with pytest.raises(FocusError):
        made.step()


def test_a_causal_model_is_refused() -> None:
    def call(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = model(ids, position_ids=positions, use_cache=False).logits
        return logits

    with pytest.raises(RefusalError, match="causal") as caught:
        generator(small(), block_length=8, call=call)
    assert "block" in str(caught.value).removeprefix("focus_compile: no block-diffusion program:")


def test_a_graph_break_is_refused() -> None:
    def call(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        torch._dynamo.graph_break()
        logits: Tensor = model.lm_head(hidden)
        return logits

    with pytest.raises(RefusalError, match="2 graphs"):
        generator(small(), block_length=8, call=call)


def test_positions_that_are_made_from_the_ids_are_refused() -> None:
    def call(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        at = (ids >= 0).long().cumsum(1) - 1
        logits: Tensor = model(ids, attention_mask=mask, position_ids=at, use_cache=False).logits
        return logits

    with pytest.raises(RefusalError, match="position_ids"):
        generator(small(), block_length=8, call=call)


def test_blocks_longer_than_eviction_compares_are_told() -> None:
    """`select_rows` compares at most 256 rows in pairs."""
    with pytest.raises(OptionError, match="block_length"):
        generator(small(), block_length=512, max_length=1024, policy="focus-evict")


def test_many_generators_in_one_process() -> None:
    """Dynamo's limit of graphs for one function does not apply to models."""
    from focus_compile.block_diffusion.tracing import trace
    from focus_compile.config import FocusConfig

    config = FocusConfig(policy="dual-cache", mask_token_id=MASK, block_length=4, lowering="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            trace(small(), config, 8)
