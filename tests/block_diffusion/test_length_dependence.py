"""Models whose rows change when the sequence grows: finished blocks may not stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import focus_compile
from focus_compile.errors import RefusalError
from focus_compile.fallback import FocusWarning, forget
from tests.block_diffusion.test_dispatch import OPTIONS, B, best, call, decode, prompts
from tests.block_diffusion.tiny import decoder, generator
from tests.compiled import compiled


class Stretched(nn.Module):
    """Positions are scaled by the length of a sequence that is longer than some length."""

    def __init__(self, beyond: int = 0) -> None:
        super().__init__()
        self.inner = decoder("qwen2")
        self.beyond = beyond
        self.config: Any = self.inner.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        use_cache: bool = False,
    ) -> Any:
        length = input_ids.shape[1]
        if length > self.beyond:
            position_ids = position_ids * 16.0 / length
        return self.inner(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
        )


def test_a_loop_computes_all_rows_where_they_depend_on_the_length() -> None:
    forget()
    model = Stretched()
    focus = compiled(model, policy="block-diffusion", **OPTIONS)
    worst = 0.0

    def see(ids: Tensor, logits: Tensor) -> None:
        nonlocal worst
        error = (logits - call(model, ids))[:, -B:]
        worst = max(worst, float(error.abs().max()))

    with (
        pytest.warns(FocusWarning, match="depends on how long the sequence is") as warned,
        focus_compile.record() as history,
    ):
        decode(focus, prompts(1), 4, best(2), see)
    assert worst < 1e-4
    told = [str(item.message) for item in warned if "how long the sequence" in str(item.message)]
    assert len(told) == 1
    assert "apply_rotary_pos_emb" in told[0]
    programs = [record.program for record in history]
    assert programs.count("refresh") == 4  # every block
    assert programs.count("step") == 12


def test_a_model_of_one_length_keeps_its_blocks(recwarn: pytest.WarningsRecorder) -> None:
    focus = compiled(decoder("qwen2"), policy="delayed-cache", **OPTIONS)
    with focus_compile.record() as history:
        decode(focus, prompts(1), 4, best(2))
    assert [record.program for record in history].count("refresh") == 1
    assert not [w for w in recwarn if "how long" in str(w.message)]


@pytest.mark.parametrize("policy", ["focus-evict", "focus-dllm+evict"])
@pytest.mark.parametrize("beyond", [0, 3 * B])
def test_a_generator_refuses_before_it_decodes(policy: str, beyond: int) -> None:
    made = generator(Stretched(beyond), block_length=B, policy=policy)
    made.submit([1, 2, 3], 8)
    for _ in range(2):
        with pytest.raises(RefusalError, match="depend on how long the sequence is"):
            made.step()
    assert made.pending == 1
    with pytest.raises(RefusalError, match="differ from the model's own forward"):
        next(made.results())


def test_a_generator_compares_once() -> None:
    model = decoder("llama")
    made = generator(model, block_length=B)
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    hook = model.register_forward_hook(count)
    try:
        made.submit([1, 2, 3], 8)
        list(made.results())
        other = generator(made.model, block_length=B)
        other.submit([1, 2, 3], 8)
        list(other.results())
    finally:
        hook.remove()
    assert forwards == 1
