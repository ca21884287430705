"""Passes that a device records once and runs again by a single call: the protocol, and CUDA's way.

A captured pass reads and writes the memory that it did when it was captured. Knows nothing of models and steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_cuda: Any = torch.cuda  # its functions are annotated in part only

Pass = Callable[[], Tensor]


class CapturedPass(Protocol):
    """A pass that can be run again."""

    @property
    def output(self) -> Tensor:
        """Where the result is, after each replay until the next one."""
        ...

    def replay(self) -> None:
        """Queue the pass behind what the current stream has to do."""
        ...


class GraphBackend(Protocol):
    """A device that captures passes."""

    def capture(self, run: Pass) -> CapturedPass:
        """Return a pass, captured; it has run before, so nothing in it is compiled or measured any more.

        Raises: RuntimeError for a pass that waits for the device, or reads from the host
        """
        ...


class CudaGraphs:
    """CUDA's graphs, which share their memory: no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device)
        self._pool: Any = None

    def capture(self, run: Pass) -> CapturedPass:
        """Capture on a stream of its own; other threads may go on to use the device."""
        graph = _cuda.CUDAGraph()
        with (
            _cuda.device(self._device),
            _cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = run()
        self._pool = graph.pool()
        return _CudaGraph(graph, output)


class _CudaGraph:
    """A captured graph; the graph is what keeps its memory."""

    def __init__(self, graph: Any, output: Tensor) -> None:
        self._graph = graph
        self._output = output

    @property
    def output(self) -> Tensor:
        return self._output

    def replay(self) -> None:
        self._graph.replay()


def graph_backend(device: torch.device) -> GraphBackend | None:
    """Return what captures passes on a device; None where nothing does."""
    return CudaGraphs(device) if device.type == "cuda" else None
