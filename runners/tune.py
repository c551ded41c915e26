"""Tune one method on one task: `python -m runners.tune task=… optimizer=… [profile=…]`.

The protocol's search: every tuned method gets the same number of trials K, from the space in its config. One free
number: K points of a log grid. More: K points of a seeded Sobol sequence over the box, in logarithms. Each trial
trains with seed 0 on 90 % of the training set (graphs: with their own validation nodes) and is judged by the task's
validation metric at the end of the budget.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from runners.command import command
from runners.config import ConfigError
from runners.record import write_json
from runners.sweep import Job, Sweep

SEED = 0
EDGE = 0.1


def candidates(search: dict, family: str, trials: int) -> list[dict[str, float]]:
    """The settings to try.

    Args:
        search: `{field: {family: [low, high], ...}}`; both ends positive.
        family: of the task.
        trials: K.

    Returns:
        K settings `{field: value}`, four significant digits each; none for an empty search.

    >>> candidates({"lr": {"cnn": [0.01, 0.1]}}, "cnn", 3)
    [{'lr': 0.01}, {'lr': 0.03162}, {'lr': 0.1}]
    """
    if not search:
        return []
    missing = [field for field, space in search.items() if family not in space]
    if missing:
        raise ConfigError(
            f"no search space for {', '.join(missing)} on family {family}; add it to the optimizer's config"
        )
    low, high = np.log10([search[field][family] for field in search]).T
    if len(search) == 1:
        points = np.linspace(0, 1, trials)[:, None]
    else:
        from scipy.stats import qmc

        points = qmc.Sobol(len(search), rng=SEED).random(trials)
    settings = 10 ** (low + points * (high - low))
    return [dict(zip(search, (float(f"{value:.4g}") for value in row), strict=True)) for row in settings]


def trials_of(sweep: Sweep, task: str, optimizer: str) -> list[Job]:
    """The trials of one method on one task."""
    config, search = sweep.search_of(task, optimizer)
    settings = candidates(search, config.family, sweep.profile.trials)
    return [sweep.job(task, optimizer, SEED, values) for values in settings]


def select(jobs: Sequence[Job], spaces: dict[str, tuple[float, float]], metric: str, mode: str) -> dict:
    """The outcome of a search whose runs are made.

    The best final value wins; equal ones are told apart by validation loss. A diverged trial loses to any other; if all
    diverged, the one that lasted longest wins, so that its divergence is on record for every seed.

    Returns:
        `{task, optimizer, trials: [{values, folder, status, score}], selected, score, on_edge, metric, mode}`.

    Raises:
        ConfigError: no trial has a result.
    """
    task, optimizer = jobs[0].pair
    sign = 1 if mode == "min" else -1

    def rank(job: Job) -> tuple:
        summary = job.summary()
        if summary["status"] == "diverged":
            return True, -summary["steps"], 0.0
        return False, sign * summary["final"][metric], summary["final"]["val_loss"]

    made = [job for job in jobs if job.is_done()]
    if not made:
        raise ConfigError(f"tuning {optimizer} on {task}: no trial has a result")
    best = min(made, key=rank)
    return {
        "task": task,
        "optimizer": optimizer,
        "trials": [
            {
                "values": job.values,
                "folder": "/".join(job.folder.parts[-3:]),
                "status": job.summary().get("status"),
                "score": _score(job, metric),
            }
            for job in jobs
        ],
        "selected": best.values,
        "score": _score(best, metric),
        "on_edge": any(_is_on_edge(value, *spaces[field]) for field, value in best.values.items()),
        "metric": metric,
        "mode": mode,
    }


def outcome(jobs: Sequence[Job]) -> dict:
    """`select`, by the spaces and the measure that the jobs' config states."""
    task, search = jobs[0].config["task"], jobs[0].config["optimizer"]["search"]
    return select(jobs, {field: search[field][task["family"]] for field in search}, **task["select"])


def record_search(sweep: Sweep, jobs: Sequence[Job]) -> dict:
    """Select among finished trials and keep the whole search in `tuning/<task>/<optimizer>.json`."""
    found = outcome(jobs)
    path = tuning_file(sweep, *jobs[0].pair)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def tuning_file(sweep: Sweep, task: str, optimizer: str) -> Path:
    return sweep.folder / "tuning" / task / f"{optimizer}.json"


def _score(job: Job, metric: str) -> float | None:
    summary = job.summary()
    return summary["final"][metric] if summary.get("status") == "finished" else None


def _is_on_edge(value: float, low: float, high: float) -> bool:
    """Whether a value lies in the outer tenths of its space, in logarithms: the ends of a grid do."""
    place = np.log(value / low) / np.log(high / low)
    return not EDGE <= place <= 1 - EDGE


def tune(cfg: DictConfig) -> None:
    """Make the trials of the config's method on its task, and print them and what was selected."""
    sweep = Sweep(cfg)
    task, optimizer = cfg.task.name, cfg.optimizer.about.name
    jobs = trials_of(sweep, task, optimizer)
    if not jobs:
        raise ConfigError(f"{optimizer} is not tuned: its config has no search")
    failures = sweep.launch(jobs, timed=False)
    for job, reason in failures:
        print(f"failed: {job.name}: {reason}\n  {job.command}", file=sys.stderr)
    found = record_search(sweep, jobs)
    for trial in found["trials"]:
        print(trial["values"], trial["status"], found["metric"], trial["score"])
    edge = " (on the edge of its space)" if found["on_edge"] else ""
    print(f"selected {found['selected']}{edge}\n{tuning_file(sweep, task, optimizer)}")
    if failures:
        sys.exit(f"error: {len(failures)} of {len(jobs)} trials failed; the same command tries them again")


if __name__ == "__main__":
    command(tune)()
