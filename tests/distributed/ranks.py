"""Processes that run a function of the tests together, over gloo."""

from __future__ import annotations

import datetime
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

__all__ = ["run"]

SECONDS = 240


def run(size: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns on each of `size` ranks, or the exception that it raised.

    folder: an empty one, for the ranks to meet in.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.cases"])
    ranks = [
        context.Process(target=_rank, args=(rank, size, str(folder), work, args))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    for process in ranks:
        if process.is_alive():
            process.kill()
    found = [folder / f"result_{rank}" for rank in range(size)]
    missing = [path.name for path in found if not path.exists()]
    assert not missing, f"no {missing}: exit codes {[process.exitcode for process in ranks]}"
    return [torch.load(path, weights_only=False) for path in found]


def _rank(rank: int, size: int, folder: str, work: Callable[..., Any], args: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    try:
        result = work(*args)
    except Exception as error:  # handed to the test
        result = RuntimeError(f"{type(error).__name__}: {error}")
    torch.save(result, f"{folder}/result_{rank}")
    if not isinstance(result, Exception):
        dist.barrier()
    dist.destroy_process_group()
