"""The latest computed value of every row of an output, handed out without a full copy per call.

A step computes few rows, but its caller gets all of them. A private master holds every row. What
is handed out is one of at most two copies of it, and only one that nobody holds any more: brought
up to date by the rows it missed if it is as we left it, overwritten from the master if not. So a
caller's tensors never change under its hands and a caller's in-place edits never come back.
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
    behind: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    stale: bool = False

    def is_free(self) -> bool:
        """Nobody but us refers to the storage."""
        return _holders(self.tensor) <= _OURS

    def miss(self, rows: Tensor, values: Tensor) -> None:
        """Note an update, unless catching up would by now write more than a whole copy."""
        self.behind.append((rows, values))
        if sum(rows.shape[1] for rows, _ in self.behind) > self.tensor.shape[1]:
            self.forget()

    def forget(self) -> None:
        """To catch up, copy everything."""
        self.stale = True
        self.behind.clear()

    def catch_up(self, master: Tensor) -> None:
        """Become equal to the master."""
        if self.stale or self.tensor._version != self.version:
            self.tensor.copy_(master)
        else:
            for rows, values in self.behind:
                _write(self.tensor, rows, values)
        self.behind.clear()
        self.version, self.stale = self.tensor._version, False


class LatestRows:
    """Rows of one output [batch, length, ...]."""

    def __init__(self, everything: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.master = everything.clone()
        self.copies: list[_Copy] = []

    def replace(self, everything: Tensor) -> Tensor:
        """All rows are new. Returns them for the caller to keep."""
        self.master.copy_(everything)
        for copy in self.copies:
            copy.forget()
        return self.lend(everything)

    def lend(self, everything: Tensor) -> Tensor:
        """Hand out a tensor that equals the master, and count it as one of the copies."""
        if everything.is_inference() or not everything.is_contiguous():
            return everything  # writes into it are not counted, or reach more than one row
        self._keep(_Copy(everything, everything._version))
        return everything.detach()

    def update(self, rows: Tensor, values: Tensor) -> Tensor:
        """New `values` [batch, active, ...] of the rows at `rows` int64 [batch, active].

        Returns all rows [batch, length, ...], for the caller to keep.
        """
        _write(self.master, rows, values)
        for copy in self.copies:
            copy.miss(rows, values)
        return self._hand_out().detach()

    def _hand_out(self) -> Tensor:
        for copy in self.copies:
            if copy.is_free():
                copy.catch_up(self.master)
                return copy.tensor
        with torch.inference_mode(False), torch.no_grad():
            tensor = self.master.clone()
        self._keep(_Copy(tensor, tensor._version))
        return tensor

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
    sequences = torch.arange(target.shape[0], device=target.device)[:, None]
    target.index_put_((sequences, rows), values)


def _holders(tensor: Tensor) -> int:
    """References to the tensor's storage, counting our own."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _count_ours() -> int:
    return _holders(torch.empty(1))


_OURS = _count_ours()
