"""Peak memory of training, in bytes, less the data set.

CUDA: the allocator's own peak over the training steps. CPU: the profiler's trace of allocations while the model and
the optimizer are built anew and take two steps, so that parameters, gradients, state and activations are all in it;
made before training, on throw-away copies, so that it costs two steps and changes no bit of the run. Work that a
method does for the first time later is not in it (30 steps of the small autoencoder have 1.2 times Shampoo's peak, 1.3
times SOAP's, 1.5 times GeN's, 1.6 times grafted Shampoo's; the layer-wise methods' is the same).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable

import torch


class PeakMemory:
    """The allocator's peak over marked stretches of a CUDA device; on a CPU `bytes` is for a trace to set.

    Args:
        device: where training runs; what is allocated there now (the data set), or by the first product of matrices
            in a process, is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = None
        self._cuda = device.type == "cuda"
        if self._cuda:
            gc.collect()  # what was here before is not to be freed within
            x = torch.zeros(8, 8, device=device, requires_grad=True)
            (x @ x).sum().backward()  # libraries take their workspaces, once for all, forward and backward
        self._before = torch.cuda.memory_allocated(device) if self._cuda else 0

    def start(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> None:
        if self._cuda:
            peak = torch.cuda.max_memory_allocated(self.device) - self._before
            self.bytes = max(peak, self.bytes or 0)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step.

    By default it hands large blocks back to the system at every chance, and a step that makes and drops large tensors
    pays for 100,000s of page faults: which methods are hit depends on the order of their allocations, not on their
    work. Other allocators are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def traced_peak(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` occupied at one time on the CPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first profile; keeps its remarks off stderr
    collecting = gc.isenabled()
    gc.disable()  # freeing older tensors within the trace would be reported as an error
    try:
        with torch.autograd.profiler.profile(profile_memory=True, use_device=None) as profile:
            kept = work()
    finally:
        if collecting:
            gc.enable()
    del kept
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    peak = total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
