"""Asking a run to stop: signals become a flag that the training loop looks at between steps."""

from __future__ import annotations

import signal
import threading

# SIGUSR1 and SIGUSR2 are schedulers' warnings that time is about to be up.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has left a checkpoint. Like Ctrl-C, it also ends a sweep of runs.

    Args:
        signum: the signal.
        folder: the run's folder.
    """

    def __init__(self, signum: int, folder) -> None:
        super().__init__(signum, folder)
        self.signum, self.folder = signum, folder

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.signum).name}; the same command goes on from {self.folder}"


class StopSignals:
    """While entered, the first of `STOPPING` is kept in `received`; a second one acts as it did before.

    Outside the main thread, where Python takes no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Let the signal do what it would have done without us: a cluster's launcher, for one, requeues its job."""
        before = self._before.get(self.received)
        if callable(before) and before is not signal.default_int_handler:
            signal.raise_signal(self.received)

    def _receive(self, number: int, _) -> None:
        self.received = number
        self.__exit__()
