"""Odd models, inputs and options: a clear error, or the exact program with one line why.

Never a wrong answer. Where the plan holds, steps must equal the oracle's.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import focus_compile
from focus_compile.backend import focus
from focus_compile.fallback import FocusWarning
from tests.compiled import run_call, shared_graphs
from tests.models import ModelSpec, build, build_stock, logits_of
from tests.models.network import Dllm
from tests.oracle import Oracle
from tests.runtime.tiny import MASK, OPTIONS, SPEC, decided, own_logits, prompt, shared, tiny_model


@pytest.fixture(autouse=True, scope="module")
def graphs_of_the_file() -> Iterator[None]:
    with shared_graphs(recompile_limit=256):
        yield


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    yield
    focus.reset()  # type: ignore[attr-defined]


class Calls:
    """Calls of a compiled model, with what was recorded and said meanwhile."""

    def __init__(self, focus: Any) -> None:
        self.focus = focus
        self.programs: list[str] = []
        self.lines: list[str] = []

    def __call__(self, *args: Any, **inputs: Any) -> Tensor:
        with (
            torch.no_grad(),
            focus_compile.record() as history,
            warnings.catch_warnings(record=True) as seen,
        ):
            warnings.simplefilter("always")
            logits = logits_of(self.focus(*args, **inputs))
        self.programs += [entry.program for entry in history]
        self.lines += [str(w.message) for w in seen if w.category is FocusWarning]
        return logits

    def line(self) -> str:
        """The one line that was said."""
        (line,) = self.lines
        assert "\n" not in line
        assert line.startswith("focus_compile runs the exact program: ")
        assert re.search(r"[.?)]$", line), "a sentence ends somewhere"
        return line.removeprefix("focus_compile runs the exact program: ")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def assert_exact(model: nn.Module, why: str, *, ids: Tensor | None = None, **options: Any) -> None:
    """Every call of a decode is the model's own answer, and `why` is said once."""
    ids = prompt() if ids is None else ids
    calls = Calls(shared(model, **options))
    for _ in range(3):
        with torch.no_grad():
            close(calls(ids), logits_of(model(ids)))
        ids = decided(ids)
    assert set(calls.programs) == {"exact"}
    assert re.search(why, calls.line()), calls.line()


def assert_follows_the_oracle(
    model: nn.Module, ids: Tensor, inputs: dict[str, Tensor] | None = None, **options: Any
) -> list[str]:
    """A decode to the end; returns the programs that ran."""
    inputs, chosen = inputs or {}, {**OPTIONS, **options}
    calls, oracle = Calls(shared(model, **options)), Oracle(model, **chosen)
    for _ in range(int((ids == MASK).sum(1).max()) + 1):
        expected = oracle.call(ids, **inputs)
        logits = calls(ids, **inputs)
        assert calls.programs[-1] == expected.program
        close(logits, expected.logits)
        ids = decided(ids)
    assert calls.lines == []
    return calls.programs


# Models


def test_no_mask_id() -> None:
    assert_exact(tiny_model(), r"no mask_token_id is known\. Pass options=\{", mask_token_id=None)


def test_a_mask_id_outside_the_vocabulary() -> None:
    assert_exact(
        tiny_model(), "mask_token_id=99 is outside the 24 embeddings. Set it", mask_token_id=99
    )


@pytest.mark.parametrize("causal", ["tril", "is_causal"])
def test_causal_attention(causal: str) -> None:
    assert_exact(build(replace(SPEC, causal=causal)), "causal.*bidirectional")


def test_unrecognised_attention() -> None:
    assert_exact(build(replace(SPEC, attention="linear")), "no attention was recognised")


def test_a_mixer_outside_attention() -> None:
    assert_exact(build(replace(SPEC, mixer="roll")), "roll")


class Prints(Dllm):
    """Dynamo cannot trace past a print, so that the forward becomes two graphs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.embedding(input_ids)
        print(end="")
        mask = self.masks(input_ids, attention_mask, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, input_ids, mask, self.rotation(hidden))
        return self.head(self.norm(hidden))


def test_a_print_amid_the_forward() -> None:
    model = Prints(SPEC, 0).eval()
    ids, calls = prompt(), Calls(shared(model))
    for _ in range(3):
        close(calls(ids), own_logits(model, ids))
        ids = decided(ids)
    assert set(calls.programs) == {"exact"}
    assert all(line.startswith("focus_compile runs the exact") for line in calls.lines)
    assert 1 <= len(calls.lines) <= 2, "one for each graph"


class Asks(Dllm):
    """Reads a number off its ids before it runs: a graph break that leaves the model whole."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        if input_ids.max().item() >= self.spec.vocab:
            raise ValueError("no such token")
        return super().forward(input_ids, attention_mask)


