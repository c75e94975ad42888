"""diffusers' LLaDA2Pipeline and its scheduler, unmodified, over a compiled model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import focus_compile
from focus_compile.backend import focus
from focus_compile.fallback import FocusWarning, forget
from tests.block_diffusion.tiny import MASK, VOCAB, decoder

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)

B = 8
OPTIONS: dict[str, Any] = {"mask_token_id": MASK, "block_length": B, "dynamic": None}


@pytest.fixture(autouse=True, scope="module")
def shared_graphs() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOCUS_COMPILE_VERIFY", "0")
        yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_state() -> None:
    focus.reset()  # type: ignore[attr-defined]


class BlockModel(nn.Module):
    """A decoder that attends block-causally by itself, as LLaDA2's does: ids, a 2D mask of what is
    real, and positions [B, T] to `.logits`, in which the mask is never likely."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = decoder("qwen3", num_hidden_layers=2)
        self.register_buffer("bias", torch.zeros(VOCAB).index_fill(0, torch.tensor(MASK), -1e4))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        block = torch.arange(input_ids.shape[1], device=input_ids.device) // B
        sees = (block[:, None] >= block)[None, None] & attention_mask[:, None, None, :].bool()
        output = self.decoder(
            input_ids, attention_mask=sees, position_ids=position_ids, use_cache=False
        )
        output.logits = output.logits + self.bias
        return output


@cache
def model() -> BlockModel:
    return BlockModel().eval()


@cache
def focused(policy: str) -> Any:
    return focus_compile.compile(model(), policy=policy, lowering="eager", **OPTIONS)


def generate(
    model: Any, prompts: Tensor, response: int, steps: int = 4, **options: Any
) -> tuple[Tensor, list[Any]]:
    """(the pipeline's response, a record a model call)."""
    pipeline = diffusers.LLaDA2Pipeline(
        model=model, scheduler=diffusers.BlockRefinementScheduler(block_length=B), tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    with focus_compile.record() as history, torch.no_grad():
        found = pipeline(
            input_ids=prompts,
            gen_length=response,
            block_length=B,
            num_inference_steps=steps,
            mask_token_id=MASK,
            eos_token_id=None,
            eos_early_stop=False,
            output_type="seq",
            **options,
        )
    return found.sequences, history


def prompts(length: int = 2 * B, batch: int = 2) -> Tensor:
    return torch.randint(1, MASK, (batch, length), generator=torch.Generator().manual_seed(4))


LOOPS: dict[str, dict[str, Any]] = {
    "fixed": {"threshold": 1.0, "temperature": 0.0, "editing_threshold": None},
    "threshold": {"threshold": 0.5, "temperature": 0.0, "editing_threshold": None},
    "sampled": {
        "threshold": 0.6,
        "temperature": 0.8,
        "sampling_method": "multinomial",
        "editing_threshold": None,
    },
    "editing": {"threshold": 0.5, "editing_threshold": 0.3, "temperature": 0.0},
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("length", [2 * B, 2 * B + 3])
def test_whole_blocks_decode_as_dense(loop: str, length: int) -> None:
    """The exact policy for block-causal models: tokens are dense's, and a prefix is computed again
    only while torch learns that lengths, and then positions, change."""
    given, response = prompts(length), 5 * B - length
    found, history = generate(focused("block-diffusion"), given, response, **LOOPS[loop])
    expected, _ = generate(model(), given, response, **LOOPS[loop])
    assert torch.equal(found, expected)
    programs = [entry.program for entry in history]
    assert programs.count("refresh") <= 3
    assert programs.count("exact") == 0
    edits = [entry for entry in history if entry.why == "decided tokens changed"]
    assert bool(edits) == (loop == "editing")


@pytest.mark.parametrize("policy", ["delayed-cache", "focus-evict"])
@pytest.mark.parametrize("loop", LOOPS)
def test_caches_serve_the_pipeline(policy: str, loop: str) -> None:
    """Everything is decoded, from fewer rows than whole blocks have."""
    found, history = generate(focused(policy), prompts(), 3 * B, **LOOPS[loop])
    assert found.shape == (2, 3 * B)
    assert not (found == MASK).any()
    programs = [entry.program for entry in history]
    assert programs.count("refresh") <= 3
    assert programs.count("exact") == 0
    steps = [entry.rows for entry in history if entry.program == "step"]
    assert sum(steps) < 2 * B * len(steps)


def test_a_tail_that_is_not_real_runs_exactly_and_says_why() -> None:
    """A response that ends inside a block: the pipeline hides the rest of the last block."""
    forget()
    given = prompts()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, history = generate(focused("block-diffusion"), given, B + 3, **LOOPS["fixed"])
    expected, _ = generate(model(), given, B + 3, **LOOPS["fixed"])
    assert torch.equal(found, expected)
    assert [entry.program for entry in history][-4:] == ["exact"] * 4
    lines = [str(w.message) for w in said if w.category is FocusWarning]
    assert any("not block-causal" in line for line in lines)
