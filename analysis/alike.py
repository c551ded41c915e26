"""Which runs are alike: in their settings, their problem, their versions; and which should be and are not."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd

# Where a run was made, logged and stored does not change what it computes: left out when two configs are compared.
# `profile` is represented by the budget it gives to the task.
WHERE = (
    "seed", "results", "data", "tracker", "launcher", "device", "threads", "profile", "tuning", "progress",
    "experiment", "hydra", "cuda_graphs",
)  # fmt: skip


def variant_of(config: dict) -> str:
    """A short name of a run's settings: equal for two runs that differ only in the seed or in where they were made."""
    settings = {key: value for key, value in config.items() if key not in WHERE}
    settings["profile_budget"] = _profile_budget(config)
    if config.get("optimizer"):  # what is said about a method is none of its settings
        about = config["optimizer"].get("about") or {}
        settings["optimizer"] = {key: value for key, value in config["optimizer"].items() if key != "search"}
        settings["optimizer"]["about"] = [about.get("name"), about.get("version")]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def current_of(runs: pd.DataFrame, tunings: pd.DataFrame) -> np.ndarray:
    """Which runs belong to the settings that stand for their method on their task.

    A root may hold older settings of a method (a search repeated with more trials, a rate set by hand, a method or task
    of an earlier version). The settings that the present search selected come first, then the latest versions, then the
    most seeds, then the newest.
    """
    selected = {(t.task, t.optimizer): (t.selected, t.trials) for t in tunings.itertuples()}
    current = np.zeros(len(runs), dtype=bool)
    finals = runs[~runs.holdout & runs.status.isin(["finished", "diverged"])]
    for key, group in finals.groupby(["task", "optimizer"]):

        def rank(variant: str, group: pd.DataFrame = group, key: tuple = key) -> tuple:
            rows = group[group.variant == variant]
            tuning = rows.tuning.iloc[0]
            tuned = (tuning.get("selected"), tuning.get("trials")) == selected.get(key, (None, None))
            return tuned, versions_of(rows.config.iloc[0]), rows.seed.nunique(), str(rows.created.max()), variant

        best = max(group.variant.unique(), key=rank)
        current[group.index[group.variant == best]] = True
    current |= (runs.holdout | ~runs.index.isin(finals.index)).to_numpy()
    # The same seed run twice with the same settings (on two machines): the newest stands.
    newest = finals[current[finals.index]].sort_values("created", kind="stable")
    current[newest.index[newest.duplicated(["task", "optimizer", "seed"], keep="last")]] = False
    return current


def problem_of(config: dict) -> str:
    """What a run was to solve, and for how long: task and budget, without what is only read off."""
    task = {k: v for k, v in (config.get("task") or {}).items() if k not in ("target", "evaluate_every", "select")}
    return json.dumps([task, config.get("budget"), _profile_budget(config)], sort_keys=True, default=str)


def _profile_budget(config: dict) -> dict | None:
    """What the run's profile gives to its task."""
    task, profile = config.get("task") or {}, config.get("profile") or {}
    return (profile.get("budgets") or {}).get(task.get("name"))


def versions_of(config: dict) -> tuple[int, int]:
    """Versions of the task and of the method; 0 where a config states none."""
    task, about = config.get("task"), (config.get("optimizer") or {}).get("about")
    return tuple(int(part.get("version") or 0) if isinstance(part, dict) else 0 for part in (task, about))


def warnings_of(runs: pd.DataFrame) -> list[str]:
    """What should be the same among the runs of one task, or of one method, and is not."""
    finals = runs[~runs.holdout & runs.current & runs.status.isin(["finished", "diverged"])]
    found = [sentence for task, group in finals.groupby("task") for sentence in _differences(task, group)]
    for optimizer, group in finals.groupby("optimizer"):
        tasks = group.groupby(group.config.map(lambda config: versions_of(config)[1])).task.unique()
        if len(tasks) > 1:
            parts = [f"{version} ({', '.join(sorted(names))})" for version, names in tasks.items()]
            found.append(f"{optimizer}: of several versions: {'; '.join(parts)}")
    for (task, optimizer), group in runs[~runs.current].groupby(["task", "optimizer"]):
        found.append(f"{task}: {len(group)} runs of {optimizer} with other settings are set aside")
    no_config = runs[runs.config.map(len) == 0]
    if len(no_config):
        found.append(f"{len(no_config)} runs have no readable config.yaml: their settings cannot be compared")
    return found


def _differences(task: str, runs: pd.DataFrame) -> list[str]:
    """Sentences on what differs between the final runs of one task."""
    found = []
    same = {column: runs[column] for column in ("device", "threads", "commit", "surrogate")}
    same["cuda_graphs"] = runs.config.map(lambda config: config.get("cuda_graphs") or False)
    same["number of trials"] = runs.tuning.map(lambda tuning: tuning.get("trials")).replace(0, np.nan).dropna()
    for name, values in same.items():
        methods = runs.groupby(values.where(values.notna(), "none").map(str)).optimizer.unique()
        if len(methods) > 1:
            parts = [f"{value[:24]} ({', '.join(sorted(names))})" for value, names in methods.items()]
            found.append(f"{task}: runs differ in {name}: {'; '.join(parts)}")
    versions = pd.DataFrame(runs.versions.tolist())
    for package in versions.columns[versions.nunique() > 1]:
        seen = ", ".join(sorted(versions[package].dropna().astype(str).unique()))
        found.append(f"{task}: runs differ in version of {package}: {seen}")
    if dirty := int(runs.dirty.fillna(False).sum()):
        found.append(f"{task}: {dirty} runs were made from uncommitted code")
    if runs.config.map(problem_of).nunique() > 1:
        found.append(f"{task}: runs differ in the task's settings or the budget; no claim compares those")
    return found
