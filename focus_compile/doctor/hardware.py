"""Processor, memory, disk and GPUs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from focus_compile.demo.environment import processor
from focus_compile.doctor.check import NOTE, OK, PROBLEM, Check
from focus_compile.runtime.memory_plan import GIB, readable

__all__ = ["checks"]

ENOUGH_MEMORY = 4 * GIB
"""Bytes free below which compiling alone may fail."""
ENOUGH_DISK = 1 * GIB
BF16_CAPABILITY, LEAST_CAPABILITY = (8, 0), (7, 0)


def checks() -> Iterator[Check]:
    """The processor, and every GPU that torch sees."""
    yield _threads()
    memory = _memory()
    if memory is not None:
        yield memory
    yield _cache_folder()
    yield from _gpus()


def _threads() -> Check:
    import torch

    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{processor()}, {threads} threads on {cores} cores"
    if cores is None or threads == cores or 2 * threads == cores:
        return Check("CPU", OK, found)
    why = "more threads than cores" if threads > cores else "cores stay unused"
    return Check("CPU", NOTE, f"{found}: {why}", f"OMP_NUM_THREADS={cores}")


def _memory() -> Check | None:
    """None where the system does not tell."""
    free = free_memory()
    if free is None:
        return None
    if free >= ENOUGH_MEMORY:
        return Check("memory", OK, f"{readable(free)} available")
    return Check(
        "memory", NOTE, f"{readable(free)} available",
        "compiling takes about 2 GiB; free some, or use lowering=\"eager\"",
    )  # fmt: skip


def free_memory() -> int | None:
    """Bytes that the system, or the container where it has less, can still give."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _cache_folder() -> Check:
    """Where Inductor keeps what it compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        return Check(
            "compile cache", PROBLEM, f"{folder} cannot be written",
            "name a folder of yours in TORCHINDUCTOR_CACHE_DIR",
        )  # fmt: skip
    free = shutil.disk_usage(there).free
    if free < ENOUGH_DISK:
        return Check(
            "compile cache", NOTE, f"{readable(free)} free at {folder}",
            "free some, or name a folder in TORCHINDUCTOR_CACHE_DIR",
        )  # fmt: skip
    return Check("compile cache", OK, f"{folder}, {readable(free)} free")


def _gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and torch.version.cuda:
            yield Check("GPU", NOTE, f"none: CUDA_VISIBLE_DEVICES={hidden!r}", "unset it")
            return
        yield Check(
            "GPU", NOTE, "none: everything runs on the CPU",
            "fine for the bundled models; models of billions of parameters need one",
        )  # fmt: skip
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)


def _gpu(index: int) -> Check:
    import torch

    name = f"GPU {index}"
    capability = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    found = (
        f"{torch.cuda.get_device_name(index)}, capability {capability[0]}.{capability[1]}, "
        f"{readable(free)} of {readable(total)} free"
    )
    return gpu_check(name, found, capability, free)


def gpu_check(name: str, found: str, capability: tuple[int, int], free: int) -> Check:
    """The verdict on one GPU. free: bytes."""
    if capability < LEAST_CAPABILITY:
        return Check(
            name, PROBLEM, found, "Triton needs capability 7.0: run on the CPU with --device cpu"
        )
    if capability < BF16_CAPABILITY:
        return Check(name, NOTE, found, "no bfloat16 in hardware: --dtype float16")
    if free < ENOUGH_MEMORY:
        return Check(
            name, NOTE, found, "`explain` says what a trajectory takes; another process may hold it"
        )
    return Check(name, OK, found)
