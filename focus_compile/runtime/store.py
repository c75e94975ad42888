"""Where trajectories live: one slot per model, keyed by the identity of its first weight.

A compiled graph is shared by all instances of a model class, so it owns no state. The slot goes
when the weight is freed, and on `torch.compiler.reset()`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from focus_compile.runtime.trajectory import OwnedTrajectory

__all__ = ["STORE", "Slot", "TrajectoryStore"]


@dataclass
class Slot:
    """The one trajectory of a model, and the lock that a call holds while it uses it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    trajectory: OwnedTrajectory | None = None


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

    def clear(self) -> None:
        """Free every trajectory."""
        with self._lock:
            for slot in list(self._slots.values()):
                slot.trajectory = None

    @property
    def nbytes(self) -> int:
        """Bytes held by all trajectories."""
        held = [slot.trajectory for slot in list(self._slots.values())]
        return sum(trajectory.nbytes for trajectory in held if trajectory is not None)


STORE = TrajectoryStore()
