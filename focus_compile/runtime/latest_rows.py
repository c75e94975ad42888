"""The latest computed value of every row of an output, handed out without a full copy per call.

A step computes few rows, but its caller gets all of them. A private master holds every row. What
is handed out is one of at most two copies of it; a copy is brought up to date and handed out again
only when nobody holds it any more and nobody wrote into it, so a caller's tensors never change
under its hands and a caller's in-place edits never come back.
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

    def is_worth_keeping(self) -> bool:
        """Catching up writes fewer rows than a copy of the master would, and holds no more."""
        return sum(rows.shape[1] for rows, _ in self.behind) <= self.tensor.shape[1]

    def is_free(self) -> bool:
        """Nobody but us refers to the storage, and it is as we left it."""
        return _holders(self.tensor) <= _OURS and self.tensor._version == self.version


class LatestRows:
    """Rows of one output [batch, length, ...]."""

    def __init__(self, everything: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.master = everything.clone()
        self.copies: list[_Copy] = []

    def replace(self, everything: Tensor) -> None:
        """All rows are new; `everything` itself goes to the caller."""
        self.master.copy_(everything)
        self.copies = []

    def update(self, rows: Tensor, values: Tensor) -> Tensor:
        """New `values` [batch, active, ...] of the rows at `rows` int64 [batch, active].

        Returns all rows [batch, length, ...], for the caller to keep.
        """
        _write(self.master, rows, values)
        for copy in self.copies:
            copy.behind.append((rows, values))
        self.copies = [copy for copy in self.copies if copy.is_worth_keeping()]
        return self._hand_out().detach()

    def _hand_out(self) -> Tensor:
        for copy in self.copies:
            if copy.is_free():
                for rows, values in copy.behind:
                    _write(copy.tensor, rows, values)
                copy.behind.clear()
                copy.version = copy.tensor._version
                self.copies.remove(copy)
                self.copies.append(copy)
                return copy.tensor
        with torch.inference_mode(False), torch.no_grad():
            tensor = self.master.clone()
        self.copies = [*self.copies[-(MOST_COPIES - 1) :], _Copy(tensor, tensor._version)]
        return tensor

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
