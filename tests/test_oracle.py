"""The oracle against dense attention and against choices worked out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import EuroBertConfig, EuroBertForMaskedLM

from tests.interception import dense as dense_attention
from tests.interception import run
from tests.oracle import Oracle, Result

MASK = 3
PROMPT, RESPONSE = 42, 16


def eurobert(layers: int = 4) -> EuroBertForMaskedLM:
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=MASK,
    )
    return EuroBertForMaskedLM(config).double().eval()


def prompt(batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (batch, PROMPT + RESPONSE), generator=generator)
    ids[:, PROMPT:] = MASK
    return ids


def commit(ids: Tensor, *positions: int) -> Tensor:
    ids = ids.clone()
    ids[:, list(positions)] = torch.arange(10, 10 + len(positions))
    return ids


@torch.no_grad()
def dense(model: nn.Module, ids: Tensor | None, **inputs: Any) -> Tensor:
    logits: Tensor = model(ids, **inputs).logits
    return logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def trajectory(ids: Tensor) -> list[Tensor]:
    calls = [ids]
    for positions in ((45,), (42, 43), (50,), (), (44, 57)):
        calls.append(commit(calls[-1], *positions))
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 4096, "expansion": 16, "keep_ratio": 1.0},
        {"refresh": "every-step"},
        {"refresh": 1},
        {"policy": "exact"},
        {"policy": "prefix-cache", "refresh": "every-step"},
    ],
    ids=str,
)
def test_everything_kept_equals_dense(settings: dict[str, Any]) -> None:
    model = eurobert()
    oracle = Oracle(model, mask_token_id=MASK, key_block=4, block_length=16, **settings)
    for ids in trajectory(prompt(batch=2)):
        assert_close(oracle.call(ids).logits, dense(model, ids))


@pytest.mark.parametrize("policy", ["focus-dllm", "dual-cache", "prefix-cache"])
def test_one_layer_has_no_stale_keys(policy: str) -> None:
    """Keys of one layer depend on the token alone, so active rows equal dense in every step."""
    model = eurobert(layers=1)
    oracle = Oracle(model, mask_token_id=MASK, policy=policy, block_length=8, keep_ratio=0.1)
    programs = []
    for ids in trajectory(prompt(batch=2)):
        result = oracle.call(ids)
        programs.append(result.program)
        expected = dense(model, ids)[result.active]
        assert_close(result.logits[result.active], expected)
    assert programs == ["refresh", "step", "step", "step", "step", "step"]


@pytest.mark.parametrize("policy", ["focus-dllm", "dual-cache", "prefix-cache"])
def test_fresh_keys_equal_dense(policy: str) -> None:
    """Asked again with the same ids nothing is stale: with all keys, active rows equal dense."""
    model, ids = eurobert(), prompt(batch=2)
    oracle = Oracle(model, mask_token_id=MASK, policy=policy, keep_ratio=1.0, key_block=4)
    oracle.call(ids)
    result = stepped(oracle, ids)
    assert result.program == "step"
    assert not result.active.all()
    assert_close(result.logits, dense(model, ids))


def test_stale_rows_differ_from_dense_and_keep_their_latest_logits() -> None:
    model, ids = eurobert(), prompt()
    oracle = Oracle(model, mask_token_id=MASK, block_length=16, window=2, expansion=1)
    first = oracle.call(ids)
    assert oracle.state is not None
    before = dict(oracle.state.keys), dict(oracle.state.values)
    ids = commit(ids, 45)
    result = oracle.call(ids)
    idle = ~result.active
    for old, new in zip(before, (oracle.state.keys, oracle.state.values), strict=True):
        assert torch.equal(old[3].mT[..., idle[0]], new[3].mT[..., idle[0]])
        assert not torch.equal(old[3], new[3])
    assert torch.equal(result.logits[idle], first.logits[idle])
    expected = dense(model, ids)[result.active]
    assert not torch.allclose(result.logits[result.active], expected)


def test_sparse_site_reads_only_its_keys() -> None:
    """With one sparse site and fresh K/V a step equals a dense run with the other keys masked."""
    model, ids = eurobert(layers=2), prompt()
    settings = {"dense_layers": 0, "key_block": 4, "keep_ratio": 0.3, "sink_tokens": 2}
    oracle = Oracle(model, mask_token_id=MASK, **settings)
    oracle.call(ids)
    result = stepped(oracle, ids)
    assert result.keys[0][0] == list(range(len(ids[0])))
    assert result.keys[1][0] != result.keys[0][0]
    states = model(ids, output_hidden_states=True).hidden_states[1]
    block = copy.deepcopy(model)
    block.model.layers = block.model.layers[1:]
    block.config.num_hidden_layers = 1
    mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    mask[..., result.keys[1][0]] = True
    expected = dense(block, None, inputs_embeds=states, attention_mask=mask)
    active = result.active
    assert_close(result.logits[active], expected[active])


def test_kept_blocks_and_sinks_follow_the_budget() -> None:
    settings = {"key_block": 4, "keep_ratio": 0.25, "sink_tokens": 3, "block_length": 8}
    oracle = Oracle(eurobert(), mask_token_id=MASK, dense_tail_layers=1, **settings)
    ids = prompt(batch=2)
    oracle.call(ids)
    result = oracle.call(commit(ids, 44))
    everything = list(range(PROMPT + RESPONSE))
    for b in range(2):
        assert [result.keys[site][b] == everything for site in range(4)] == [
            True,
            True,
            False,
            True,
        ]
        assert len(result.sinks[b]) == 3
        read = set(result.keys[2][b])
        assert read >= result.sinks[b] | set(range(40, 58))
        blocks = [j for j in range(10) if read >= set(range(4 * j, 4 * j + 4))]
        kept = {p for j in blocks for p in range(4 * j, 4 * j + 4)}
        assert len(blocks) == 3
        assert read == kept | result.sinks[b] | set(range(40, 58))


@pytest.mark.parametrize("block_summary", ["mean", "bound"])
def test_sinks_and_blocks_equal_their_equations(block_summary: str) -> None:
    """Asked again with the same ids, queries and keys of the step are those of dense."""
    model, ids = eurobert(layers=2), prompt()
    settings = {"dense_layers": 0, "key_block": 4, "keep_ratio": 0.3, "sink_tokens": 4}
    oracle = Oracle(model, mask_token_id=MASK, expansion=2, block_summary=block_summary, **settings)
    oracle.call(ids)
    result = stepped(oracle, ids)
    seen: list[tuple[Tensor, Tensor]] = []

    def record(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        seen.append((q[0], k[0]))
        return dense_attention(q, k, v, mask, scale)

    run(model, ids, {}, record)
    (q, k), (sparse_q, sparse_k) = seen
    received = (q @ k.mT / 8**0.5).softmax(-1)[:, result.active[0]].mean((0, 1))
    assert result.sinks[0] == set(received[:40].topk(4).indices.tolist())
    # Focus rows and blocks of keys as [heads, rows, blocks, tokens, width].
    blocks = sparse_k[:, None, :40].reshape(4, 1, 10, 4, 8)
    focus = sparse_q[:, result.focus[0], None]
    if block_summary == "mean":
        relevance = (focus * blocks.mean(3)).sum((0, 1, 3))
    else:
        largest = torch.maximum(focus * blocks.amax(3), focus * blocks.amin(3))
        relevance = largest.sum((0, 1, 3))
    kept = {4 * j + i for j in relevance.topk(3).indices.tolist() for i in range(4)}
    assert set(result.keys[1][0]) == kept | result.sinks[0] | set(range(40, PROMPT + RESPONSE))


class Ladder(nn.Module):
    """Logits that make confidence a table: position p is as confident as `steepness[p]`."""

    def __init__(self, steepness: list[float]) -> None:
        super().__init__()
        self.steepness = torch.tensor(steepness, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        x = ids[:, None, :, None].double()
        spread = 0 * functional.scaled_dot_product_attention(x, x, x)[:, 0]
        return spread + self.steepness[:, None] * torch.tensor([1.0, 0.0])


def stepped(oracle: Oracle, ids: Tensor) -> Result:
    """A step of ids that did not change, as if one had come between it and the refresh."""
    assert oracle.state is not None
    oracle.state.fresh = False
    return oracle.call(ids)


def rows(flags: Tensor) -> list[int]:
    return flags.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("window", "expected"),
    [(1, [6, 8]), (2, [6, 7, 8, 9]), (3, [5, 6, 7, 8, 9]), (8, [3, 4, 5, 6, 7, 8, 9, 10, 11])],
)
def test_window_placement(window: int, expected: list[int]) -> None:
    """Two focus rows, 6 and 8; an even window has its extra row after the focus row."""
    model = Ladder([9, 9, 9, 9, 9, 1, 2, 1, 2, 1, 9, 9])
    ids = torch.tensor([[5, 5, 5, 5, 5, MASK, MASK, MASK, MASK, MASK, MASK, MASK]])
    oracle = Oracle(model, mask_token_id=MASK, block_length=5, window=window, expansion=2)
    oracle.call(ids)
    result = stepped(oracle, ids)
    assert rows(result.focus[0]) == [6, 8]
    assert rows(result.active[0]) == expected


def test_focus_rows_follow_changes_ties_and_clipping() -> None:
    model = Ladder([0, 0, 4, 4, 4, 4])
    ids = torch.tensor([[5, 5, MASK, MASK, MASK, MASK], [5, MASK, MASK, MASK, MASK, MASK]])
    oracle = Oracle(model, mask_token_id=MASK, block_length=4, window=2, expansion=1)
    oracle.call(ids)
    changed = ids.clone()
    changed[0, [2, 5]] = 7
    result = oracle.call(changed)
    assert rows(result.focus[0]) == [3, 4]
    assert rows(result.active[0]) == [2, 3, 4, 5]
    assert rows(result.focus[1]) == [2]
    assert rows(result.active[1]) == [2, 3]
    assert result.margin == 0.0


def test_cache_policies_choose_rows_by_block() -> None:
    ids = prompt()
    expected = {"dual-cache": range(42, 50), "prefix-cache": range(42, 58)}
    for policy, active in expected.items():
        oracle = Oracle(eurobert(), mask_token_id=MASK, policy=policy, block_length=8)
        oracle.call(ids)
        result = oracle.call(commit(ids, 44))
        assert rows(result.active[0]) == list(active)
        assert rows(result.focus[0]) == [42, 43, 45, 46, 47, 48, 49]


def test_refresh_follows_blocks_of_unfinished_sequences() -> None:
    oracle = Oracle(eurobert(), mask_token_id=MASK, block_length=8)
    ids = prompt(batch=2)
    first = commit(ids, *range(42, 49))
    first[1, 42:] = 9
    assert oracle.call(ids).program == "refresh"
    result = oracle.call(first)
    assert result.program == "step"
    second = commit(first, 49)
    assert oracle.call(second).program == "refresh"
    result = stepped(oracle, second)
    assert result.program == "step"
    assert rows(result.active[1]) == [PROMPT + RESPONSE - 1]
    assert not result.focus[1].any()


def test_refresh_every_n_calls() -> None:
    oracle = Oracle(eurobert(), mask_token_id=MASK, refresh=3)
    programs = [oracle.call(prompt()).program for _ in range(7)]
    assert programs == ["refresh", "step", "step"] * 2 + ["refresh"]


def test_a_repeated_call_gets_what_the_refresh_computed() -> None:
    oracle, ids = Oracle(eurobert(), mask_token_id=MASK, block_length=8), prompt()
    first, again = oracle.call(ids), oracle.call(ids)
    assert (again.program, rows(again.active[0])) == ("step", [])
    assert torch.equal(again.logits, first.logits)
    ids = commit(ids, 43)
    for _ in range(2):
        assert oracle.call(ids).active.any()


def test_edited_tokens_refresh_and_leave_the_blocks_where_they_are() -> None:
    oracle = Oracle(eurobert(), mask_token_id=MASK, block_length=8)
    ids = commit(prompt(), 42, 43, 44)
    for token in (8, MASK):
        oracle.call(prompt())
        oracle.call(ids)
        state, edited = oracle.state, ids.clone()
        edited[0, 42] = token
        assert oracle.call(edited).program == "refresh"
        assert oracle.state is state
        assert state is not None
        assert state.response_start == [PROMPT]
        oracle.state = None
    oracle.call(prompt())
    oracle.call(ids)
    state, most = oracle.state, prompt()
    most[0, 42] = 9
    assert oracle.call(most).program == "refresh"
    assert oracle.state is not state, "two of three taken back: another response"


def test_calls_that_nothing_continues_run_exactly_until_two_look_like_a_trajectory() -> None:
    oracle, ids = Oracle(eurobert(), mask_token_id=MASK), prompt()
    others = [commit(ids, at) for at in range(42, 50)]
    programs = [oracle.call(other).program for other in others]
    assert programs == ["refresh"] * 4 + ["exact"] * 4
    assert oracle.call(commit(others[-1], 50)).program == "refresh"
    assert oracle.call(commit(others[-1], 50, 51)).program == "step"
    assert oracle.call(ids).program == "refresh"


def test_a_guided_sequence_has_the_blocks_of_its_like() -> None:
    oracle, ids = (
        Oracle(eurobert(), mask_token_id=MASK, block_length=8, policy="dual-cache"),
        prompt(),
    )
    ids = torch.cat([ids, torch.full_like(ids, MASK)])
    oracle.call(ids)
    result = oracle.call(commit(ids, 44))
    assert rows(result.active[0]) == rows(result.active[1]) == list(range(42, 50))


def test_other_changes_restart_and_unmasked_calls_leave_the_state_alone() -> None:
    oracle = Oracle(eurobert(), mask_token_id=MASK)
    ids = prompt()
    oracle.call(ids)
    assert oracle.call(torch.full_like(ids, 9)).program == "exact"
    ids = commit(ids, 44)
    assert oracle.call(ids).program == "step"
    assert oracle.call(ids, torch.ones_like(ids)).program == "refresh"
    assert oracle.call(ids, torch.ones_like(ids)).program == "step"
    remasked = ids.clone()
    remasked[0, 44] = MASK
    assert oracle.call(remasked, torch.ones_like(ids)).program == "refresh"
    other = remasked.clone()
    other[0, 3] = 5
    assert oracle.call(other, torch.ones_like(ids)).program == "refresh"
    assert oracle.call(other[:, 1:]).program == "refresh"
    assert Oracle(eurobert()).call(ids).program == "exact"


def test_padding_mask_is_applied_in_steps() -> None:
    model = eurobert()
    ids = prompt(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    oracle = Oracle(model, mask_token_id=MASK, window=4096, keep_ratio=1.0)
    for current in trajectory(ids):
        expected = dense(model, current, attention_mask=mask)
        assert_close(oracle.call(current, mask).logits, expected)


class Spelt(nn.Module):
    """One attention layer by hand, its attention in a method that the oracle may answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.heads = nn.Linear(16, 48)
        self.double()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 8**0.5).softmax(-1) @ v

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.heads(x).unflatten(-1, (6, 8)).transpose(1, 2).chunk(3, 1)
        return self.attend(q, k, v).transpose(1, 2).flatten(2) @ self.embed.weight.T


def test_models_may_spell_attention_in_a_method() -> None:
    model, ids = Spelt(), prompt()
    oracle = Oracle(model, mask_token_id=MASK, policy="dual-cache", block_length=8)
    for current in (ids, commit(ids, 44)):
        result = oracle.call(current)
        expected = model(current)
        active = result.active
        assert_close(result.logits[active], expected[active])
    assert result.program == "step"


def test_eager_spelling_of_transformers_is_found() -> None:
    ids = commit(prompt(), 44)
    results = []
    for implementation in ("sdpa", "eager"):
        model = eurobert()
        model.set_attn_implementation(implementation)
        oracle = Oracle(model, mask_token_id=MASK, key_block=4)
        oracle.call(prompt())
        results.append(oracle.call(ids).logits)
        assert model.config._attn_implementation == implementation
    assert torch.equal(*results)
