"""lm-eval's model `focus_dllm`: responses, likelihoods, resuming, tasks, data parallelism."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, EuroBertConfig
from typer.testing import CliRunner

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from focus_compile import demo  # noqa: E402
from focus_compile.cli import app  # noqa: E402
from focus_compile.config import FocusConfig  # noqa: E402
from focus_compile.errors import OptionError  # noqa: E402
from focus_compile.integrations.lm_eval import FocusLM, Work, compare, model  # noqa: E402
from focus_compile.integrations.lm_eval.__main__ import with_tasks  # noqa: E402
from focus_compile.integrations.lm_eval.decoders import (  # noqa: E402
    BlockQueue,
    Decoder,
    dense_call,
)
from focus_compile.integrations.lm_eval.likelihood import Likelihood, random_masks  # noqa: E402
from focus_compile.integrations.lm_eval.settings import (  # noqa: E402
    LMSettings,
    Request,
    split_arguments,
)
from focus_compile.integrations.tasks import retrieval as retrieval_task  # noqa: E402
from tests.block_diffusion.tiny import MASK as BLOCK_MASK  # noqa: E402
from tests.block_diffusion.tiny import decoder  # noqa: E402

MASK, EOS = 3, 2
PROMPTS = ("The secret word of", "Question: What are the secret words of just,", "In")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOCUS_COMPILE_VERIFY", "0")
        yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights, whose predictions are far from one another, on disk."""
    config = EuroBertConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        mask_token_id=MASK, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForMaskedLM.from_config(config).save_pretrained(path)
    demo.load_tokenizer().save_pretrained(path)
    return str(path)


def load(folder: str, **arguments: Any) -> FocusLM:
    chosen = {"backend": "eager", "block_length": 8, "dtype": "float32"} | arguments
    made = get_model("focus_dllm").create_from_arg_obj({"pretrained": folder}, chosen)
    assert isinstance(made, FocusLM)
    return made


def asking(*prompts: str, kind: str = "generate_until", **gen_kwargs: Any) -> list[Instance]:
    given = {"until": [], "max_gen_toks": 20} | gen_kwargs
    return [
        Instance(kind, {}, (prompt, dict(given)), at, ("task", at, 1))
        for at, prompt in enumerate(prompts)
    ]


def scoring(*pairs: tuple[str, str]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, at, ("task", at, 1)) for at, pair in enumerate(pairs)
    ]


# Responses


def test_prompts_of_any_length_share_a_batch(folder: str) -> None:
    """What each would be alone, in the order asked, for every way of sharing."""
    alone = load(folder, batch_size=1).generate_until(asking(*PROMPTS))
    assert len(set(alone)) == 3
    padded = load(folder, batch_size=3)
    assert padded.generate_until(asking(*PROMPTS), disable_tqdm=True) == alone
    assert padded.work.model_calls == 24
    apart = load(folder, batch_size=3, padding="none")
    assert apart.generate_until(asking(*PROMPTS, PROMPTS[0])) == [*alone, alone[0]]
    assert apart.work.model_calls == 3 * 24
    assert apart.work.responses == 4


def test_focus_decodes_as_the_model_where_nothing_is_approximated(folder: str) -> None:
    expected = load(folder, batch_size=3).generate_until(asking(*PROMPTS))
    focused = load(
        folder, backend="focus", lowering="eager", refresh="every-step", batch_size=3, strict=True
    )
    assert focused.generate_until(asking(*PROMPTS)) == expected
    sparse = load(folder, backend="focus", lowering="eager", batch_size=3, window=1, strict=True)
    assert len(sparse.generate_until(asking(*PROMPTS))) == 3
    assert sparse.work.model_calls == focused.work.model_calls
    assert sparse.work.rows < focused.work.rows


def test_stop_strings_cut_the_text_and_spare_calls(folder: str) -> None:
    (whole,) = load(folder).generate_until(asking(PROMPTS[0], max_gen_toks=32))
    stop = whole[3:6]
    lm = load(folder)
    (cut,) = lm.generate_until(asking(PROMPTS[0], max_gen_toks=32, until=["\0", stop]))
    assert cut == whole[: whole.index(stop)]
    assert lm.work.model_calls < 32


