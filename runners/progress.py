"""One live bar for many runs, whatever launcher makes them: it counts finished records."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from runners.sweep import Job


class Progress(threading.Thread):
    """A bar on standard error, drawn by a thread of its own while entered.

    Args:
        runs: how many there will be to watch.
        total: estimated seconds of all of them.
        seconds: the estimate for one job.
    """

    FORMAT = "{percentage:3.0f}% |{bar:24}| {elapsed} left {remaining} · {desc}"

    def __init__(self, runs: int, total: float, seconds: Callable[[Job], float]) -> None:
        super().__init__(daemon=True)
        self.runs, self.seconds = runs, seconds
        self.waiting: list[Job] = []
        self.done = 0
        self.began = time.time()
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.bar = tqdm(total=total, bar_format=self.FORMAT, mininterval=0)

    def watch(self, jobs: Sequence[Job]) -> None:
        """Count these jobs from now on; those that are done already do not enter the rate."""
        with self.lock:
            done = [job for job in jobs if job.is_done()]
            self.done += len(done)
            self.bar.initial += sum(map(self.seconds, done))
            self.bar.n += sum(map(self.seconds, done))
            self.waiting += [job for job in jobs if not job.is_done()]
        self._look()

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.join()
        self._look()
        self.bar.close()

    def run(self) -> None:
        while not self.stopped.wait(0.5 if sys.stderr.isatty() else 10.0):
            self._look()

    def _look(self) -> None:
        with self.lock:
            done = [job for job in self.waiting if job.is_done()]
            self.waiting = [job for job in self.waiting if job not in done]  # jobs compare by identity
            self.done += len(done)
            self.bar.n += sum(map(self.seconds, done))
            running = [job.name for job in self.waiting if self._is_running(job)]
            more = f" and {len(running) - 1} more" if len(running) > 1 else ""
            self.bar.set_description_str(f"{self.done}/{self.runs} runs {''.join(running[:1])}{more}")

    def _is_running(self, job: Job) -> bool:
        """Begun since this bar was, and not ended in any way."""
        begun, ended = (_changed(job.folder / name) for name in ("config.yaml", "summary.json"))
        return begun >= self.began and ended < begun


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
