"""Training time, and whether it was this run's alone."""

from __future__ import annotations

import time
from pathlib import Path

import torch

# Share of training time that the main thread may wait for a processor before the time counts as contended.
TOLERANCE = 0.05


class Clock:
    """Seconds between `start` and `stop`, summed; on CUDA both wait for the device.

    Args:
        device: where training runs.

    Attributes:
        seconds: sum up to the last `stop`.
        waited: of these, seconds that this thread was ready and another one had the processor.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.waited = 0.0
        self._started = None

    def start(self) -> None:
        self._synchronise()
        self._started = time.perf_counter(), _queueing_seconds()

    def stop(self) -> None:
        self._synchronise()
        started, queued = self._started
        self.seconds += time.perf_counter() - started
        self.waited += _queueing_seconds() - queued
        self._started = None

    def read(self) -> float:
        """Seconds up to now, as the host sees them: without waiting for the device."""
        running = time.perf_counter() - self._started[0] if self._started else 0.0
        return self.seconds + running

    @property
    def contended(self) -> bool:
        """Whether others kept this run from the processor for more than `TOLERANCE` of its time."""
        return self.waited > TOLERANCE * self.seconds

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _queueing_seconds() -> float:
    """Time this thread has spent waiting in a run queue; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
