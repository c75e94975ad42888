"""Device work of fixed addresses and sizes, replayed as CUDA graphs that share one memory pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from focus_compile.errors import FocusError
from focus_compile.torch_tools import span

__all__ = ["DeviceGraphs"]

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class DeviceGraphs:
    """Runs work as it is the first time, and as a CUDA graph from then on.

    The first run compiles and loads whatever the work needs. What a graph returns lies in the pool
    and is overwritten by the next replay of any graph: use it before. Why a capture failed goes to
    `failed`, and the work runs as it is from then on.
    """

    enabled: bool
    failed: Callable[[str], object]
    device: torch.device | None = None
    """Where all of the work runs."""
    _seen: set[Hashable] = field(default_factory=set)
    _graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = field(default_factory=dict)
    _pool: Any = None
    _stream: Any = None

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of `work`; everything it reads and writes must be the same for the key."""
        with span(key):
            return self._run(key, work)

    def _run(self, key: Hashable, work: Callable[[], T]) -> T:
        held = self._graphs.get(key)
        if held is not None:
            graph, result = held
            with torch.cuda.device(self.device):
                graph.replay()
            return result  # type: ignore[return-value]
        if not self.enabled or key not in self._seen:
            self._seen.add(key)
            return work()
        return self._capture(key, work)

    def _capture(self, key: Hashable, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device):
                result = self._record(graph, work)
        except FocusError:
            raise  # the work's own: nothing was wrong with capturing it
        except RuntimeError as error:
            self.enabled = False
            # Leaving a failed capture raises an error of its own over the one that explains it.
            self.failed(str(error.__context__ or error).splitlines()[0])
            return work()
        self._graphs[key] = graph, result
        log.info("captured the CUDA graph %s in %.2f s", key, time.perf_counter() - started)
        with torch.cuda.device(self.device):
            graph.replay()
        return result

    def _record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], T]) -> T:
        """`torch.cuda.graph`, which gives cached memory back before each of many captures, without
        doing so unless it may be needed."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            # torch's own capture stream is of the device that was first captured on.
            self._stream = torch.cuda.Stream(self.device)
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > free:
            torch.cuda.empty_cache()  # a capture cannot ask for it
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                return work()
            finally:
                graph.capture_end()

    @property
    def captured(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)
