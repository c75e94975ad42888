"""The equations of `staleness`, one row and head at a time, in float64."""

import torch
from torch import Tensor

from focus_compile.kernels.sink_capture.reference import masked


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
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    error = torch.zeros(batch, 2, dtype=torch.float64, device=q.device)
    received = torch.zeros(batch, k.shape[2], dtype=torch.float64, device=q.device)
    if mask is not None:
        mask = mask.expand(batch, heads, rows, k.shape[2])
    for b in range(batch):
        for n, r in enumerate(readers[b].tolist()):
            weight = float(reader_weight[b, n])
            for h in range(heads):
                query, o, kv = q[b, h, r].double(), out[b, h, r].double(), h // group
                seen = None if mask is None else mask[b, h, r]
                all_p = _probability(query, k[b, kv], seen, lse[b, h, r], scale)
                received[b] += weight * all_p / (heads * float(reader_weight[b].sum()) or 1.0)
                at_probes = None if seen is None else seen[positions[b]]
                old_p, new_p = (
                    _probability(query, keys[b, kv], at_probes, lse[b, h, r], scale)
                    * probe_weight[b].double()
                    for keys in (old_k, new_k)
                )
                moved = torch.zeros_like(o)
                for j in range(positions.shape[1]):
                    moved += new_p[j] * (new_v[b, kv, j].double() - o)
                    moved -= old_p[j] * (old_v[b, kv, j].double() - o)
                drawn = float(old_p.sum() + new_p.sum()) / 2
                moved *= float(all_p[left[b]].sum()) / drawn if drawn > 0 else 0.0
                error[b] += weight * torch.stack([moved.square().sum(), o.square().sum()])
    return error.float(), received.float()


def _probability(
    query: Tensor, keys: Tensor, mask: Tensor | None, lse: Tensor, scale: float
) -> Tensor:
    """Of one row for keys [P, d], [P]; 0 where the row has no key left."""
    if lse == -torch.inf:
        return torch.zeros(keys.shape[0], dtype=torch.float64, device=keys.device)
    logits = scale * keys.double() @ query
    if mask is not None:
        logits = masked(logits, mask)
    return (logits - lse.double()).exp()
