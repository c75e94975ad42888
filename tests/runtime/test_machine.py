"""Random histories of calls on two models that share a compiled graph, against their oracles."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import focus_compile
from focus_compile.backend import focus
from focus_compile.fallback import FocusWarning
from focus_compile.runtime.store import STORE
from tests.compiled import run_call
from tests.models import ModelSpec, build
from tests.models.network import Dllm, logits_of
from tests.oracle import Oracle
from tests.strategies import bound_from_float64, float64_twin

SPEC = ModelSpec(layers=2, padding=True, output="tensor")
OPTIONS: dict[str, Any] = {
    "mask_token_id": SPEC.mask_token_id,
    "block_length": 4,
    "dense_layers": 0,
    "expansion": 1,
    "window": 2,
    "keep_ratio": 0.4,
    "sink_tokens": 1,
    "key_block": 2,
}
CLEAR_MARGIN = 1e-3
LENGTHS = (6, 18)

whichever = st.integers(0, 1)
seeds = st.integers(0, 2**16)


@pytest.fixture(autouse=True, scope="module")
def few_graphs() -> Iterator[None]:
    """One graph for all sizes from the first call on, and no limit that a history could meet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=64):
        yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def prompt_and_masks(batch: int, length: int, seed: int) -> Tensor:
    """Random ids, of which the last third or more are masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SPEC.mask_token_id, (batch, length), generator=generator)
    starts = torch.randint(0, 2 * length // 3 + 1, (batch, 1), generator=generator)
    return ids.where(torch.arange(length) < starts, SPEC.mask_token_id)


@dataclass
class Kept:
    """Logits that a caller holds on to, and what they must still be."""

    logits: Tensor
    expected: Tensor


@dataclass
class Subject:
    """A model, its compiled form, and what the caller does with them."""

    model: Dllm
    focus: Any
    ids: Tensor
    mask: Tensor
    oracle: Oracle = field(init=False)
    kept: list[Kept] = field(default_factory=list)
    bound: float = 0.0
    graph: tuple[Any, ...] = ()
    restarts: bool = True
    """Whether the next call of a trajectory must start anew, whatever its ids."""

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing of the calls so far is known any more."""
        self.oracle, self.restarts = Oracle(self.model, **OPTIONS), True

    def start(self, batch: int, length: int, seed: int) -> None:
        self.ids = prompt_and_masks(batch, length, seed)
        self.mask = torch.ones_like(self.ids)
        self.mask[:, 0] = seed % 2

    @property
    def masked(self) -> Tensor:
        return self.ids == SPEC.mask_token_id

    def call(self, *, inference: bool = False) -> None:
        """One call without gradients, judged by the oracle."""
        graph = (inference, self.model.training)
        restarts = self.restarts or graph != self.graph
        if restarts:
            self.oracle.broken = True
        with torch.inference_mode(inference):
            ids, mask = self.ids.clone(), self.mask.clone()
            logits, record = run_call(self.focus, ids, attention_mask=mask)
            ids.zero_(), mask.zero_()
        before = self.oracle.state
        expected = self.oracle.call(self.ids, attention_mask=self.mask)
        assert record.program == expected.program, record.why
        if expected.program != "exact":
            self.graph, self.restarts = graph, False
            new = self.oracle.state is not before
            assert record.why.startswith("new trajectory") == new, record.why
        if expected.program != "step":
            twin = float64_twin(self.model)
            self.bound = 4 * bound_from_float64(
                self.model, twin, self.ids, attention_mask=self.mask
            )
        self.kept.append(Kept(logits, logits.clone()))
        if expected.margin < CLEAR_MARGIN:
            # Rounding may have chosen other rows than the oracle's.
            STORE.slot(self.model.embedding.weight).trajectory = None
            self.oracle.state = None
            return
        assert record.rows == int(expected.active.sum())
        error = (logits - expected.logits)[self.mask.bool()].abs().max()
        assert error <= self.bound, f"{record.program}: {error:g} > {self.bound:g}"

    def exact(self, **inputs: Tensor) -> None:
        """One call that must return the model's own answer."""
        logits, record = run_call(self.focus, self.ids.clone(), **inputs)
        assert record.program == "exact"
        with torch.no_grad():
            expected = logits_of(self.model(self.ids, **inputs))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def backward(self) -> None:
        """One call with gradients: logits and every gradient are the model's own."""
        found, own = self.gradients(self.focus), self.gradients(self.model)
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)

    def gradients(self, model: Any) -> list[Tensor | None]:
        self.model.zero_grad()
        with torch.enable_grad():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FocusWarning)
                logits = logits_of(model(self.ids.clone(), attention_mask=self.mask))
            logits.square().mean().backward()
        return [logits.detach(), *(p.grad for p in self.model.parameters())]

    @torch.no_grad()
    def optimize(self) -> None:
        for parameter in self.model.parameters():
            parameter.add_(parameter.sign(), alpha=0.01)
        self.restarts = True