def test_an_item_before_the_forward() -> None:
    model = Asks(SPEC, 0).eval()
    ids, calls = prompt(), Calls(shared(model))
    calls(ids)
    calls(decided(ids))
    assert calls.programs[-1] == "step"
    close(calls(prompt(seed=1)), own_logits(model, prompt(seed=1)))
    with pytest.raises(ValueError, match="no such token"):
        calls(torch.full((1, 12), 24))


class Scaled(Dllm):
    """Takes a number beside its ids."""

    def forward(self, input_ids: Tensor, times: float = 1) -> Any:
        return super().forward(input_ids) * times


@pytest.mark.parametrize("numbers", [[1, 2, 3, 4, 4, 5], [0.5, 0.25, 0.125, 0.125, 0.3]])
def test_a_number_that_changes(numbers: list[float]) -> None:
    """Dynamo makes an input of it once it changed; a call with another is another trajectory."""
    model = Scaled(SPEC, 0).eval()
    ids = prompt(masks=8)
    calls = Calls(shared(model, window=4096, keep_ratio=1.0, dynamic=None))
    for number in numbers:
        close(calls(ids, number), own_logits(model, ids) * number)
        ids = decided(ids)
    assert len(calls.lines) <= 1


class Embeds(Dllm):
    def forward(self, inputs_embeds: Tensor) -> Any:
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, None, None, self.rotation(hidden))
        return self.head(self.norm(hidden))


def test_inputs_embeds() -> None:
    model = Embeds(SPEC, 0).eval()
    calls = Calls(shared(model))
    with torch.no_grad():
        embeds = model.embedding(prompt())
        for _ in range(2):
            close(calls(embeds), model(embeds))
    assert calls.programs == ["exact", "exact"]
    assert "Call the model with input_ids" in calls.line()


def test_stock_inputs_embeds() -> None:
    model = build_stock("eurobert")
    calls = Calls(focus_compile.compile(model, lowering="eager"))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompt())
        close(calls(inputs_embeds=embeds), model(inputs_embeds=embeds).logits)
    assert calls.programs == ["exact"]
    assert "input_ids" in calls.line()


def test_a_model_without_a_head() -> None:
    model = build_stock("eurobert").model
    calls = Calls(shared(model))
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = calls.focus(prompt()).last_hidden_state
        close(found, model(prompt()).last_hidden_state)
    (line,) = [str(w.message) for w in seen if w.category is FocusWarning]
    assert "Compile the whole model, head included." in line


@torch.no_grad()
def test_a_function_of_plain_tensors() -> None:
    """No weights, nothing to tell one model from another by."""
    table = torch.randn(24, 16)

    def attention(ids: Tensor, table: Tensor) -> Tensor:
        hidden = table[None, :].expand(1, -1, -1)[0].index_select(0, ids[0])[None]
        hidden = nn.functional.embedding(ids, table) + 0 * hidden
        mixed = nn.functional.scaled_dot_product_attention(*[hidden[:, None]] * 3)[:, 0]
        return (hidden + mixed) @ table.T

    calls = Calls(shared(attention))
    ids = prompt()
    for _ in range(3):
        close(calls(ids, table), attention(ids, table))
        ids = decided(ids)
    assert set(calls.programs) == {"exact"}
    assert calls.line()


def test_a_function_over_a_model() -> None:
    model = tiny_model()
    calls = Calls(shared(lambda ids: model(ids) * 2))
    close(calls(prompt()), own_logits(model, prompt()) * 2)
    calls(decided(prompt()))
    assert calls.programs == ["refresh", "step"]


