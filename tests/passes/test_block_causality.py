"""Which masks are block-causal, and what is said of a model whose masks are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from focus_compile.block_diffusion.tracing import TracedModel, trace
from focus_compile.config import FocusConfig
from focus_compile.errors import RefusalError
from focus_compile.passes.block_causality import block_causal_mask, block_length_of

LENGTH = 12
BLOCK = 4
MASK = 39
Change = Callable[[Tensor], Tensor | None]


@pytest.fixture(autouse=True, scope="module")
def many_graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=256):
        yield


class Layer(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.change(mask))
        return x + self.o(out.transpose(1, 2).flatten(2))


class Toy(nn.Module):
    """A decoder whose layers change the mask that it is given."""

    def __init__(self, *changes: Change) -> None:
        super().__init__()
        self.embed, self.at = nn.Embedding(40, 16), nn.Embedding(LENGTH, 16)
        self.layers = nn.ModuleList(Layer(change) for change in changes)
        self.head = nn.Linear(16, 40)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids) + self.at(positions)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def call(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    logits: Tensor = model(ids, mask, positions)
    return logits


def traced(*changes: Change, block_length: int = BLOCK) -> TracedModel:
    config = FocusConfig(
        policy="dual-cache", mask_token_id=MASK, block_length=block_length, lowering="eager"
    )
    return trace(Toy(*changes), config, LENGTH, call)


def refusal(*changes: Change, block_length: int = BLOCK) -> str:
    with pytest.raises(RefusalError) as caught:
        traced(*changes, block_length=block_length)
    return str(caught.value)


def as_given(mask: Tensor) -> Tensor:
    return mask


def blocks_of(size: int, length: int = LENGTH) -> Tensor:
    at = torch.arange(length) // size
    return (at[:, None] >= at)[None, None]


@given(length=st.integers(1, 24), block=st.integers(1, 24))
def test_a_block_causal_mask_shows_keys_to_the_end_of_the_block(length: int, block: int) -> None:
    mask = block_causal_mask(length, block)
    assert mask.shape == (1, 1, length, length)
    for row in range(length):
        end = (row // block + 1) * block
        assert mask[0, 0, row].tolist() == [key < end for key in range(length)]
    assert block_length_of(mask[0, 0]) == min(block, length)


@given(length=st.integers(2, 16), block=st.integers(1, 16), at=st.integers(0, 255))
def test_one_other_entry_makes_another_mask(length: int, block: int, at: int) -> None:
    keeps = block_causal_mask(length, block)[0, 0].clone()
    row, key = divmod(at % (length * length), length)
    keeps[row, key] ^= True
    found = block_length_of(keeps)
    assert found is None or torch.equal(keeps, block_causal_mask(length, found)[0, 0])


def test_a_mask_that_hides_all_keys_of_the_first_row() -> None:
    assert block_length_of(torch.zeros(3, 3, dtype=torch.bool)) is None


FLOATS: list[Change] = [
    lambda mask: torch.zeros(mask.shape).masked_fill(~mask, float("-inf")),
    lambda mask: torch.where(mask, 0.0, torch.finfo(torch.float32).min),
    lambda mask: (1.0 - mask.float()) * -1e9,
]


@pytest.mark.parametrize("change", [as_given, *FLOATS], ids=["bool", "inf", "min", "product"])
def test_block_causal_masks_of_any_dtype_are_accepted(change: Change) -> None:
    assert traced(as_given, change).block_length == BLOCK


def test_a_mask_of_the_models_own_is_accepted() -> None:
    assert traced(lambda mask: blocks_of(BLOCK), lambda mask: blocks_of(BLOCK)).plan.sites


@pytest.mark.parametrize("block", [2, 3, 6])
def test_the_blocks_of_the_mask_are_told(block: int) -> None:
    message = refusal(as_given, lambda mask: blocks_of(block))
    assert f"layer 1 is block-causal with blocks of {block}, not with blocks of 4" in message
    assert f"Pass block_length={block}." in message
    assert "test_block_causality.py" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda mask: blocks_of(1), "causal"),
        (lambda mask: mask & blocks_of(1), "causal"),
        (lambda mask: None, "reads all keys, without a mask"),
        (lambda mask: mask | True, ""),
        (lambda mask: mask & ~blocks_of(1).tril(-6), "not block-causal (a sliding window?)"),
        (lambda mask: mask.float(), "adds a bias to keys it keeps"),
        (lambda mask: torch.cat([mask, blocks_of(2)], 1), "differs between heads"),
        (lambda mask: mask.flip(-1), "not block-causal"),
    ],
    ids=["own", "and", "none", "all", "window", "bias", "heads", "reversed"],
)
def test_what_is_wrong_is_said_with_the_layer_and_the_line(change: Change, reason: str) -> None:
    message = refusal(as_given, change)
    assert reason in message
    assert "layer 1" in message or "attention_default_1" in message
    assert "test_block_causality.py" in message


def test_the_first_bad_layer_is_told() -> None:
    message = refusal(as_given, lambda mask: blocks_of(2), lambda mask: blocks_of(3))
    assert "layer 1" in message


def test_is_causal_is_refused() -> None:
    class Causal(Layer):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x + self.o(out.transpose(1, 2).flatten(2))

    model = Toy(as_given)
    model.layers.append(Causal(as_given))
    config = FocusConfig(
        policy="dual-cache", mask_token_id=MASK, block_length=BLOCK, lowering="eager"
    )
    with pytest.raises(RefusalError, match="causal") as caught:
        trace(model, config, LENGTH, call)
    assert "test_block_causality.py" in str(caught.value)
