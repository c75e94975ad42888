"""`sparse_attention` in plain torch: gather the kept keys once, then `attention` over them."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from focus_compile.kernels.attention.cpu import attention, attention_with_lse
from focus_compile.kernels.sparse_attention.op import in_shard


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    sinks: Tensor,
    candidates: Tensor,
    key_block: int,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See op.py.

    Each sequence's keys are listed exactly, so sequences that read equally many keys (always true
    of one sequence) need no mask; otherwise shorter lists are padded and the padding masked.
    """
    return attention(q, *_read(k, v, blocks, sinks, candidates, key_block, mask), scale)


def sparse_attention_of_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    sinks: Tensor,
    candidates: Tensor,
    first: int,
    key_block: int,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    own = in_shard(blocks, sinks, candidates, first, k.shape[2], key_block)
    k, v, mask = _read(k, v, *own, key_block, mask)
    if not k.shape[2]:
        return q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    return attention_with_lse(q, k, v, mask, scale)


def _read(
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    sinks: Tensor,
    candidates: Tensor,
    key_block: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys that are read, their values, and the mask over them."""
    lists = [
        _keys_read(kept, named, candidate * key_block, key_block, k.shape[2])
        for kept, named, candidate in zip(
            blocks.tolist(), sinks.tolist(), candidates.tolist(), strict=True
        )
    ]
    counts = [keys.shape[0] for keys in lists]
    if min(counts, default=k.shape[2]) == k.shape[2]:
        return k, v, mask
    keys = pad_sequence(lists, batch_first=True).to(k.device)  # [B, M]
    if mask is not None:
        mask = _gather_mask(mask, keys)
    if min(counts) < max(counts):
        mask = _hide_padding(mask, counts, keys)
    return (*gather_keys(k, v, keys), mask)


def _keys_read(
    blocks: list[int], sinks: list[int], tail: int, key_block: int, length: int
) -> Tensor:
    """The positions that one sequence reads, ascending, [M] on the host."""
    read = bytearray(length)
    for block in blocks:
        if block >= 0:
            read[block * key_block : (block + 1) * key_block] = b"\1" * key_block
    for sink in sinks:
        if sink >= 0:
            read[sink] = 1
    read[tail:] = b"\1" * (length - tail)
    return torch.frombuffer(read, dtype=torch.bool, count=length).nonzero().squeeze(1)


def gather_keys(k: Tensor, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `keys` [B, M] of the caches [B, Hkv, T, d], contiguous [B, Hkv, M, d].

    Rows of a matrix are what torch gathers fastest: a contiguous cache is one matrix.
    """
    batch, heads, length, width = k.shape
    shape = (batch, heads, keys.shape[1], width)
    planes = torch.arange(0, batch * heads * length, length, device=k.device)
    rows = (planes.view(batch, heads, 1) + keys[:, None]).flatten()

    def take(cache: Tensor) -> Tensor:
        if cache.is_contiguous():
            return cache.view(-1, width).index_select(0, rows).view(shape)
        taken = [cache[b, h].index_select(0, keys[b]) for b in range(batch) for h in range(heads)]
        return torch.stack(taken).view(shape)

    return take(k), take(v)


def _gather_mask(mask: Tensor, keys: Tensor) -> Tensor:
    """The columns `keys` [B, M] of a mask broadcastable to [B, H, R, T]."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.shape[3] == 1:
        return mask
    batch = keys.shape[0]
    mask = mask.expand(batch, -1, -1, -1)
    return torch.stack([mask[b].index_select(2, keys[b]) for b in range(batch)])


def _hide_padding(mask: Tensor | None, counts: list[int], keys: Tensor) -> Tensor:
    """Also mask the padding at the end of the shorter lists of `keys` [B, M]."""
    ends = torch.tensor(counts, device=keys.device)[:, None, None, None]
    real = torch.arange(keys.shape[1], device=keys.device) < ends  # [B, 1, 1, M]
    if mask is None:
        return real
    if mask.dtype == torch.bool:
        return mask & real
    return torch.where(real, mask, -torch.inf)