def test_generation_arguments(folder: str) -> None:
    lm = load(folder, tokens_per_step=4)
    lm.generate_until(asking(PROMPTS[0], max_gen_toks=16))
    assert lm.work.model_calls == 4
    lm.generate_until(asking(PROMPTS[0], max_gen_toks=16, tokens_per_step=8))
    assert lm.work.model_calls == 4 + 2
    lm.generate_until(asking(PROMPTS[0], max_gen_toks=16, threshold=0.0))
    assert lm.work.model_calls == 4 + 2 + 2
    with pytest.raises(OptionError, match="tokens_per_step=0"):
        lm.generate_until(asking(PROMPTS[0], tokens_per_step=0))
    with pytest.warns(UserWarning, match="'top_p'"):
        lm.generate_until(asking(PROMPTS[0], max_gen_toks=8, top_p=0.5))
    drawn = [
        load(folder, seed=seed).generate_until(
            asking(PROMPTS[0], max_gen_toks=8, do_sample=True, temperature=1.0)
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_too_long_is_cut_on_the_left(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(model.log, "warning", lambda text, *values: said.append(text % values))
    lm = load(folder, max_length=24)
    long = load(folder, max_length=24).tok_decode(lm.tok_encode(" ".join(PROMPTS))[-8:])
    cut, short = lm.generate_until(asking(" ".join(PROMPTS), long, max_gen_toks=8))
    assert cut == short
    assert said
    assert all("cut on the left to 8" in line for line in said)
    with pytest.raises(OptionError, match="no room for a prompt"):
        lm.generate_until(asking(PROMPTS[0], max_gen_toks=24))


def test_a_run_that_was_stopped_goes_on(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folder).generate_until(asking(*PROMPTS))
    stopped = load(folder)
    decode = Decoder.decode

    def decode_one(self: Decoder, prompts: Any, *others: Any) -> Any:
        if self.work.responses or stopped.work.responses:
            raise KeyboardInterrupt
        return decode(self, prompts, *others)

    monkeypatch.setattr(Decoder, "decode", decode_one)
    with pytest.raises(KeyboardInterrupt):
        CachingLM(stopped, str(tmp_path / "responses.db")).generate_until(asking(*PROMPTS))
    monkeypatch.undo()
    again = load(folder)
    found = CachingLM(again, str(tmp_path / "responses.db")).generate_until(asking(*PROMPTS))
    assert found == expected
    assert again.work.responses == 2


def test_chat_templates_are_the_tokenizers(folder: str) -> None:
    lm = load(folder)
    lm.tokenizer.chat_template = (
        "<|prompt|>{% for m in messages %}{{ m.content }}{% endfor %}<|response|>"
    )
    assert lm.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|prompt|>Hi<|response|>"
    assert lm.chat_template(True) == lm.tokenizer.chat_template


# Likelihoods


class Toy:
    """Logits that depend on the ids of all positions, over a few tokens."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = torch.randn(7, 5, 5, 7)
        self.rows = 0

    def __call__(self, ids: Tensor) -> Any:
        self.rows += len(ids)
        at = torch.arange(ids.shape[1])
        return SimpleNamespace(logits=self.table[ids][:, :, at].sum(dim=1)[:, :, 0])


def test_the_likelihood_is_the_mean_over_all_masks() -> None:
    """Against the bound written out: every number of masks, every set of that size."""
    toy, context, target = Toy(), [1, 2], [4, 5, 6]
    ids = torch.tensor([*context, *target])
    bound = 0.0
    for size in range(1, 4):
        subsets = list(itertools.combinations(range(2, 5), size))
        for hidden in subsets:
            given = ids.clone()
            given[list(hidden)] = MASK
            logs = toy(given[None]).logits[0].log_softmax(-1)
            chosen = sum(float(logs[at, ids[at]]) for at in hidden)
            bound += 3 / size * chosen / len(subsets) / 3
    made = Likelihood(toy, MASK, torch.device("cpu"), mc_num=20_000, batch_size=5_000)
    assert made.score(context, target) == pytest.approx(bound, rel=0.02)


def test_scores_depend_on_neither_batch_nor_order(folder: str) -> None:
    pairs = [(PROMPTS[0], " just is time;"), (PROMPTS[1], " early"), ("", " In the")]
    one = load(folder, mc_num=6).loglikelihood(scoring(*pairs))
    other = load(folder, mc_num=6, batch_size=4).loglikelihood(scoring(*reversed(pairs)))
    for (score, greedy), (again, same) in zip(one, reversed(other), strict=True):
        assert score == pytest.approx(again, rel=1e-4)
        assert score < 0
        assert greedy is same
    reseeded = load(folder, mc_num=6, seed=1).loglikelihood(scoring(*pairs[:1]))
    assert reseeded[0][0] != one[0][0]


def test_one_token_needs_one_mask() -> None:
    toy = Toy()
    found = Likelihood(toy, MASK, torch.device("cpu"), mc_num=50).score([1, 2], [4])
    assert toy.rows == 1
    logs = toy(torch.tensor([[1, 2, MASK]])).logits[0, 2].log_softmax(-1)
    assert found == pytest.approx(float(logs[4]))


def test_what_is_decoded_greedily_is_greedy(folder: str) -> None:
    lm = load(folder, mc_num=1, block_length=4)
    context = lm.tok_encode(PROMPTS[0])
    (tokens,) = lm._decoder.decode([context], Request(4, (), 0.0, 1, None))
    assert lm._likelihood.is_greedy(context, tokens)
    assert not lm._likelihood.is_greedy(context, [*tokens[:3], (tokens[3] + 1) % 4096])
    plain = load(folder, mc_num=1, check_greedy=False)
    assert plain.loglikelihood(scoring((PROMPTS[0], " just")))[0][1] is False


def test_blocks_are_scored_given_clean_blocks_before_them() -> None:
    seen: list[Tensor] = []
    toy = Toy()

    def call(ids: Tensor) -> Any:
        seen.append(ids)
        return toy(ids)

    made = Likelihood(call, MASK, torch.device("cpu"), mc_num=4, batch_size=4, block_length=2)
    made.score([1], [4, 5, 6])
    assert [ids.shape[1] for ids in seen] == [2, 4]
    assert (seen[1][:, :2] == torch.tensor([1, 4])).all()


def test_rolling_likelihood_adds_up_windows(folder: str) -> None:
    lm = load(folder, mc_num=4, max_length=8)
    text = Instance("loglikelihood_rolling", {}, (PROMPTS[1],), 0, ("task", 0, 1))
    (found,) = lm.loglikelihood_rolling([text], disable_tqdm=True)
    tokens = lm.tok_encode(PROMPTS[1])
    first = lm._likelihood.score([1], tokens[:8])
    assert found < first < 0


def test_sizes_of_masks_cover_their_range() -> None:
    masks, sizes = random_masks(10, 40, torch.Generator().manual_seed(0))
    assert masks.sum(dim=1).tolist() == sizes.tolist()
    assert sizes.unique().tolist() == list(range(1, 11))


# Block diffusion


def test_blocks_decode_as_the_dense_model_for_prompts_of_any_length() -> None:
    """BatchGenerator against the model on whole sequences, where a prompt ends inside a block."""
    blocks = decoder("qwen3", num_hidden_layers=2).eval()
    prompts = [[3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8], [6]]
    request = Request(14, (), 0.0, 1, None)
    dense = Decoder(
        dense_call(blocks, blocks, block_length=8, shift=False),
        BLOCK_MASK, 0, None, 8, torch.device("cpu"), align=True,
    )  # fmt: skip
    expected = [dense.decode([prompt], request)[0] for prompt in prompts]
    config = FocusConfig(
        policy="block-diffusion", mask_token_id=BLOCK_MASK, block_length=8, lowering="eager"
    )
    queue = BlockQueue(blocks, config, {}, BLOCK_MASK, None, 2)
    found = dict(queue.decode(prompts, [request] * 3, [[]] * 3))
    assert [found[at] for at in range(3)] == expected
    assert queue.work.responses == 3
    with pytest.raises(OptionError, match="temperature above 0"):
        list(queue.decode(prompts, [Request(8, (), 0.5, 1, None)] * 3, [[]] * 3))


# Arguments


def test_arguments_are_told_apart() -> None:
    given = {"mc_num": 4, "keep_ratio": 0.25, "dtype": "float32", "attn_implementation": "sdpa"}
    settings, options, others = split_arguments(given, {"dtype"})
    assert settings == LMSettings(mc_num=4)
    assert options == {"keep_ratio": 0.25}
    assert others == {"dtype": "float32", "attn_implementation": "sdpa"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_ration": 0.5}, "did you mean 'keep_ratio'"),
        ({"backend": "fokus"}, "did you mean 'focus'"),
        ({"padding": "right"}, "padding"),
        ({"mc_num": 0}, "mc_num=0"),
        ({"gen_length": 0}, "gen_length=0"),
        ({"threshold": 2}, "threshold=2"),
        ({"keep_ratio": 2}, "keep_ratio=2"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"block_diffusion": True, "policy": "dual-cache"}, "block diffusion"),
    ],
)
def test_bad_arguments_say_what_was_expected(
    folder: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        load(folder, **arguments)


def test_lm_evals_own_command_line_finds_the_tasks() -> None:
    found = with_tasks(["run", "--tasks", "focus_retrieval"])
    assert Path(found[-1], "focus_retrieval.yaml").is_file()
    assert with_tasks(["run", "--include_path", "x"]) == ["run", "--include_path", "x"]


# The task, and the comparison


@pytest.mark.long
@pytest.mark.parametrize("name", ["tiny", "tiny-block"])
def test_documents_are_questions_of_their_length(name: str) -> None:
    given = {"max_seq_lengths": [512], "num_samples": 2, "pretrained": name}
    made = [retrieval_task.needle(**given)["test"], retrieval_task.table(**given)["test"]]
    tokenizer = demo.load_tokenizer({"tiny": "masked", "tiny-block": "block"}[name])
    for document in itertools.chain(*made):
        tokens = len(tokenizer(document["input"])["input_ids"])
        assert 512 - 64 - 16 < tokens <= 512 - 64
        assert name == "tiny" or tokens % 32 == 0
        answer = " ".join(document["outputs"])
        assert retrieval_task.process_results(document, [answer]) == {"right": 1.0, "512": 1.0}
        part = retrieval_task.process_results(document, [document["outputs"][0]])
        assert part["right"] == 0.25
    assert made[0].to_list() == retrieval_task.needle(**given)["test"].to_list()
    with pytest.raises(OptionError, match="max_seq_lengths"):
        retrieval_task.needle(max_seq_lengths=[100])


def test_scores_of_one_length_leave_out_the_others() -> None:
    assert retrieval_task.mean_of_length([1.0, -1.0, 0.5]) == 0.75
    assert math.isclose(retrieval_task.mean_of_length([-1.0]), retrieval_task.ABSENT)


@pytest.mark.long
def test_the_bundled_model_is_scored_by_the_command(tmp_path: Path) -> None:
    """All the way through lm-eval, with the real model: it finds every value through focus."""
    file = tmp_path / "eval.json"
    options = "--backend focus -o lowering=eager -o tokens_per_step=16 --length 512 --examples 1"
    result = CliRunner().invoke(
        app, ["eval", *options.split(), "-t", "focus_table", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert "1.000" in result.output
    focus = json.loads(file.read_text())["backends"]["focus"]
    scores = {entry["metric"]: entry["value"] for entry in focus["scores"]}
    assert scores == {"right": 1.0, "512": 1.0}
    assert focus["work"]["model_calls"] <= 4
    assert 0 < focus["work"]["rows"] < 4 * 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks focus_retreival", "did you mean 'focus_retrieval'"),
        ("--backend fokus", "did you mean 'focus'"),
        ("-o keep_ratio", "expected NAME=VALUE"),
        ("-o buckets=[8,", "expected a list"),
        ("--include-path no/such/folder", "no such folder"),
        ("--json no/such/folder/x.json", "not a file in an existing folder"),
    ],
)
def test_errors_of_the_command_are_one_line(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compare.TaskManager
    monkeypatch.setattr(
        compare, "TaskManager", lambda **given: made(**given | {"include_defaults": False})
    )
    result = CliRunner().invoke(app, ["eval", *arguments.split()])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_work_of_processes_side_by_side() -> None:
    found = Work.side_by_side([Work(1, 2, 3, 4, 5.0, 1.0), Work(1, 2, 3, 4, 6.0, 2.0)])
    assert found == Work(2, 4, 6, 8, 6.0, 2.0)


@pytest.mark.long
def test_two_processes_share_the_documents(folder: str, tmp_path: Path) -> None:
    """On the CPU, as accelerate launches them; two do not divide the number of documents."""
    common = [
        "--backend", "eager", "-o", "block_length=32", "-o", "dtype=float32", "-t", "focus_table",
        "-o", "tokens_per_step=32", "--length", "512", "--examples", "3", "--batch-size", "1",
    ]  # fmt: skip
    file = tmp_path / "eval.json"
    launch = "torch.distributed.run --standalone --nproc_per_node 2 -m focus_compile"
    done = subprocess.run(
        [sys.executable, "-m", *launch.split(), "eval", folder, *common, "--json", str(file)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    both = json.loads(file.read_text())
    assert both["settings"]["processes"] == 2
    work = both["backends"]["eager"]["work"]
    assert (work["responses"], work["model_calls"]) == (4, 8)  # the third document, padded to four
    assert done.stdout.count("model calls") == 1
