"""The latest computed value of every row of an output, handed out without a full copy per call.

A step computes few rows, but its caller gets all of them. A private master holds every row that is
ever computed. What is handed out is one of at most two copies of it, and only one that nobody
holds any more: brought up to date by the rows it missed if it is as we left it, overwritten from
the master if not. So a caller's tensors never change under its hands and a caller's in-place edits
never come back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LatestRows"]

MOST_COPIES = 2


@dataclass(eq=False)
class _Copy:
    tensor: Tensor
    version: int
    behind: list[Tensor] = field(default_factory=list)
    stale: bool = False

    def is_free(self) -> bool:
        """Nobody but us refers to the storage."""
        return _holders(self.tensor) <= _OURS

    def miss(self, rows: Tensor) -> None:
        """Note an update, unless catching up would by now write more than a whole copy."""
        self.behind.append(rows)
        if sum(rows.shape[1] for rows in self.behind) > self.tensor.shape[1]:
            self.forget()

    def forget(self) -> None:
        """To catch up, copy everything."""
        self.stale = True
        self.behind.clear()


class LatestRows:
    """Rows of one output [batch, length, ...]; those before `first` are zero."""

    def __init__(self, values: Tensor, first: int = 0) -> None:
        """values: the rows from `first` on, [batch, length - first, ...]."""
        self.first = first
        with torch.inference_mode(False), torch.no_grad():
            self.master = values.clone()
        self.copies: list[_Copy] = []

    def replace(self, values: Tensor) -> None:
        """All rows from `first` on are new."""
        self.master.copy_(values)
        for copy in self.copies:
            copy.forget()

    def lend(self, everything: Tensor) -> Tensor:
        """Hand out a tensor [batch, length, ...] that equals the master, and count it as a copy."""
        if everything.is_inference() or not everything.is_contiguous():
            return everything  # writes into it are not counted, or reach more than one row
        self._keep(_Copy(everything, everything._version))
        return everything.detach()

    def write(self, rows: Tensor, values: Tensor) -> None:
        """New `values` [batch, active, ...] of `rows` int64 [batch, active], none before `first`.

        Only device work: may be part of a CUDA graph. `missed` must follow.
        """
        _write(self.master, rows - self.first if self.first else rows, values)

    def missed(self, rows: Tensor) -> None:
        """Tell the copies which rows were written."""
        for copy in self.copies:
            copy.miss(rows)

    def hand_out(self) -> Tensor:
        """All rows [batch, length, ...], for the caller to keep."""
        for copy in self.copies:
            if copy.is_free():
                self._catch_up(copy)
                return copy.tensor.detach()
        batch, known, *rest = self.master.shape
        with torch.inference_mode(False), torch.no_grad():
            if self.first:
                tensor = self.master.new_zeros((batch, self.first + known, *rest))
                tensor[:, self.first :] = self.master
            else:
                tensor = self.master.clone()
        self._keep(_Copy(tensor, tensor._version))
        return tensor.detach()

    def _catch_up(self, copy: _Copy) -> None:
        """Make the copy equal to the master."""
        if copy.stale or copy.tensor._version != copy.version:
            copy.tensor[:, self.first :] = self.master
            copy.tensor[:, : self.first].zero_()
        else:
            for rows in copy.behind:
                _write(copy.tensor, rows, _read(self.master, rows - self.first))
        copy.behind.clear()
        copy.version, copy.stale = copy.tensor._version, False

    def _keep(self, copy: _Copy) -> None:
        self.copies = [*self.copies[-(MOST_COPIES - 1) :], copy]

    @property
    def nbytes(self) -> int:
        held = [self.master, *(copy.tensor for copy in self.copies)]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def _write(target: Tensor, rows: Tensor, values: Tensor) -> None:
    if target.shape[0] == 1:
        target[0].index_copy_(0, rows[0], values[0])
        return
    target.index_put_((_sequences(target), rows), values)


def _read(source: Tensor, rows: Tensor) -> Tensor:
    if source.shape[0] == 1:
        return source[0].index_select(0, rows[0])[None]
    return source[_sequences(source), rows]


def _sequences(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.shape[0], device=tensor.device)[:, None]


def _holders(tensor: Tensor) -> int:
    """References to the tensor's storage, counting our own."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _count_ours() -> int:
    return _holders(torch.empty(1))


_OURS = _count_ours()
