"""What a trajectory will take, before it is taken."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

__all__ = ["MemoryPlan", "readable"]

GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one trajectory, beside the weights and what a forward needs for itself."""

    kv: int
    """K/V caches of every layer."""
    summaries: int
    """Block summaries of the sparse layers."""
    logits: int
    """The latest rows of all outputs, and the copies that callers hold."""
    weights: int
    """Copies of weights that a step reads as one."""
    all_logits: bool
    """Whether logits of all rows are kept."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.kv + self.summaries + self.logits + self.weights

    def to_dict(self) -> dict[str, int]:
        """Bytes by what they hold."""
        sizes = asdict(self)
        del sizes["all_logits"]
        return sizes

    def why_no_room(self, device: torch.device) -> str | None:
        """None where the device has the memory, else what is missing and what to change."""
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if self.total <= free:
            return None
        less = ' logits="response" keeps fewer logits;' if self.all_logits else ""
        less += " merge_projections=False copies no weights;" if self.weights else ""
        return (
            f"a trajectory needs {self} and {free / GIB:.1f} GiB are free.{less} a shorter length "
            "or a smaller batch needs less of everything"
        )

    def __str__(self) -> str:
        parts = [("K/V", self.kv), ("summaries", self.summaries), ("logits", self.logits)]
        parts += [("merged weights", self.weights)] if self.weights else []
        listed = ", ".join(f"{name} {readable(size)}" for name, size in parts)
        return f"{readable(self.total)} ({listed})"


def readable(size: int) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1024:.1f} KiB"
