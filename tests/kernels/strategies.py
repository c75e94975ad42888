"""Random inputs for the kernel tests, and the error bounds they are held to."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

fuzzed = settings(deadline=None, max_examples=40)

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "heads-inside", "window", "every-other")
MASKS = ("none", "bool", "float")


@dataclass(frozen=True)
class Problem:
    """Queries q [B, H, R, d] against caches k, v [B, Hkv, T, d]; weight [B, R] of the rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    weight: Tensor
    scale: float

    def double(self) -> "Problem":
        """The same numbers in float64."""
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.double()
        return replace(self, q=self.q.double(), k=self.k.double(), v=self.v.double(), mask=mask)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values under other strides; what lies between them is NaN."""
    batch, heads, length, width = tensor.shape
    if layout == "heads-inside":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "window":
        room = tensor.new_full((batch, heads, length + 3, width + 8), torch.nan)
        view = room[:, :, 2 : length + 2, :width]
    elif layout == "every-other":
        view = tensor.new_full((batch, heads, length, 2 * width), torch.nan)[..., ::2]
    else:
        return tensor.contiguous()
    view.copy_(tensor)
    return view


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    masks: tuple[str, ...] = MASKS,
    max_length: int = 70,
) -> Problem:
    """Problems with 1 to 4 query heads a kv head, repeated rows, odd strides and masks."""
    dtype = draw(st.sampled_from(dtypes))
    batch, kv_heads, group = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 4)),
    )
    rows, length = draw(st.integers(1, 9)), draw(st.integers(1, max_length))
    width = draw(st.sampled_from((8, 16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(heads: int, count: int) -> Tensor:
        return torch.randn((batch, heads, count, width), generator=generator).to(dtype)

    q, k, v = normal(kv_heads * group, rows), normal(kv_heads, length), normal(kv_heads, length)
    if draw(st.booleans()):
        q = q[:, :, torch.randint(rows, (rows,), generator=generator)]
    return Problem(
        q=lay_out(q, draw(st.sampled_from(LAYOUTS))),
        k=lay_out(k, draw(st.sampled_from(LAYOUTS))),
        v=lay_out(v, draw(st.sampled_from(LAYOUTS))),
        mask=_mask(draw, masks, (batch, kv_heads * group, rows, length), dtype, generator),
        weight=torch.randint(3, (batch, rows), generator=generator).float(),
        scale=draw(st.sampled_from((width**-0.5, 1.0, 0.05))),
    )


def _mask(
    draw: st.DrawFn,
    kinds: tuple[str, ...],
    full: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor | None:
    """None, or a mask that broadcasts to `full`, hiding from nothing to everything."""
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return None
    axes = draw(st.integers(1, 4))
    shape = tuple(size if draw(st.booleans()) else 1 for size in full)[-axes:]
    shown = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.3, 0.9, 1.0)))
    if kind == "bool":
        return shown
    bias = torch.randn(shape, generator=generator).to(draw(st.sampled_from((dtype, torch.float32))))
    return bias.masked_fill(~shown, -torch.inf)


@st.composite
def key_sets(draw: st.DrawFn, problem: Problem) -> tuple[Tensor, Tensor, Tensor, int]:
    """(blocks [B, NB], sinks [B, any], candidates [B], key_block): any subset of any prompt.

    Blocks may be unordered; sinks may repeat, lie in blocks or in the tail, with padding between.
    """
    batch, length = problem.k.shape[0], problem.k.shape[2]
    key_block = draw(st.integers(1, 12))
    total = length // key_block
    candidates = draw(st.lists(st.integers(0, total), min_size=batch, max_size=batch))
    count = draw(st.integers(0, 5))
    blocks = torch.full((batch, total), -1)
    sinks = torch.full((batch, count), -1)
    for b, limit in enumerate(candidates):
        kept = draw(st.permutations(range(limit)))[: draw(st.integers(0, limit))]
        blocks[b, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        for place in range(count):
            sinks[b, place] = draw(st.integers(-1, length - 1))
    return blocks, sinks, torch.tensor(candidates), key_block


def plain_attention(problem: Problem, allowed: Tensor | None = None) -> Tensor:
    """Torch's attention with K and V repeated for every query head; `allowed` [B, T] hides keys."""
    group = problem.q.shape[1] // problem.k.shape[1]
    mask = problem.mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if allowed is not None:
        hidden = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)[:, None, None]
        mask = hidden if mask is None else mask + hidden
    if mask is not None:
        full = (*problem.q.shape[:3], problem.k.shape[2])
        mask = mask.to(problem.q.dtype).expand(full).contiguous()
    return F.scaled_dot_product_attention(
        problem.q.contiguous(),
        problem.k.repeat_interleave(group, 1),
        problem.v.repeat_interleave(group, 1),
        attn_mask=mask,
        scale=problem.scale,
    )


def assert_as_accurate(actual: Tensor, exact: Tensor, plain: Tensor, values: Tensor) -> None:
    """`actual` errs from the float64 `exact` hardly more than `plain`, torch's own in that dtype.

    Allowed: three times the error of `plain`, and the rounding of one result as large as `values`.
    """
    assert actual.dtype == plain.dtype
    assert actual.shape == exact.shape
    assert not actual.isnan().any()
    if actual.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps * float(values.abs().max())
    allowed = 3 * float((plain.double() - exact).abs().max()) + rounding
    assert float((actual.double() - exact).abs().max()) <= allowed


def assert_highest(chosen: Tensor, scores: Tensor, count: int, tolerance: float) -> None:
    """`chosen` [N]: the indices of the `count` highest of float64 `scores`, ascending, then -1.

    Two scores nearer than `tolerance` may stand in either order.
    """
    ids = chosen[chosen >= 0]
    assert ids.shape[0] == min(count, scores.shape[0])
    assert torch.equal(chosen[: ids.shape[0]], ids.unique())
    assert (chosen[ids.shape[0] :] == -1).all()
    left_out = torch.ones(scores.shape[0], dtype=torch.bool)
    left_out[ids] = False
    if ids.shape[0] and left_out.any():
        assert float(scores[ids].min()) >= float(scores[left_out].max()) - tolerance
