"""The training of the tiny models: masks, tasks, noise, checkpoints, a short climb."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from examples.train_tiny import evaluate, ladder, models, prepare, tasks, train
from examples.train_tiny.ladder import LADDERS, Stage
from examples.train_tiny.layout import Layout, block_causal_mask
from examples.train_tiny.prepare import BOS, EOS, MASK
from examples.train_tiny.tasks import Corpus

WORDS = "river stone light garden winter silver mountain letter".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` writes, of a text that makes each of `WORDS` one token."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [
        f"The secret word of {a} is {b}; what are the secret words of {b}, {a}? 0123456789"
        for a, b in rng.choice(WORDS, (400, 2))
    ]
    texts = {name: "\n".join(lines) + "\n" for name in ("wordnet", "shakespeare", "kjv")}
    tokenizer = prepare.train_tokenizer(list(texts.values()), vocabulary=400)
    words = prepare.choose_words(tokenizer, texts, set(WORDS))
    assert sorted(words) == sorted(WORDS)
    prepare.write(folder, tokenizer, texts, words)
    return folder


@pytest.fixture(scope="module")
def corpus(data: Path) -> Corpus:
    return Corpus(data)


def tiny(family: models.Family, vocabulary: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    return models.build(family, models.SIZES["test"], vocabulary=vocabulary).eval()


class TestMasks:
    @pytest.mark.parametrize("block", [1, 4, 8])
    @pytest.mark.parametrize(("noisy", "copies"), [(24, 1), (16, 3)])
    @torch.no_grad()
    def test_a_noisy_block_is_computed_as_in_decoding(
        self, block: int, noisy: int, copies: int
    ) -> None:
        model = tiny("block")
        layout = Layout(24, block, noisy, copies)
        clean = torch.randint(6, 64, (2, 24))
        noise = torch.randint(6, 64, (2, copies, noisy))
        ids = torch.cat([noise.flatten(1), clean], dim=1)
        both = model(ids, layout.mask(), position_ids=layout.positions()[None]).logits
        for copy in range(copies):
            for start in range(24 - noisy, 24, block):
                at = start - (24 - noisy)
                one = torch.cat([clean[:, :start], noise[:, copy, at : at + block]], dim=1)
                alone = model(one, block_causal_mask(start + block, block)).logits[:, start:]
                row = copy * noisy + at
                torch.testing.assert_close(both[:, row : row + block], alone)

    @torch.no_grad()
    def test_the_clean_copy_does_not_see_the_noise(self) -> None:
        model = tiny("block")
        layout = Layout(24, 8, 16, 2)
        ids = torch.randint(6, 64, (2, layout.rows))
        both = model(ids, layout.mask(), position_ids=layout.positions()[None]).logits
        alone = model(ids[:, layout.noisy_rows :], block_causal_mask(24, 8)).logits
        torch.testing.assert_close(both[:, layout.noisy_rows :], alone)

    def test_blocks_of_one_are_causal(self) -> None:
        assert torch.equal(block_causal_mask(5, 1)[0, 0], torch.ones(5, 5).tril().bool())

    @pytest.mark.parametrize(("family", "block"), [("block", 1), ("bidir", 16)])
    @torch.no_grad()
    def test_no_mask_means_what_the_trainer_takes_it_for(
        self, family: models.Family, block: int
    ) -> None:
        ids = torch.randint(6, 64, (2, 16))
        model = tiny(family)
        given = model(ids, block_causal_mask(16, block)).logits
        torch.testing.assert_close(model(ids).logits, given)


class TestTasks:
    @pytest.mark.parametrize("wording", sorted(tasks.WORDINGS))
    @pytest.mark.parametrize("kind", ["needle", "table"])
    @pytest.mark.parametrize("digits", [False, True])
    def test_an_example_answers_its_question(
        self, data: Path, kind: str, digits: bool, wording: str
    ) -> None:
        corpus = Corpus(data, wording=wording)
        made = tasks.retrieval(
            corpus,
            np.random.default_rng(0),
            4,
            320,
            kind=kind,
            response=64,
            questions=3,
            facts=5,
            digits=digits,
        )
        assert made.ids.shape == (4, 320)
        fact = corpus.facts[kind]
        for ids in made.ids:
            assert ids[0] == BOS
            text = corpus.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            prompt, response = text.split("<|response|>")
            assert corpus.encode(prompt + "<|response|>").size <= 256
            answers = response.split("<|eos|>")[0].split(";")[:-1]
            assert len(answers) == 3
            asked = prompt.rpartition("\n")[2]
            for answer in answers:
                key, value = answer.strip().split(" is ")
                assert fact.format(key, value) in prompt
                assert f" {key}" in asked

    def test_roles(self, corpus: Corpus) -> None:
        made = tasks.retrieval(
            corpus, np.random.default_rng(0), 2, 192, kind="table", response=64, questions=2
        )
        assert ((made.kind == tasks.VALUE).sum(1) == 2).all()
        assert np.isin(made.ids[made.kind == tasks.VALUE], corpus.word_ids).all()
        assert (made.ids[made.kind == tasks.END] == EOS).all()
        assert (made.kind[:, :128] == tasks.TEXT).all()

    def test_a_repetition_repeats(self, corpus: Corpus) -> None:
        made = tasks.repeat(corpus, np.random.default_rng(0), 3, 96)
        for ids, kind in zip(made.ids, made.kind, strict=True):
            period = int((kind == tasks.TEXT).sum()) - 1
            np.testing.assert_array_equal(ids[1 + period :], ids[1:-period])

    def test_sizes_that_do_not_fit(self, corpus: Corpus) -> None:
        with pytest.raises(ValueError, match="cannot hold 9 questions"):
            tasks.retrieval(
                corpus, np.random.default_rng(0), 1, 96, kind="table", response=32, questions=9
            )


class TestWork:
    @pytest.mark.parametrize("objective", ["next", "block", "full"])
    def test_predictions_are_asked_for_where_the_answer_is_hidden(
        self, corpus: Corpus, objective: ladder.Objective
    ) -> None:
        stage = Stage("it", objective, (192,), block=4, batch_tokens=4096, text=0)
        work = ladder.make_work(corpus, stage, np.random.default_rng(0))
        assert work.ids.shape[1] == work.layout.rows
        assert len(work.rows) == len(work.targets) == len(work.kinds) == len(work.weights)
        assert (work.targets != MASK).all()
        assert (work.kinds == tasks.VALUE).any()
        seen = work.ids.flatten()[work.rows]
        if objective == "next":
            assert torch.equal(work.ids.flatten()[work.rows + 1], work.targets)
        else:
            assert (seen == MASK).all()
            assert (work.ids == MASK).sum() == len(work.rows)

    def test_noise_covers_all_states_of_a_block(self) -> None:
        masked = ladder.noise((4000, 8), 4, np.random.default_rng(0)).reshape(-1, 4)
        share = np.bincount(masked.sum(1), minlength=5) / len(masked)
        assert (share > 0.05).all()
        assert ladder.noise((3, 8), 1, np.random.default_rng(0)).all()

    @pytest.mark.parametrize("name", sorted(LADDERS))
    def test_every_stage_of_every_ladder_makes_work(self, corpus: Corpus, name: str) -> None:
        rng = np.random.default_rng(0)
        for stage in LADDERS[name]:
            for length in set(stage.lengths):
                one = Stage(
                    stage.name,
                    stage.objective,
                    (length,),
                    block=stage.block,
                    digits=stage.digits,
                    batch_tokens=length,
                )
                work = ladder.make_work(corpus, one, rng)
                assert work.layout.length == length
                assert length % work.layout.block == 0
                assert work.layout.noisy % 32 == 0


class TestDecoding:
    @pytest.mark.parametrize(("family", "block_causal"), [("block", True), ("bidir", False)])
    @pytest.mark.parametrize("threshold", [None, 0.0])
    def test_decodes_all_and_keeps_the_prompt(
        self, family: models.Family, block_causal: bool, threshold: float | None
    ) -> None:
        prompts = torch.randint(6, 64, (2, 64))
        ids, rate = evaluate.decode(
            tiny(family), prompts, 64, threshold=threshold, block_causal=block_causal
        )
        assert torch.equal(ids[:, :64], prompts)
        assert (ids != MASK).all()
        assert rate == 1 if threshold is None else rate > 1

    def test_statements_are_found_wherever_they_stand(self) -> None:
        response = torch.tensor([[9, 1, 2, 3, 9, 4, 5, 6]])
        statements = torch.tensor([[[4, 5, 6], [1, 2, 3], [1, 2, 4]]])
        assert evaluate.stated(response, statements).tolist() == [[True, True, False]]


class TestCheckpoints:
    @pytest.mark.parametrize("family", ["block", "bidir"])
    def test_transformers_reads_the_folder(self, family: models.Family, tmp_path: Path) -> None:
        model = tiny(family)
        models.save(model, tmp_path / "model.safetensors", {"stage": "here"})
        models.save_config(model, tmp_path)
        auto = AutoModelForCausalLM if family == "block" else AutoModelForMaskedLM
        loaded = auto.from_pretrained(tmp_path, dtype=torch.float32)
        again = tiny(family)
        assert models.load(again, tmp_path) == {"stage": "here"}
        ids = torch.randint(6, 64, (1, 8))
        torch.testing.assert_close(loaded(ids).logits, again(ids).logits)
        assert loaded.config.mask_token_id == MASK

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        models.save(tiny("block"), tmp_path / "model.safetensors", {})
        with pytest.raises(ValueError, match="another model"):
            models.load(tiny("bidir"), tmp_path)

    @pytest.mark.parametrize("family", ["block", "bidir"])
    def test_the_shipped_size_fits(self, family: models.Family) -> None:
        with torch.device("meta"):
            model = models.build(family, models.SIZES["tiny"])
        assert 2 * models.parameters(model) < 15.95e6


class TestTraining:
    def _run(self, data: Path, out: Path, *more: str) -> None:
        train.main(
            f"--model block --ladder smoke --size test --data {data} --out {out} --eval-seconds 0 "
            f"--decay-minutes 0 --batch-tokens 512 --workers 0 {' '.join(more)}".split()
        )

    def test_resumes_where_it_was_left(self, data: Path, tmp_path: Path) -> None:
        self._run(data, tmp_path / "a", "--minutes 0.02")
        first = json.loads((tmp_path / "a/state.json").read_text())
        assert first["stage"] == "next-64"
        assert first["steps"] > 0
        self._run(
            data, tmp_path / "b", f"--minutes 0.02 --stages block-4 --resume {tmp_path / 'a'}"
        )
        second = json.loads((tmp_path / "b/state.json").read_text())
        assert second["stage"] == "block-4"
        assert second["steps"] > first["steps"]

    def test_climbs_by_itself_and_evaluates(
        self,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        stages = (
            Stage("one", "next", (96,), most=20, least=1),
            Stage("two", "block", (96,), block=32, most=20, least=1),
        )
        monkeypatch.setitem(LADDERS, "smoke", stages)
        self._run(data, tmp_path, "--minutes 0.06 --eval-seconds 1.5 --eval-lengths 192")
        state = json.loads((tmp_path / "state.json").read_text())
        assert [entry["stage"] for entry in state["history"]] == ["one"]
        assert state["stage"] == "two"
        assert (tmp_path / "after-next.safetensors").exists()
        assert json.loads((tmp_path / "evaluation.json").read_text())
        assert "tokens/call" in capsys.readouterr().out

    def test_an_unknown_stage_is_named(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="no stage nowhere"):
            self._run(data, tmp_path, "--minutes 0.01 --stages nowhere")
