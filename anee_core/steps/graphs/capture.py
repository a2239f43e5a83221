"""Capturing work as CUDA graphs, parts of it under a condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class CudaCapture:
    """What captures the work that is launched on the current GPU.

    Nothing that a graph computes lives on but in buffers from outside, so all graphs may use the same memory.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], None]) -> Graph:
        """Run ``work`` once, for libraries to set themselves up, and then capture it."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph

    def only_if(self, flag: Tensor, work: Callable[[], None]) -> None:
        """Capture work as a conditional node; see `Capture.only_if`."""
        if not torch.cuda.is_current_stream_capturing():
            return work()
        graph: Any = torch.cuda.CUDAGraph
        if not hasattr(graph, "begin_capture_to_if_node"):
            raise RuntimeError(f"torch {torch.__version__} has no conditional nodes")
        current = graph.get_currently_capturing_graph()
        current.begin_capture_to_if_node(flag)
        try:
            work()
        finally:
            current.end_capture_to_conditional_node()
        return None


class Graph(Protocol):
    """Work that was captured."""

    def replay(self) -> None:
        """Do it again, on what the same buffers hold now."""
        ...


class Capture(Protocol):
    """What captures work in graphs."""

    def __call__(self, work: Callable[[], None]) -> Graph:
        """Do some work once, for libraries to set themselves up, and capture it.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        ...

    def only_if(self, flag: Tensor, work: Callable[[], None]) -> None:
        """Within work that is being captured, let this part be done in a replay only if a bool is then true.

        While the work is done to set things up, this is done in any case.

        Raises:
            RuntimeError: the device knows no such graphs.
        """
        ...
