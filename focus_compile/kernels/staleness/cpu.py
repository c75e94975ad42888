"""`staleness` in plain torch, float32, on any device; some kv heads' probabilities at a time."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # of probabilities: 64 MiB in float32


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
    precise = torch.promote_types(q.dtype, torch.float32)
    group, batch = q.shape[1] // k.shape[1], q.shape[0]
    query = rows_of(q, readers).to(precise) * scale  # [B, H, N, d]
    output = rows_of(out, readers).to(precise)
    normaliser = rows_of(lse[..., None], readers).to(precise)
    normaliser = normaliser.masked_fill(normaliser == -torch.inf, torch.inf)
    seen = mask_of(mask, q, readers)
    weight = reader_weight.to(precise)[:, None, :, None]
    left = left.to(precise)[:, None, None, :]
    step = max(1, _CHUNK_ELEMENTS // max(1, k.shape[2] * group * readers.shape[1] * batch))
    error = torch.zeros(batch, 2, dtype=precise, device=q.device)
    received = torch.zeros(batch, k.shape[2], dtype=precise, device=q.device)
    for start in range(0, k.shape[1], step):
        kv, of_q = slice(start, start + step), slice(start * group, (start + step) * group)
        part = _Heads(query[:, of_q], normaliser[:, of_q], group)
        mask_of_part = _part(seen, of_q)
        share = part.probability(k[:, kv], mask_of_part)
        received += (share * weight).sum((1, 2))
        of_left = (share * left).sum(-1, keepdim=True)
        at_probes = mask_at(mask_of_part, positions)
        o, w = output[:, of_q], probe_weight.to(precise)[:, None, None, :]
        old = part.probability(old_k[:, kv], at_probes) * w
        new = part.probability(new_k[:, kv], at_probes) * w
        moved = part.mean(new, new_v[:, kv], o) - part.mean(old, old_v[:, kv], o)
        drawn = (old + new).sum(-1, keepdim=True) / 2
        moved = moved * torch.where(drawn > 0, of_left / drawn, 0.0)
        squares = (moved.square(), o.square())
        error += torch.stack([(values * weight).sum((1, 2, 3)) for values in squares], 1)
    readings = reader_weight.sum(1, keepdim=True).to(precise) * q.shape[1]
    tiny = torch.finfo(precise).tiny
    return error.float(), (received / readings.clamp_min(tiny)).float()


class _Heads:
    """Some query heads [B, h, N, d] (scaled), `group` to a kv head."""

    def __init__(self, query: Tensor, normaliser: Tensor, group: int) -> None:
        self.query, self.normaliser, self.group = query, normaliser, group

    def probability(self, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Of keys [B, hkv, P, d], [B, h, N, P]."""
        logits = self.query @ self._of_heads(keys).mT
        if mask is not None:
            if mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, -torch.inf)
            else:
                logits = logits + mask
        return (logits - self.normaliser).exp()

    def mean(self, share: Tensor, values: Tensor, output: Tensor) -> Tensor:
        """sum_j share_j (values_j - output), [B, h, N, dv]."""
        return share @ self._of_heads(values) - share.sum(-1, keepdim=True) * output

    def _of_heads(self, values: Tensor) -> Tensor:
        values = values.to(self.query.dtype)
        return values.repeat_interleave(self.group, 1) if self.group > 1 else values


def rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """values [B, H, R, w] at rows int64 [B, N], [B, H, N, w]."""
    batch, heads, _, width = values.shape
    return values.gather(2, rows[:, None, :, None].expand(batch, heads, -1, width))


def mask_of(mask: Tensor | None, q: Tensor, readers: Tensor) -> Tensor | None:
    """The mask of the readers, [B, H, N, T or 1]."""
    if mask is None:
        return None
    mask = mask.expand(*q.shape[:3], -1)
    if mask.stride(2) == 0:  # rows that are alike need no copies
        return mask[:, :, :1].expand(-1, -1, readers.shape[1], -1)
    return rows_of(mask, readers)


def _part(mask: Tensor | None, heads: slice) -> Tensor | None:
    return None if mask is None else mask[:, heads]


def mask_at(mask: Tensor | None, positions: Tensor) -> Tensor | None:
    """The mask at positions int64 [B, P]."""
    if mask is None or mask.shape[-1] == 1:
        return mask
    return mask.gather(3, positions[:, None, None, :].expand(*mask.shape[:3], -1))
