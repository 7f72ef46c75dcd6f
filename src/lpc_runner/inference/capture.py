"""Work on fixed tensors, captured once as a CUDA graph: the host then launches one graph instead of every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Captures:
    """Graphs of one device that never run at the same time, and so share their memory."""

    WARM_UPS = 3  # runs before a capture, in which libraries choose algorithms and allocate what they keep

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, None
        self._stream = None  # its own: torch's capture stream stays on the first device that a process captured on

    def __call__(self, work: Callable[[], None], warm: bool = True) -> Callable[[], None]:
        """What replays `work`, after WARM_UPS runs of it where it is to be warmed up; raises what it raises."""
        with torch.cuda.device(self.device):
            self._stream = self._stream or torch.cuda.Stream()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(self.WARM_UPS if warm else 0):
                    work()
            current.wait_stream(self._stream)
            return self.captured(work, current).replay

    def captured(self, work: Callable[[], None], current: Any) -> Any:
        """The graph of one run; current: the stream that is current outside.

        Raises what the work raised: ending a broken capture raises another error over it and, before torch 2.15,
        leaves the capture's stream current.
        """
        graph, first = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    work()
                except Exception as error:
                    first = error
                    raise
        except Exception:
            torch.cuda.set_stream(current)
            if first is not None:
                raise first from None
            raise
        self._pool = graph.pool()
        return graph
