"""The table of token eviction: its arms and rules, its counting, and one small run of all of it."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from focus_compile.block_diffusion.batch_generator import BatchGenerator
from focus_compile.config import COMBINED
from focus_compile.demo import block_arms, evict_fidelity
from focus_compile.demo.block_arms import BlockArm, BlockQuestions, Responses, Work
from focus_compile.demo.evict_fidelity import EvictFidelitySettings
from focus_compile.errors import OptionError

ARMS = [
    "block diffusion",
    "delayed cache",
    "delayed cache, delayed commit",
    "focus-evict α=∞",
    "focus-evict α=3",
    "focus-evict α=2",
    "focus-evict α=1.5",
    "focus-evict α=1",
    "random α=1.5",
    "worst first α=1.5",
]


def test_the_arms() -> None:
    arms = evict_fidelity.arms(EvictFidelitySettings())
    assert [arm.name for arm in arms] == ARMS
    assert arms[0].options() == {"policy": "block-diffusion", "commit": "exact"}
    assert arms[2].options() == {"policy": "delayed-cache", "commit": "delayed"}
    assert arms[3].options()["alpha"] == "inf"
    assert arms[-2].options() == {
        "policy": "focus-evict",
        "commit": "exact",
        "alpha": 1.5,
        "rank": "random",
    }
    *same, combined = evict_fidelity.arms(EvictFidelitySettings(keep_ratios=(0.25,)))
    assert same == arms
    assert combined.name == "focus-dllm+evict keys=0.25"
    assert combined.options() == {
        "policy": "focus-dllm+evict",
        "commit": "exact",
        "alpha": 1.5,
        "rank": "difference",
        "keep_ratio": 0.25,
    }
    own = evict_fidelity.arms(EvictFidelitySettings(alpha=4.0))
    assert [arm.alpha for arm in own[3:]] == [math.inf, 4, 3, 2, 1, 4, 4]


def test_the_rules() -> None:
    settings = EvictFidelitySettings(tokens_per_step=(1, 2), threshold=0.99)
    assert evict_fidelity.rules(settings) == {
        "1 a step": (1, 1.0),
        "2 a step": (2, 1.0),
        "τ=0.99": (None, 0.99),
    }


def test_rankings() -> None:
    at_cut, before = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    assert block_arms.ranking("difference")(at_cut, before).tolist() == [2, -1]
    assert block_arms.ranking("reversed")(at_cut, before).tolist() == [-2, 1]
    random, again = block_arms.ranking("random", 7), block_arms.ranking("random", 7)
    first = random(at_cut, before)
    assert torch.equal(first, again(at_cut, before))
    assert not torch.equal(first, random(at_cut, before))
    with pytest.raises(OptionError, match="did you mean 'random'"):
        block_arms.ranking("rando")


def test_scores_are_shares_of_plain_block_diffusion() -> None:
    plain = Responses(((1, 2), (3, 4)), ((True, True), (True, False)), Work(4, 4, 16, 16, 8))
    other = Responses(((1, 2), (5, 4)), ((True, False), (False, True)), Work(5, 4, 10, 6, 8))
    score = evict_fidelity._score(other, plain, 1.0)
    assert (score.right, score.asked, score.accuracy) == (2, 4, 0.5)
    assert score.kept_answers == pytest.approx(1 / 3)
    assert score.same_tokens == 0.75
    assert (score.listed_rows_per_token, score.kept_rows_per_token) == (2.5, 1.5)
    assert score.tokens_per_step == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_step": (1, 0)}, "tokens_per_step=0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"length": 200}, "length=200"),
        ({"gen_length": 40}, "gen_length=40"),
        ({"length": 128, "questions": 12}, "128 tokens cannot hold 12 facts"),
        ({"alpha": 0.5, "length": 128, "questions": 1}, "alpha=0.5"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        next(evict_fidelity.run(EvictFidelitySettings(**settings)))  # type: ignore[arg-type]


def test_lengths_are_multiples_of_the_block() -> None:
    asked = BlockQuestions(length=192, gen_length=32, questions=1, block_length=32)
    asked.check()
    with pytest.raises(OptionError, match="length=192"):
        BlockQuestions(length=192, gen_length=32, questions=1, block_length=36).check()


@pytest.mark.long
@pytest.mark.slow
def test_a_small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict_fidelity, "ALPHAS", (math.inf,))
    names = [*ARMS[:4], ARMS[6], *ARMS[-2:]]
    settings = EvictFidelitySettings(
        length=192,
        examples=2,
        batch=2,
        gen_length=32,
        questions=2,
        tokens_per_step=(4,),
        threshold=0.999,
        lowering="eager",
    )
    answered: list[str] = []
    results = list(evict_fidelity.run(settings, lambda arm, _: answered.append(arm)))
    rules = ("4 a step", "τ=0.999")
    assert answered == [f"{rule}, {name}" for rule in rules for name in names for _ in range(2)]
    assert len(results) == 2 * len(names)
    found = results[-1].scores["4 a step"]
    assert list(found) == names
    assert results[-1].same_as_delayed == {"4 a step": True, "τ=0.999": True}
    for kind in ("needle", "table"):
        plain, delayed, evicting = (found[names[at]][kind] for at in (0, 1, 4))
        assert plain.asked == 4
        assert plain.same_tokens == 1
        assert plain.kept_rows_per_token == pytest.approx(32 / 4)
        assert delayed.kept_rows_per_token < plain.kept_rows_per_token
        assert evicting.kept_rows_per_token < evicting.listed_rows_per_token
    written = json.loads(json.dumps(results[-1].to_dict(), allow_nan=False))
    assert [arm["name"] for arm in written["rules"]["4 a step"]] == names
    console = Console(file=io.StringIO(), width=120)
    console.print(evict_fidelity.table(results[-1]))
    assert isinstance(console.file, io.StringIO)
    assert all(name in console.file.getvalue() for name in names)


@pytest.mark.slow
def test_sparse_keys_keep_the_answers_until_nearly_none_is_read() -> None:
    """The bundled model, 14 key blocks: a quarter of them suffices; sinks alone do not."""
    model, tokenizer = block_arms.load()
    asked = BlockQuestions(length=512, gen_length=64, questions=12, block_length=32)
    questions = asked.make(tokenizer, "needle", 2)
    generator = BatchGenerator(
        model, block_length=32, max_length=512, max_batch=2, policy=COMBINED, lowering="eager"
    )
    block_arms.set_rule(generator, 4)
    right = {}
    for share in (1.0, 0.25, 0.0):
        generator.keep_ratio = share
        found = block_arms.decode(generator, tokenizer, questions, 64)
        right[share] = sum(found.marks())
    assert right[0.25] == right[1.0] >= 22
    assert right[0.0] < 6


def test_an_arm_sets_a_generator() -> None:
    class Idle:
        policy, alpha, commit, rank, keep_ratio = "", 0.0, "", None, 1.0

    idle = Idle()
    BlockArm("x", "focus-evict", alpha=2.0, commit="delayed").set(idle)  # type: ignore[arg-type]
    assert (idle.policy, idle.alpha, idle.commit) == ("focus-evict", 2.0, "delayed")
    assert idle.rank is torch.sub
    BlockArm("x", COMBINED, keep_ratio=0.25).set(idle)  # type: ignore[arg-type]
    assert idle.keep_ratio == 0.25
