"""On a CUDA device: the same programs through Inductor's Triton code, and every op.

pytest -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile import demo
from focus_compile.decode.sampler import generate
from focus_compile.demo import retrieval
from tests.compiled import compiled, run_call
from tests.kernels.test_library import PUBLIC, arguments, as_list
from tests.models import build
from tests.models.network import logits_of
from tests.models.spec import ModelSpec
from tests.oracle import Oracle

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
RETRIEVAL_TOKENS = 1024


def moved(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("masked", [True, False])
def test_op_equals_its_cpu_result(name: str, masked: bool) -> None:
    """One implementation serves both devices until a kernel takes its place."""
    given = arguments(name, masked=masked)
    expected = as_list(PUBLIC[name](*given))
    found = as_list(PUBLIC[name](*map(moved, given)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["focus-dllm", "dual-cache", "prefix-cache"])
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_steps_follow_the_oracle(policy: str, lowering: str) -> None:
    """float32 on the device against the oracle on the CPU."""
    model = build(ModelSpec(layers=4, heads=4, kv_heads=2), 3)
    settings = {
        "policy": policy, "block_length": 8, "key_block": 4, "window": 3, "expansion": 2,
        "sink_tokens": 2, "mask_token_id": 39,
    }  # fmt: skip
    oracle = Oracle(model, **settings)
    focus = compiled(copy.deepcopy(model).to(DEVICE), lowering=lowering, **settings)
    ids = torch.randint(1, 38, (2, 48), generator=torch.Generator().manual_seed(0))
    ids[:, 32:] = 39
    programs = []
    for step in range(10):
        expected = oracle.call(ids)
        logits, record = run_call(focus, ids.to(DEVICE))
        programs.append(record.program)
        assert record.program == expected.program
        if expected.margin < 1e-3:
            break
        torch.testing.assert_close(logits.cpu(), expected.logits, rtol=2e-3, atol=2e-3)
        ids = ids.clone()
        ids[:, 32 + step] = 5
    assert "step" in programs


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    model, tokenizer = demo.load()
    return model.to(DEVICE), tokenizer


def test_bundled_model_answers_as_dense(bundled: tuple[Any, Any]) -> None:
    """bf16, the paper's settings: the same values as dense, and few compilations."""
    model, tokenizer = bundled
    focus = compiled(model, lowering="inductor")
    right = {"dense": 0, "focus": 0}
    with focus_compile.record() as history:
        for seed in range(4):
            example = retrieval.make(tokenizer, RETRIEVAL_TOKENS, seed=seed)
            prompt = torch.tensor([example.prompt_ids], device=DEVICE)
            for name, arm in (("dense", model), ("focus", focus)):
                ids = generate(arm, prompt, gen_length=64, block_length=32).ids
                text = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
                right[name] += sum(example.marks(text))
    assert right["focus"] >= right["dense"] - 1, right
    assert sum(record.compile_seconds > 0 for record in history) <= 4
    assert {record.program for record in history} == {"refresh", "step"}


def test_everything_kept_equals_dense(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    wide = copy.deepcopy(model).float()
    focus = compiled(wide, lowering="inductor", keep_ratio=1.0, window=1 << 20)
    example = retrieval.make(tokenizer, 512, seed=1)
    ids = torch.tensor([[*example.prompt_ids, *[3] * 64]], device=DEVICE)
    for step in range(6):
        logits, record = run_call(focus, ids)
        with torch.no_grad():
            dense = logits_of(wide(ids))
        assert record.program == ("refresh" if step == 0 else "step")
        torch.testing.assert_close(logits, dense, rtol=5e-3, atol=5e-3)
        ids = ids.clone()
        ids[0, 448 + step] = 9


def test_a_model_moved_between_devices_starts_anew() -> None:
    model = build(ModelSpec(), 0)
    focus = compiled(model, mask_token_id=39, block_length=8)
    ids = torch.full((1, 16), 39)
    ids[0, :8] = torch.arange(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, _ = run_call(focus, ids)
        model.to(DEVICE)
        second, record = run_call(focus, ids.to(DEVICE))
    assert record.program == "refresh"
    torch.testing.assert_close(second.cpu(), first, rtol=1e-3, atol=1e-3)


SETTLES = """
import torch
from focus_compile.kernels.attention import kernel

q = torch.randn(1, 2, 1024, 64, device="cuda", dtype=torch.bfloat16)
if {first}:
    kernel.attention(q, q, q, None, 0.125)
torch.nn.functional.scaled_dot_product_attention(q, q, q)
print(torch._C._get_sdp_priority_order())
"""


def test_other_attention_keeps_torchs_order_of_backends() -> None:
    """Though ours is the process's first."""
    orders = [
        subprocess.run(
            [sys.executable, "-c", SETTLES.format(first=first)],
            check=True, capture_output=True, text=True, timeout=300,
        ).stdout
        for first in (False, True)
    ]  # fmt: skip
    assert orders[0] == orders[1]
