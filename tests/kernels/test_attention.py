"""The attention ops: fast against reference, that against the written-out sum, masks and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focus_compile.kernels.attention import cpu, reference
from focus_compile.kernels.attention.op import attention, attention_with_lse
from tests.kernels.strategies import Problem, assert_as_accurate, fuzzed, plain_attention, problems


def run(problem: Problem) -> torch.Tensor:
    return attention(problem.q, problem.k, problem.v, problem.mask, problem.scale)


def exact(problem: Problem) -> torch.Tensor:
    twin = problem.double()
    return reference.attention(twin.q, twin.k, twin.v, twin.mask, twin.scale)


@fuzzed
@given(problems())
def test_is_as_accurate_as_plain_attention(problem: Problem) -> None:
    out = run(problem)
    assert out.is_contiguous()
    assert_as_accurate(out, exact(problem), plain_attention(problem), problem.v)


@fuzzed
@given(problems(masks=("none", "bool")))
def test_reference_is_the_written_out_sum(problem: Problem) -> None:
    twin = problem.double()
    heads, kv_heads = twin.q.shape[1], twin.k.shape[1]
    of_head = torch.arange(heads) // (heads // kv_heads)
    weights = torch.einsum("bhrd,bhtd->bhrt", twin.q * twin.scale, twin.k[:, of_head]).exp()
    if twin.mask is not None:
        weights = weights * twin.mask
    norm = weights.sum(-1, keepdim=True)
    written_out = torch.einsum("bhrt,bhtd->bhrd", weights, twin.v[:, of_head]) / norm
    expected = torch.where(norm == 0, 0.0, written_out)
    torch.testing.assert_close(exact(problem), expected, rtol=1e-11, atol=1e-11)


@fuzzed
@given(problems(), st.data())
def test_rows_are_independent(problem: Problem, data: st.DataObject) -> None:
    """Each row, computed alone, agrees with all computed together, repeated or not."""
    row = data.draw(st.integers(0, problem.q.shape[2] - 1))
    mask = problem.mask
    if mask is not None and mask.dim() >= 2 and mask.shape[-2] > 1:
        mask = mask[..., row : row + 1, :]
    alone = Problem(
        problem.q[:, :, row : row + 1], problem.k, problem.v, mask, problem.weight, problem.scale
    )
    together = run(problem)[:, :, row : row + 1]
    assert_as_accurate(together, exact(alone), plain_attention(alone), problem.v)


@pytest.mark.parametrize("shape", [(1, 1, 1, 9), (1, 1, 5, 9), (2, 4, 5, 9), (9,), (5, 1), (1, 1)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_keys_gives_zeros(
    shape: tuple[int, ...], kind: torch.dtype, dtype: torch.dtype
) -> None:
    q, k = torch.randn(2, 4, 5, 8, dtype=dtype), torch.randn(2, 2, 9, 8, dtype=dtype)
    hidden = torch.full(shape, -torch.inf, dtype=kind)
    if kind == torch.bool:
        hidden = torch.zeros(shape, dtype=kind)
    assert torch.equal(attention(q, k, k, hidden, 0.3), torch.zeros_like(q))
    assert torch.equal(reference.attention(q, k, k, hidden, 0.3), torch.zeros_like(q))


def test_no_rows() -> None:
    q, k = torch.randn(2, 4, 0, 8), torch.randn(2, 2, 9, 8)
    assert attention(q, k, k, None, 1.0).shape == (2, 4, 0, 8)
    assert attention_with_lse(q, k, k, None, 1.0)[1].shape == (2, 4, 0)


@fuzzed
@given(problems(dtypes=(torch.float32, torch.bfloat16, torch.float64)))
def test_lse_is_the_logarithm_of_the_normaliser(problem: Problem) -> None:
    out, lse = attention_with_lse(problem.q, problem.k, problem.v, problem.mask, problem.scale)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert_as_accurate(out, exact(problem), plain_attention(problem), problem.v)
    torch.testing.assert_close(lse, normaliser(problem).float(), rtol=1e-5, atol=1e-5)
    twin = problem.double()
    _, slow = reference.attention_with_lse(twin.q, twin.k, twin.v, twin.mask, twin.scale)
    torch.testing.assert_close(slow, normaliser(problem).float())


def normaliser(problem: Problem) -> torch.Tensor:
    """log of the sum of exp of the masked logits, in float64, [B, H, R]."""
    twin = problem.double()
    of_head = torch.arange(twin.q.shape[1]) // (twin.q.shape[1] // twin.k.shape[1])
    logits = torch.einsum("bhrd,bhtd->bhrt", twin.q * twin.scale, twin.k[:, of_head])
    if twin.mask is not None and twin.mask.dtype == torch.bool:
        return (logits.exp() * twin.mask).sum(-1).log()
    return (logits + (0 if twin.mask is None else twin.mask)).exp().sum(-1).log()


def test_lse_makes_few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 2, 7, 8), torch.randn(1, 1, 50, 8)
    whole = cpu.attention_with_lse(q, k, k, None, 0.3)[1]
    monkeypatch.setattr(cpu, "LOGIT_BYTES", 3 * 50 * 4)
    torch.testing.assert_close(cpu.attention_with_lse(q, k, k, None, 0.3)[1], whole)


def test_large_logits_do_not_overflow() -> None:
    q, k = 200 * torch.randn(1, 2, 3, 16), 200 * torch.randn(1, 1, 40, 16)
    problem = Problem(q, k, torch.randn(1, 1, 40, 16), None, torch.ones(1, 3), 1.0)
    assert_as_accurate(run(problem), exact(problem), plain_attention(problem), problem.v)


@pytest.mark.parametrize("rows", [32, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_cache(rows: int, dtype: torch.dtype) -> None:
    """Sizes at which torch's kernel splits queries and keys."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, rows, 64, dtype=dtype)
    k, v = torch.randn(2, 1, 2, 1111, 64, dtype=dtype)
    problem = Problem(q, k, v, None, torch.ones(1, rows), 0.125)
    assert_as_accurate(run(problem), exact(problem), plain_attention(problem), v)


def test_fast_path_is_the_cpu_file() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 9, 8)
    assert torch.equal(attention(q, k, k, None, 1.0), cpu.attention(q, k, k, None, 1.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 4, 5, 8)}, ValueError, "batch"),
        ({"q": torch.zeros(2, 4, 5, 6)}, ValueError, "head dimension"),
        ({"q": torch.zeros(2, 3, 5, 8)}, ValueError, "multiple of the kv heads"),
        ({"q": torch.zeros(2, 4, 8)}, ValueError, "4 axes"),
        ({"v": torch.zeros(2, 2, 7, 8)}, ValueError, "k and v"),
        ({"q": torch.zeros(2, 4, 5, 8).double()}, TypeError, "dtype"),
        ({"mask": torch.zeros(5, 7)}, ValueError, "broadcast"),
        ({"mask": torch.zeros(1, 1, 1, 5, 9)}, ValueError, "more than 4 axes"),
        ({"mask": torch.zeros(5, 9).long()}, TypeError, "bool or floating"),
    ],
)
def test_bad_input(change: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    good = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 9, 8),
        "v": torch.zeros(2, 2, 9, 8),
    }
    with pytest.raises(error, match=f"attention: .*{message}"):
        attention(**{"mask": None, **good, **change}, scale=1.0)
