"""The choice between evicting and whole steps follows what was measured, and comes back to it."""

from __future__ import annotations

import pytest

from focus_compile.block_diffusion.step_costs import RETRY, TRIALS, WARM_UP, StepCosts
from tests.block_diffusion.tiny import decoder, generate, generator


@pytest.mark.parametrize("evicting_ms", [1.0, 9.0])
def test_the_faster_way_is_taken_and_the_other_tried_again(evicting_ms: float) -> None:
    costs, taken = StepCosts(), []
    for _ in range(2 * (WARM_UP + TRIALS) + 2 * RETRY):
        evicts = costs.evict(32)
        taken.append(evicts)
        costs.measured(32, evicts, evicting_ms if evicts else 3.0, decoded=2, sequences=1)
    trials, chosen = taken[: 2 * (WARM_UP + TRIALS)], taken[2 * (WARM_UP + TRIALS) :]
    assert set(trials) == {True, False}
    assert chosen.count(evicting_ms < 3.0) == len(chosen) - 2
    assert costs.to_dict() == {
        "32": {"whole": 3.0, "evicting": evicting_ms},
        "decoded": {"whole": 2.0, "evicting": 2.0},
    }


def test_fewer_tokens_a_step_count_against_it() -> None:
    costs = StepCosts()
    for _ in range(WARM_UP + TRIALS):
        costs.measured(8, True, 1.0, decoded=1, sequences=1)
        costs.measured(8, False, 1.5, decoded=3, sequences=1)
    assert costs.share_decoded == pytest.approx(1 / 3)
    assert not costs.evict(8)


def test_a_step_that_is_hardly_shorter_is_not_worth_it_whatever_luck_it_had() -> None:
    costs = StepCosts()
    for _ in range(WARM_UP + TRIALS):
        costs.measured(8, True, 8.5, decoded=3, sequences=1)
        costs.measured(8, False, 8.6, decoded=1, sequences=1)
    assert not costs.evict(8)


def test_yields_of_all_sizes_count_together() -> None:
    costs = StepCosts()
    for _ in range(WARM_UP + TRIALS):
        costs.measured(8, True, 0.8, decoded=4, sequences=2)
        costs.measured(8, False, 1.0, decoded=4, sequences=2)
    assert costs.evict(8)
    for _ in range(20):
        costs.measured(64, True, 9.0, decoded=1, sequences=2)
    assert not costs.evict(8)


def test_sizes_are_judged_apart() -> None:
    costs = StepCosts()
    for _ in range(WARM_UP + TRIALS):
        for rows, evicting in ((8, 3.0), (64, 1.0)):
            costs.measured(rows, True, evicting, 1, 1)
            costs.measured(rows, False, 2.0, 1, 1)
    assert (costs.evict(8), costs.evict(64)) == (False, True)


def test_a_generator_that_weighs_takes_both_ways() -> None:
    made = generator(decoder("qwen3"), block_length=8, max_batch=2, evict_if_faster=True)
    generate(made, [[1, 2, 3]] * 4, 40)
    assert {step.evicting for step in made.history} == {True, False}
    assert made.costs is not None
    assert made.costs.to_dict()