class CallHistories(RuleBasedStateMachine):
    """Two instances of one class, called in any order and in any way."""

    subjects: tuple[Subject, Subject]

    @initialize(seed=seeds)
    def make(self, seed: int) -> None:
        models = [build(SPEC, seed + i) for i in range(2)]
        first, second = (
            Subject(
                model,
                focus_compile.compile(model, lowering="eager", dynamic=True, **OPTIONS),
                torch.empty(0),
                torch.empty(0),
            )
            for model in models
        )
        first.start(2, 12, seed)
        second.start(2, 12, seed + 1)
        self.subjects = (first, second)

    @rule(which=whichever, seed=seeds, count=st.integers(0, 3), inference=st.booleans())
    def decide_and_call(self, which: int, seed: int, count: int, inference: bool) -> None:
        self.decide(which, seed, count)
        self.subjects[which].call(inference=inference)

    @rule(which=whichever, seed=seeds, counts=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def decode_some_steps(self, which: int, seed: int, counts: list[int]) -> None:
        """What most histories consist of; one mode, so that steps follow one another."""
        for number, count in enumerate(counts):
            self.decide(which, seed + number, count)
            self.subjects[which].call()

    def decide(self, which: int, seed: int, count: int) -> None:
        subject = self.subjects[which]
        generator = torch.Generator().manual_seed(seed)
        open_positions = subject.masked.nonzero()
        chosen = torch.randperm(len(open_positions), generator=generator)[:count]
        rows, columns = open_positions[chosen].unbind(1)
        tokens = torch.randint(1, SPEC.mask_token_id, rows.shape, generator=generator)
        subject.ids[rows, columns] = tokens

    @rule(which=whichever)
    def finish(self, which: int) -> None:
        subject = self.subjects[which]
        subject.ids[subject.masked] = 1
        subject.exact(attention_mask=subject.mask)

    @rule(which=whichever, seed=seeds, batch=st.integers(2, 3), length=st.integers(*LENGTHS))
    def start_anew(self, which: int, seed: int, batch: int, length: int) -> None:
        self.subjects[which].start(batch, length, seed)
        self.subjects[which].call()

    @rule(which=whichever, change=st.sampled_from([-1, 1]))
    def change_length(self, which: int, change: int) -> None:
        subject = self.subjects[which]
        batch, length = subject.ids.shape
        if not LENGTHS[0] <= length + change <= LENGTHS[1]:
            return
        more = torch.full((batch, 1), SPEC.mask_token_id)
        subject.ids = torch.cat([subject.ids, more], 1)[:, : length + change]
        subject.mask = torch.ones_like(subject.ids)
        subject.call()

    @rule(which=whichever)
    def mask_a_decided_token(self, which: int) -> None:
        subject = self.subjects[which]
        for row, masked in zip(subject.ids, subject.masked, strict=True):
            if not masked.all():
                row[(~masked).nonzero()[-1]] = SPEC.mask_token_id
        subject.call()

    @rule(which=whichever, seed=seeds, counts=st.lists(st.integers(1, 2), min_size=1, max_size=4))
    def decode_and_edit(self, which: int, seed: int, counts: list[int]) -> None:
        """A loop that takes back or replaces its last token now and then."""
        subject = self.subjects[which]
        for number, count in enumerate(counts):
            before = subject.masked
            self.decide(which, seed + number, count)
            subject.call()
            decided = (before & ~subject.masked).nonzero()
            if len(decided) and (seed + number) % 3:
                row, column = decided[-1].tolist()
                again = (seed + number) % 3 == 1
                token = int(subject.ids[row, column])
                other = token % (SPEC.mask_token_id - 1) + 1
                subject.ids[row, column] = SPEC.mask_token_id if again else other
                subject.call()

    @rule(which=whichever, seed=seeds, calls=st.integers(1, 7))
    def score_under_random_masks(self, which: int, seed: int, calls: int) -> None:
        """As log-likelihoods are estimated."""
        subject = self.subjects[which]
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, SPEC.mask_token_id, subject.ids.shape, generator=generator)
        for _ in range(calls):
            hidden = torch.rand(tokens.shape, generator=generator) < 0.5
            hidden[:, : tokens.shape[1] // 3] = False
            subject.ids = tokens.where(~hidden, SPEC.mask_token_id)
            if subject.masked.any():
                subject.call()

    @rule(which=whichever)
    def change_a_decided_token(self, which: int) -> None:
        subject = self.subjects[which]
        if not subject.masked[0, 0]:
            subject.ids[0, 0] = subject.ids[0, 0] % (SPEC.mask_token_id - 1) + 1
        subject.call()

    @rule(which=whichever)
    def change_the_attention_mask(self, which: int) -> None:
        subject = self.subjects[which]
        subject.mask[0, 0] = 1 - subject.mask[0, 0]
        subject.call()

    @rule(which=whichever)
    def train_a_little(self, which: int) -> None:
        self.subjects[which].backward()
        self.subjects[which].optimize()

    @rule(which=whichever, training=st.booleans())
    def switch_mode(self, which: int, training: bool) -> None:
        self.subjects[which].model.train(training)

    @rule(source=whichever)
    def load_the_other_weights(self, source: int) -> None:
        target = self.subjects[1 - source]
        target.model.load_state_dict(self.subjects[source].model.state_dict())
        target.restarts = True

    @rule(which=whichever)
    def assign_other_weights(self, which: int) -> None:
        subject = self.subjects[which]
        state = build(SPEC, int(subject.ids.sum())).state_dict()
        subject.model.load_state_dict(state, assign=True)
        for parameter in subject.model.parameters():
            parameter.requires_grad_(True)
        subject.forget()

    @rule()
    def free_all_state(self) -> None:
        """What torch.compiler.reset() asks of the backend, without tracing anew."""
        focus.reset()
        for subject in self.subjects:
            subject.forget()

    @rule(which=whichever)
    def write_into_the_logits(self, which: int) -> None:
        for kept in self.subjects[which].kept[-1:]:
            with torch.inference_mode(kept.logits.is_inference()):
                kept.logits.fill_(torch.nan)
            kept.expected.fill_(torch.nan)

    @rule(which=whichever, count=st.integers(1, 3))
    def let_go_of_logits(self, which: int, count: int) -> None:
        del self.subjects[which].kept[:count]

    @invariant()
    def logits_handed_out_stay(self) -> None:
        for subject in getattr(self, "subjects", ()):
            for kept in subject.kept:
                assert torch.equal(kept.logits.nan_to_num(), kept.expected.nan_to_num())


def test_every_history_of_calls_is_answered_right() -> None:
    run_state_machine_as_test(
        CallHistories,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
