"""Where trajectories live: one slot per model, keyed by the identity of its first weight.

A compiled graph is shared by all instances of a model class, so it owns no state. The slot goes
when the weight is freed, and on `torch.compiler.reset()`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from focus_compile.runtime.continuity import Continuity
from focus_compile.runtime.quality_guard import QualityGuard
from focus_compile.runtime.trajectory import OwnedTrajectory

__all__ = ["STORE", "Slot", "TrajectoryStore"]


@dataclass
class Slot:
    """The one trajectory of a model, what its calls were like so far and how well steps answered
    them, and the lock that a call holds while it uses these."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    trajectory: OwnedTrajectory | None = None
    continuity: Continuity = field(default_factory=Continuity)
    guard: QualityGuard = field(default_factory=QualityGuard)


class TrajectoryStore:
    """Slots of all live models."""

    def __init__(self) -> None:
        self._slots: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def slot(self, weight: Tensor) -> Slot:
        """The slot of the model whose first weight this is."""
        found = self._slots.get(weight)
        if found is None:
            with self._lock:
                found = self._slots.setdefault(weight, Slot())
        return found

    def guard(self, weight: Tensor) -> QualityGuard:
        """How well steps of the model whose first weight this is answered."""
        found = self._slots.get(weight)
        return QualityGuard() if found is None else found.guard

    def continuity(self, weight: Tensor) -> Continuity:
        """What the calls of the model whose first weight this is were like."""
        found = self._slots.get(weight)
        return Continuity() if found is None else found.continuity

    def clear(self) -> None:
        """Free every trajectory, and forget what calls were like."""
        with self._lock:
            for slot in list(self._slots.values()):
                slot.trajectory, slot.continuity = None, Continuity()
                slot.guard = QualityGuard()

    @property
    def nbytes(self) -> int:
        """Bytes held by all trajectories."""
        held = [slot.trajectory for slot in list(self._slots.values())]
        return sum(trajectory.nbytes for trajectory in held if trajectory is not None)


STORE = TrajectoryStore()
