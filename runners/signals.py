"""Asking a run to stop: signals become a flag that the training loop looks at between steps; workers follow parents."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import threading
import time

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of schedulers, that time is about to be up
STOPPING = (signal.SIGINT, signal.SIGTERM, *WARNINGS)


@functools.cache
def end_with_parent() -> None:
    """In a worker of joblib: end within a second of the process that started it, which may be killed.

    Such workers read and write pipes whose other ends they hold themselves: left alone, they wait for ever.
    """
    if not multiprocessing.current_process().name.startswith("Loky"):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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

    def requeue(self) -> None:
        """After a scheduler's warning within a Slurm job: have the job queued again, to go on from the checkpoint.

        A job of `launcher=slurm` is submitit's, which knows how to do that and ends the process; of any other job,
        Slurm is asked itself. A job that gets SIGTERM is left to Slurm, which has queued it again if it was preempted,
        and has not if it was cancelled.
        """
        if self.received not in WARNINGS:
            return
        if callable(self._before[signal.SIGUSR2]):
            signal.raise_signal(signal.SIGUSR2)
        elif "SLURM_JOB_ID" in os.environ:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)

    def _receive(self, number: int, _) -> None:
        self.received = number
        self.__exit__()