class Sampler(nn.Module):
    """A wrapper with a decoding loop of its own, as remote-code models have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def generate(self, ids: Tensor) -> Tensor:
        ids = ids.clone()
        while (ids == MASK).any():
            confidence, token = logits_of(self.model(ids))[..., :MASK].max(-1)
            at = confidence.where(ids == MASK, -torch.inf).argmax(1, keepdim=True)
            ids = ids.scatter(1, at, token.gather(1, at))
        return ids


def test_a_models_own_loop() -> None:
    """All rows active and all keys kept: the very tokens that the plain model decodes."""
    model = tiny_model()
    with focus_compile.record() as history:
        found = Sampler(shared(model, window=4096, keep_ratio=1.0, block_length=64)).generate(
            prompt(masks=6)
        )
    assert torch.equal(found, Sampler(model).generate(prompt(masks=6)))
    assert [entry.program for entry in history] == ["refresh"] + ["step"] * 5


def test_training_with_dropout_is_refused() -> None:
    model = build(replace(SPEC, near_miss="dropout")).train()
    calls = Calls(shared(model))
    torch.manual_seed(0)
    found = calls(prompt())
    torch.manual_seed(0)
    close(found, own_logits(model, prompt()))
    assert calls.programs == ["exact"]
    assert "dropout" in calls.line()
    model.eval()
    close(calls(prompt()), own_logits(model, prompt()))
    assert calls.programs[-1] == "refresh"


def test_weights_made_in_inference_mode() -> None:
    """They keep no version, so that a write into them would go unseen."""
    with torch.inference_mode():
        model = tiny_model()
    calls, ids = Calls(shared(model)), prompt()
    for _ in range(2):
        close(calls(ids), own_logits(model, ids))
        ids = decided(ids)
    with torch.inference_mode():
        model.head.decoder.weight.mul_(2.0)
    close(calls(ids), own_logits(model, ids))
    assert set(calls.programs) == {"exact"}
    assert "inference" in calls.line()


def test_the_users_model_stays_theirs() -> None:
    """Copies and pickles of the plain and of the compiled model; the state is no part of them."""
    model = tiny_model()
    calls = Calls(shared(model))
    calls(prompt())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.state_dict().keys() == model.state_dict().keys()
        close(own_logits(twin, prompt()), own_logits(model, prompt()))
    file = io.BytesIO()
    torch.save(calls.focus.state_dict(), file)
    calls(decided(prompt()))
    assert calls.programs == ["refresh", "step"]
    twin = Calls(copy.deepcopy(calls.focus))
    close(twin(prompt()), own_logits(model, prompt()))


# Inputs


def test_int32_ids() -> None:
    model, ids = tiny_model(), prompt(masks=6).int()
    assert "step" in assert_follows_the_oracle(model, ids)


@pytest.mark.parametrize("batch", [1, 2])
def test_non_contiguous_ids(batch: int) -> None:
    model = tiny_model()
    wide = prompt(masks=6, batch=batch).repeat_interleave(2, 1)
    calls, oracle = Calls(shared(model)), Oracle(model, **OPTIONS)
    for _ in range(4):
        ids = wide[:, ::2]
        assert not ids.is_contiguous()
        expected = oracle.call(ids)
        close(calls(ids), expected.logits)
        wide = decided(ids).repeat_interleave(2, 1)
    assert calls.programs == ["refresh", "step", "step", "step"]


def test_ids_changed_in_place_between_calls() -> None:
    """The usual loop: one tensor, written into."""
    model, ids = tiny_model(), prompt(masks=6)
    calls, oracle = Calls(shared(model)), Oracle(model, **OPTIONS)
    for position in range(6, 12):
        close(calls(ids), oracle.call(ids).logits)
        ids[0, position] = 1
    assert calls.programs.count("step") == 4


def test_no_masks_in_the_input() -> None:
    model, ids = tiny_model(), prompt(masks=0)
    calls = Calls(shared(model))
    close(calls(ids), own_logits(model, ids))
    assert calls.programs == ["exact"]
    assert calls.lines == []


def test_one_sequence_without_masks() -> None:
    ids = torch.cat([prompt(masks=0), prompt(masks=5)])
    assert "step" in assert_follows_the_oracle(tiny_model(), ids)


def test_a_response_without_a_prompt() -> None:
    assert "step" in assert_follows_the_oracle(tiny_model(), prompt(masks=12))


def test_a_prompt_shorter_than_a_key_block() -> None:
    model, ids = tiny_model(), prompt(masks=9)
    assert "step" in assert_follows_the_oracle(model, ids, key_block=8)
    assert "step" in assert_follows_the_oracle(model, ids, key_block=4096, sink_tokens=4096)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_inputs(length: int) -> None:
    model, ids = tiny_model(), prompt(masks=1, length=length)
    calls = Calls(shared(model))
    for _ in range(2):
        close(calls(ids), own_logits(model, ids))
        ids = decided(ids)
    if length == 1:
        assert "fewer than 2 tokens" in calls.line()


def test_prompts_of_different_lengths() -> None:
    ids = prompt(masks=4, batch=3)
    ids[0, 6:], ids[1, 2:] = MASK, MASK
    assert "step" in assert_follows_the_oracle(tiny_model(), ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    model = build(replace(SPEC, padding=True))
    ids, keep = prompt(masks=4, batch=2), torch.ones(2, 12, dtype=torch.int64)
    padded = slice(0, 3) if side == "left" else slice(9, 12)
    ids[0, padded], keep[0, padded] = 0, 0
    calls, oracle = Calls(shared(model)), Oracle(model, **OPTIONS)
    for _ in range(4):
        expected = oracle.call(ids, attention_mask=keep)
        close(calls(ids, attention_mask=keep)[keep.bool()], expected.logits[keep.bool()])
        ids = decided(ids)
    assert calls.programs == ["refresh", "step", "step", "step"]


def test_an_input_that_is_no_batch() -> None:
    """The model's own error, not one of ours."""
    calls = Calls(shared(tiny_model()))
    with pytest.raises(Exception, match=r"index|dimension|shape|size|unpack|range") as error:
        calls(prompt()[0])
    assert "focus_compile" not in str(error.value)
    torch.compiler.reset()  # Dynamo gives up on a forward that raises


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"window": 4096},
        {"expansion": 4096, "buckets": [2]},
        {"sink_tokens": 0},
        {"keep_ratio": 1},
        {"keep_ratio": 0.0, "sink_tokens": 0},
        {"refresh": 3},
        {"refresh": "every-step"},
        {"block_length": 4096},
        {"block_length": 1},
        {"dense_layers": 99},
        {"dense_tail_layers": 99},
        {"key_block": 1},
        {"buckets": [3, 5, 4096]},
    ],
    ids=str,
)
def test_extreme_options_follow_the_oracle(options: dict[str, Any]) -> None:
    programs = assert_follows_the_oracle(tiny_model(), prompt(masks=6), **options)
    everything = options.get("refresh") in (1, "every-step") or options.get("block_length") == 1
    assert ("step" in programs) == (not everything)


