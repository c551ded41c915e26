"""How long runs will take: measured where records exist, otherwise a rough figure, and it says which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from runners.record import DONE, read_summary
from runners.sweep import Job

# Cost of a step over SGD-m's, roughly, for methods without records.
RELATIVE_COST = {"first_order": 1.0, "layerwise": 2.0, "second_order": 3.0}


class Estimates:
    """Seconds of wall time per run.

    Args:
        root: folder of the records to learn from.
        rough: `{task: seconds per epoch of SGD-m, evaluation included}`, for tasks without records.
    """

    def __init__(self, root: Path, rough: dict[str, float]) -> None:
        self.rough = rough
        seconds = defaultdict(list)
        for path in root.glob("*/*/*/summary.json"):
            summary = read_summary(path.parent)
            for unit in ("epochs", "steps"):
                if summary.get("status") in DONE and summary.get(unit):
                    pair = summary["task"], summary["optimizer"]
                    seconds[pair, unit].append(summary["wall_seconds"] / summary[unit])
        self.measured = {key: median(values) for key, values in seconds.items()}

    def is_measured(self, job: Job) -> bool:
        return (job.pair, self._unit(job)) in self.measured

    @staticmethod
    def _unit(job: Job) -> str:
        return "steps" if job.config["budget"]["steps"] else "epochs"

    def seconds(self, job: Job) -> float:
        """Seconds for one run; 1 where nothing is known."""
        budget, (task, _) = job.config["budget"], job.pair
        if budget["seconds"]:
            return budget["seconds"]
        if self.is_measured(job):
            return self.measured[job.pair, self._unit(job)] * (budget[self._unit(job)] or 1)
        epoch = self.rough.get(task, 1.0) * RELATIVE_COST.get(job.config["optimizer"]["about"]["kind"], 1.0)
        return epoch * (budget["epochs"] or 1)

    def total(self, jobs: Iterable[Job]) -> float:
        return sum(self.seconds(job) for job in jobs)


def spoken(seconds: float) -> str:
    """A duration with two digits that matter.

    >>> spoken(4.2), spoken(200), spoken(90000)
    ('4 s', '3.3 min', '25 h')
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 100 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s"
