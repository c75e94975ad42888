"""Two-operand einsum becomes a matmul where it is one, with torch.einsum as the judge."""

from __future__ import annotations

import pytest
import torch

from focus_compile.passes.einsum import einsum_as_matmul
from tests.graphs import aten_graph, op_names

SIZES = dict(zip("bhqkd", (2, 3, 5, 4, 6), strict=True))
PRODUCTS = [
    "bhqd,bhkd->bhqk", "bqhd,bkhd->bhqk", "bhqk,bhkd->bhqd", "bhqk,bkhd->bqhd", "qd,dk->qk",
    "qd,kd->kq", "b h q d, b h k d -> b h q k", "dq,dk->qk",
]  # fmt: skip
OTHERS = [
    "bqd,dk->bqk", "bhqd,bhkd->bqk", "bqd,bqd->bq", "bd,d->b", "bq,hk->bhqk", "...qd,...kd->...qk",
    "qq,qk->qk", "bhqd,bkd->bhqk",
]  # fmt: skip


def operands(equation: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    terms = equation.replace(" ", "").replace("...", "b").split("->")[0].split(",")
    return [torch.randn([SIZES[x] for x in term], generator=generator) for term in terms]


@pytest.mark.parametrize("equation", PRODUCTS + OTHERS)
def test_equals_torch_einsum(equation: str) -> None:
    given = operands(equation)
    torch.testing.assert_close(einsum_as_matmul(equation, given), torch.einsum(equation, *given))


def test_three_operands_are_left_to_torch() -> None:
    given = operands("qd,dk,kb->qb")
    result = einsum_as_matmul("qd,dk,kb->qb", given)
    torch.testing.assert_close(result, torch.einsum("qd,dk,kb->qb", *given))


@pytest.mark.parametrize("equation", ["bhqd,bhkd->bhqk", "bqhd,bkhd->bhqk"])
def test_attention_scores_are_captured_as_one_matmul(equation: str) -> None:
    captured, _ = aten_graph(lambda a, b: torch.einsum(equation, a, b), *operands(equation))
    names = op_names(captured.graph_module)
    assert names.count("matmul.default") == 1
    assert not any("einsum" in name or "bmm" in name for name in names)