def test_a_window_of_4096_on_44_tokens_makes_every_row_active() -> None:
    model, ids = tiny_model(), prompt(masks=6, length=44)
    focus = shared(model, window=4096, keep_ratio=1.0)
    run_call(focus, ids)
    logits, record = run_call(focus, decided(ids))
    assert (record.program, record.rows) == ("step", 44)
    close(logits, own_logits(model, decided(ids)))


def test_dryrun_prints_the_plan_and_runs_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = tiny_model(), prompt()
    calls = Calls(shared(model, dryrun=True))
    for _ in range(2):
        close(calls(ids), own_logits(model, ids))
        ids = decided(ids)
    assert calls.programs == ["exact", "exact"]
    printed = capsys.readouterr().out
    assert "plan: 2 attention sites" in printed
    assert "sparse-suffix" in printed
    assert calls.lines == []


def test_dryrun_prints_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    model = build(replace(SPEC, causal="tril"))
    close(Calls(shared(model, dryrun=True))(prompt()), own_logits(model, prompt()))
    assert "causal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (replace(SPEC, causal="tril"), {}, r"focus_compile: .*causal.* \(strict=True\)"),
        (SPEC, {"mask_token_id": None}, r"focus_compile: no mask_token_id .* \(strict=True\)"),
    ],
)
def test_strict_raises_what_would_have_been_said(
    spec: ModelSpec, options: dict[str, Any], message: str
) -> None:
    calls = Calls(shared(build(spec), **options, strict=True))
    with pytest.raises(BackendCompilerFailed, match=message) as error:
        calls(prompt())
    assert isinstance(error.value.inner_exception, focus_compile.RefusalError)


def test_gradients_run_exactly_and_flow() -> None:
    model, ids = tiny_model(), prompt()
    focus: Any = shared(model)
    with pytest.warns(FocusWarning, match=r"gradients are enabled\. Decode under torch.no_grad"):
        logits = focus(ids)
    logits.square().mean().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(ids).square().mean().backward()
    close(logits, own_logits(model, ids))
    for ours, theirs in zip(found, [p.grad for p in model.parameters()], strict=True):
        close(ours, theirs)


def test_warnings_name_the_users_line() -> None:
    focus: Any = shared(tiny_model(), mask_token_id=None)
    with torch.no_grad(), pytest.warns(FocusWarning) as seen:
        focus(prompt())
    assert seen[0].filename == __file__


def test_dynamic_true_with_floats_in_the_forward_is_said() -> None:
    """Dynamo makes inputs of floats there, which no analysis behind it expects."""
    model = tiny_model()
    calls = Calls(shared(model, dynamic=True))
    close(calls(prompt()), own_logits(model, prompt()))
    if calls.programs == ["exact"]:
        assert "Leave dynamic unset" in calls.line()


def test_beyond_dynamos_recompile_limit_the_model_runs_as_it_is() -> None:
    torch.compiler.reset()
    model = tiny_model()
    with torch._dynamo.config.patch(recompile_limit=2):
        calls = Calls(shared(model))
        for length in (8, 9, 10, 11, 8, 9, 11):
            ids = prompt(length=length)
            close(calls(ids), own_logits(model, ids))
    assert calls.programs == ["refresh"] * 4
    assert calls.lines == []
