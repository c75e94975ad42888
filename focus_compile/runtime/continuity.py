"""Whether a model's calls continue one another, learned from those so far.

A caller that scores text under random masks never reads what a refresh keeps. After a few refreshes
in vain its calls run exactly and hold nothing, until one decodes masks of the call before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NEVER_CONTINUED", "PATIENCE", "Continuity"]

PATIENCE = 4
"""Refreshes in a row, none of them continued, after which calls run exactly."""
NEVER_CONTINUED = (
    f"the last {PATIENCE} calls that could begin a trajectory were not continued. "
    "Two in a row that only turn masks into tokens begin one again; to score text, call the model "
    'itself, or set policy="exact".'
)


@dataclass
class Continuity:
    """What the calls of one model were like.

    unread: the latest refreshes that no call continued; ids: of the last call that is no part of a
    trajectory, or ended one; earlier: of the one before it.
    """

    unread: int = 0
    ids: Tensor | None = None
    earlier: Tensor | None = None

    def continued(self) -> None:
        """A call went on from what is kept."""
        self.unread = 0

    def refreshed(self) -> None:
        """A call kept what no other has read yet."""
        self.unread += 1

    def left(self, ids: Tensor) -> None:
        """A call with these ids ended a trajectory, or is part of none."""
        self.ids, self.earlier = ids.clone(), self.ids

    @property
    def given_up(self) -> bool:
        """Whether calls run exactly until two of them look like a trajectory."""
        return self.unread >= PATIENCE

    def first_ids(self, ids: Tensor, mask_token_id: int, growth: int = 0) -> Tensor | None:
        """The ids that a trajectory which a refresh of `ids` begins would have begun with; None
        where the call had better run exactly.

        growth: tokens by which calls of a trajectory may become longer.
        """
        if not self.given_up:
            return ids
        last, earlier = self.ids, self.earlier
        self.left(ids)
        decoded = _decoded(last, ids, mask_token_id, growth)
        other = _decoded(earlier, ids, mask_token_id, growth)
        return None if decoded <= 0 or 0 <= other < decoded else last


def _decoded(before: Tensor | None, ids: Tensor, mask_token_id: int, growth: int) -> int:
    """Masks that became tokens since a call; -1 where something else changed as well."""
    if (
        before is None
        or before.shape[0] != ids.shape[0]
        or before.device != ids.device
        or ids.shape[1] - before.shape[1] not in (0, growth)
    ):
        return -1
    changed = before != ids[:, : before.shape[1]]
    counts = torch.stack([changed.sum(), (changed & (before != mask_token_id)).sum()])
    decoded, others = counts.tolist()  # one wait for the device
    return -1 if others else decoded
