"""`staleness` in Triton: one pass over the keys for what the readers read (the kernel of
`sink_capture`), and a program a head and some readers for how far the probes moved them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_compile.kernels.mask_view import mask_view
from focus_compile.kernels.sink_capture.kernel import (
    attention_received_and_given,
    base_2,
    bias,
)
from focus_compile.kernels.staleness.cpu import mask_at, mask_of, rows_of
from focus_compile.kernels.tiling import padded

_TILE_BYTES = 32 * 1024  # of a float32 tile of probes
_READERS = 32


def staleness(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    readers: Tensor,
    reader_weight: Tensor,
    left: Tensor,
    old_k: Tensor,
    new_k: Tensor,
    old_v: Tensor,
    new_v: Tensor,
    positions: Tensor,
    probe_weight: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    with torch.cuda.device_of(q):
        query, output = rows_of(q, readers), rows_of(out, readers)
        normaliser = rows_of(lse[..., None], readers)[..., 0]
        seen = mask_of(mask, q, readers)
        received, of_left = attention_received_and_given(
            query, k, normaliser, reader_weight, seen, left, scale
        )
        error = moved_by_probes(
            query, output, normaliser, reader_weight, of_left, old_k, new_k, old_v, new_v,
            probe_weight, mask_at(seen, positions), scale,
        )  # fmt: skip
        readings = reader_weight.sum(1, keepdim=True) * q.shape[1]
        tiny = torch.finfo(torch.float32).tiny
        return error, received.sum(1) / readings.clamp_min(tiny)


def moved_by_probes(
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    weight: Tensor,
    of_left: Tensor,
    old_k: Tensor,
    new_k: Tensor,
    old_v: Tensor,
    new_v: Tensor,
    probe_weight: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """|d|^2 and |o|^2 of `staleness`, [B, 2] float32.

    query [B, H, N, d], output [B, H, N, dv] and lse [B, H, N] of the readers; of_left [B, H, N]:
    attention that they give to the positions left; mask: None or broadcastable to [B, H, N, P].
    """
    batch, heads, readers, width = query.shape
    probes, value_width = old_v.shape[2:]
    channels, value_channels = padded(width), padded(value_width)
    tile = _TILE_BYTES // (4 * max(channels, value_channels))
    tile = max(16, min(tile, triton.next_power_of_2(probes)))
    tiles = triton.cdiv(readers, _READERS)
    error = torch.empty((batch, heads, tiles, 2), dtype=torch.float32, device=query.device)
    kind, viewed = mask_view(mask, query, probes)
    mask = query if viewed is None else viewed
    _moved_kernel[(tiles, heads, batch)](
        query, output, lse, weight, of_left, old_k, new_k, old_v, new_v, probe_weight, mask, error,
        readers, probes, scale * 1.4426950408889634,
        *query.stride(), *output.stride(), *lse.stride(), *weight.stride(), *of_left.stride(),
        *old_k.stride(), *new_k.stride(), *old_v.stride(), *new_v.stride(),
        *probe_weight.stride(), *mask.stride(),
        GROUP=heads // old_k.shape[1],
        WIDTH=width,
        VALUE_WIDTH=value_width,
        MASK=kind,
        D=channels,
        DV=value_channels,
        READERS=_READERS,
        PROBES=tile,
        num_warps=8 if max(channels, value_channels) >= 128 else 4,
    )  # fmt: skip
    return error.sum((1, 2))


@triton.jit
def _moved_kernel(
    q_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    left_ptr: tl.tensor,
    old_k_ptr: tl.tensor,
    new_k_ptr: tl.tensor,
    old_v_ptr: tl.tensor,
    new_v_ptr: tl.tensor,
    probe_weight_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    error_ptr: tl.tensor,
    readers: tl.tensor,
    probes: tl.tensor,
    scale: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    q_d: tl.tensor,
    out_b: tl.tensor,
    out_h: tl.tensor,
    out_n: tl.tensor,
    out_d: tl.tensor,
    lse_b: tl.tensor,
    lse_h: tl.tensor,
    lse_n: tl.tensor,
    weight_b: tl.tensor,
    weight_n: tl.tensor,
    left_b: tl.tensor,
    left_h: tl.tensor,
    left_n: tl.tensor,
    old_k_b: tl.tensor,
    old_k_h: tl.tensor,
    old_k_p: tl.tensor,
    old_k_d: tl.tensor,
    new_k_b: tl.tensor,
    new_k_h: tl.tensor,
    new_k_p: tl.tensor,
    new_k_d: tl.tensor,
    old_v_b: tl.tensor,
    old_v_h: tl.tensor,
    old_v_p: tl.tensor,
    old_v_d: tl.tensor,
    new_v_b: tl.tensor,
    new_v_h: tl.tensor,
    new_v_p: tl.tensor,
    new_v_d: tl.tensor,
    probe_b: tl.tensor,
    probe_p: tl.tensor,
    mask_b: tl.tensor,
    mask_h: tl.tensor,
    mask_n: tl.tensor,
    mask_p: tl.tensor,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    READERS: tl.constexpr,
    PROBES: tl.constexpr,
) -> None:
    """Some readers of one head, over all probes. Readers without keys, and those that pad the tile,
    have a log-sum-exp of +inf: their probabilities are 0."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // GROUP
    n = tl.program_id(0) * READERS + tl.arange(0, READERS)
    real = n < readers
    c, cv = tl.arange(0, D), tl.arange(0, DV)
    query = tl.load(
        q_ptr + b * q_b + head * q_h + n[:, None] * q_n + c[None, :] * q_d,
        mask=real[:, None] & (c < WIDTH)[None, :],
        other=0.0,
    )
    output = tl.load(
        out_ptr + b * out_b + head * out_h + n[:, None] * out_n + cv[None, :] * out_d,
        mask=real[:, None] & (cv < VALUE_WIDTH)[None, :],
        other=0.0,
    ).to(tl.float32)
    lse = tl.load(lse_ptr + b * lse_b + head * lse_h + n * lse_n, mask=real, other=float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), base_2(lse))
    weight = tl.load(weight_ptr + b * weight_b + n * weight_n, mask=real, other=0.0)
    of_left = tl.load(left_ptr + b * left_b + head * left_h + n * left_n, mask=real, other=0.0)
    old_k_ptr += b * old_k_b + kv_head * old_k_h
    new_k_ptr += b * new_k_b + kv_head * new_k_h
    old_v_ptr += b * old_v_b + kv_head * old_v_h
    new_v_ptr += b * new_v_b + kv_head * new_v_h
    mask_ptr += b * mask_b + head * mask_h

    moved = tl.zeros([READERS, DV], tl.float32)
    old_sum = tl.zeros([READERS], tl.float32)
    new_sum = tl.zeros([READERS], tl.float32)
    for start in range(0, probes, PROBES):
        p = start + tl.arange(0, PROBES)
        inside = p < probes
        added = tl.zeros([READERS, PROBES], tl.float32)
        if MASK != "none":
            places = n[:, None].to(tl.int64) * mask_n + p[None, :] * mask_p
            added = bias(mask_ptr + places, real[:, None] & inside[None, :], MASK)
        drawn = tl.load(probe_weight_ptr + b * probe_b + p * probe_p, mask=inside, other=0.0)
        old_place = p[:, None] * old_k_p + c[None, :] * old_k_d
        new_place = p[:, None] * new_k_p + c[None, :] * new_k_d
        key_inside = inside[:, None] & (c < WIDTH)[None, :]
        old_key = tl.load(old_k_ptr + old_place, mask=key_inside, other=0.0)
        new_key = tl.load(new_k_ptr + new_place, mask=key_inside, other=0.0)
        old = tl.dot(query, tl.trans(old_key), input_precision="tf32x3") * scale + added
        new = tl.dot(query, tl.trans(new_key), input_precision="tf32x3") * scale + added
        old = tl.exp2(old - lse[:, None]) * drawn[None, :]
        new = tl.exp2(new - lse[:, None]) * drawn[None, :]
        old_sum += tl.sum(old, 1)
        new_sum += tl.sum(new, 1)
        value_inside = inside[:, None] & (cv < VALUE_WIDTH)[None, :]
        old_place = p[:, None] * old_v_p + cv[None, :] * old_v_d
        new_place = p[:, None] * new_v_p + cv[None, :] * new_v_d
        old_value = tl.load(old_v_ptr + old_place, mask=value_inside, other=0.0).to(tl.float32)
        new_value = tl.load(new_v_ptr + new_place, mask=value_inside, other=0.0).to(tl.float32)
        moved += tl.dot(new, new_value, input_precision="tf32x3")
        moved -= tl.dot(old, old_value, input_precision="tf32x3")
    moved -= (new_sum - old_sum)[:, None] * output
    both = (old_sum + new_sum) / 2
    factor = tl.where(both > 0, of_left / tl.where(both > 0, both, 1.0), 0.0)
    moved = moved * factor[:, None]
    place = (
        error_ptr + ((b * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)) * 2
    )
    tl.store(place, tl.sum(tl.sum(moved * moved, 1) * weight, 0))
    tl.store(place + 1, tl.sum(tl.sum(output * output, 1) * weight, 0))
