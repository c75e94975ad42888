"""SGLang's `FocusEvict`: batches of some rows everywhere, and SGLang's own engine where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from focus_compile import demo
from focus_compile.block_diffusion.state import COMMIT, DECODE, IDLE, BlockState
from focus_compile.demo import retrieval
from focus_compile.errors import FocusError
from focus_compile.integrations import sglang as integration
from focus_compile.integrations.sglang.rows import BlockBatch

MASK, BLOCK, REQUESTS = 9, 4, 3
ROOT = Path(__file__).parents[2]
ENGINE = Path(__file__).parent / "sglang_engine.py"
CONFIG = """from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    model_type = "sdar"
    rope_theta = 100000.0
    rope_scaling = None
"""
needs_sglang = pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed")


def batch() -> tuple[Any, Any]:
    """Blocks at 4, 8 and 0 of the requests 2, 0 and 1, as SGLang hands them over."""
    begins = torch.tensor([4, 8, 0])
    slots = torch.arange(REQUESTS * 16).view(REQUESTS, 16).flip(1).to(torch.int32)
    requests = torch.tensor([2, 0, 1])
    columns = begins[:, None] + torch.arange(BLOCK)
    ids = torch.tensor([[1, 2, MASK, MASK], [MASK] * 4, [5, 6, 7, 8]])
    made = SimpleNamespace(
        batch_size=3,
        input_ids=ids.flatten(),
        positions=columns.flatten().to(torch.int32),
        out_cache_loc=slots[requests[:, None], columns].flatten().long(),
        req_pool_indices=requests,
        seq_lens=begins + BLOCK,
        extend_seq_lens=torch.full((3,), BLOCK, dtype=torch.int32),
        extend_prefix_lens=begins.to(torch.int32),
        extend_start_loc=torch.tensor([0, 4, 8], dtype=torch.int32),
    )
    runner = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=slots))
    return made, runner


def test_a_batch_of_some_rows() -> None:
    given, runner = batch()
    slots = runner.req_to_token_pool.req_to_token
    before = slots.clone()
    tokens = given.input_ids.view(3, BLOCK)
    block = BlockBatch(given, runner, tokens)
    state = BlockState.allocate(3, BLOCK, 12, MASK, tokens.device)
    state.enter(tokens, 0)
    state.begin.copy_(block.begin)
    state.phase.copy_(torch.tensor([DECODE, IDLE, COMMIT]))
    state.uncached[0] = torch.tensor([False, True, True, False])
    listing = state.listing(6, everything=False, commit_all=True)
    with block:
        made = block.of(state, listing)
        assert made.batch_size == 2
        assert made.input_ids.tolist() == [2, MASK, 5, 6, 7, 8]
        assert made.positions.tolist() == [5, 6, 0, 1, 2, 3]
        assert made.positions.dtype == given.positions.dtype
        assert made.req_pool_indices.tolist() == [2, 1]
        assert made.seq_lens.tolist() == [8, 4]
        assert made.extend_seq_lens.tolist() == made.extend_seq_lens_cpu == [2, 4]
        assert made.extend_prefix_lens.tolist() == made.extend_prefix_lens_cpu == [6, 0]
        assert made.extend_start_loc.tolist() == [0, 2]
        assert made.extend_num_tokens == 6
        # The last slots of a sequence are those of its rows, and no slot is lost.
        assert slots[2, 6:8].tolist() == made.out_cache_loc[:2].tolist()
        assert slots[2, 6:8].tolist() == before[2, 5:7].tolist()
        assert sorted(slots[2].tolist()) == sorted(before[2].tolist())
        assert torch.equal(slots[0], before[0])
        # Rows leave: what lies behind the last one is not seen.
        state.uncached[0] = torch.tensor([False, True, True, True])
        narrow, _ = state.narrowed(listing, torch.tensor([True, False] + [True] * 4), 5)
        block.put(made, state, narrow)
        assert made.seq_lens.tolist() == [6, 4]
        assert made.extend_prefix_lens.tolist() == [5, 0]
        assert slots[2, 5] == made.out_cache_loc[0] == before[2, 5]
    assert torch.equal(slots, before)


def test_sglang_finds_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "sglang.srt.plugins"
    [(name, value)] = project["entry-points"][group].items()
    assert EntryPoint(name, value, group).load() is integration.register


@pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang is installed")
def test_without_sglang() -> None:
    with pytest.raises(FocusError, match=r"pip install sglang==.*BatchGenerator"):
        integration.register()


@pytest.fixture(scope="module")
def sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled block model in the form of SDAR, which has its shape."""
    folder, source = tmp_path_factory.mktemp("sdar"), demo.model_path("block")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    for name in ("rope_parameters", "layer_types"):
        del config[name]
    config |= {"architectures": ["SDARForCausalLM"], "model_type": "sdar"}
    config |= {"auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"}}
    config |= {"tie_word_embeddings": False, "rope_theta": 100000.0, "block_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_sdar.py").write_text(CONFIG)
    return folder


def served(folder: Path, prompts: list[list[int]], **arguments: Any) -> subprocess.CompletedProcess:
    """What SGLang's engine answers, in processes of its own, on the CPU."""
    work = folder / "work.json"
    work.write_text(json.dumps({"prompts": prompts, "arguments": arguments}))
    return subprocess.run(
        [sys.executable, str(ENGINE), str(folder), str(work)],
        capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@needs_sglang
@pytest.mark.long
@pytest.mark.parametrize("first_done_first_out", [True, False])
def test_sglang_decodes_what_the_generator_does(sdar: Path, first_done_first_out: bool) -> None:
    from focus_compile.decode import BatchGenerator

    model, tokenizer = demo.load("block")
    generator = BatchGenerator(
        model, block_length=32, max_length=320, max_batch=4, eos_token_id=2, lowering="eager"
    )
    asked = [retrieval.make(tokenizer, 224, seed=seed, model="block") for seed in range(4)]
    prompts = [list(question.prompt_ids)[seed:] for seed, question in enumerate(asked)]
    for prompt in prompts:
        generator.submit(prompt, max_new_tokens=64)
    expected = {done.request: list(done.tokens) for done in generator.results()}
    assert any(step.kept < step.listed for step in generator.history)
    done = served(sdar, prompts, disable_cuda_graph=True, dllm_fdfo=first_done_first_out)
    answers = json.loads((sdar / "answers.json").read_text())
    assert len(answers) == 4, done.stderr[-2000:]
    for request, tokens in enumerate(answers):
        ended = tokens.index(2) if 2 in tokens else len(tokens)
        assert tokens[:ended] == expected[request]


@needs_sglang
@pytest.mark.long
def test_what_a_step_cannot_run_under(sdar: Path) -> None:
    refused = served(sdar, [[5, 6]])
    assert refused.returncode != 0
    assert "pass --disable-cuda-graph" in refused.stderr
