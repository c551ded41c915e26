"""Weights & Biases as a mirror of finished records: written from their files, last, and never at a run's cost.

One service carries all runs of a call. A run's id is its record's hash, so that a second mirror of it is none. What
W&B would add by itself (host, user, code, requirements, system metrics) stays out: the record's provenance says what
matters.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from runners.record import COUNTERS, DONE, read_summary, read_table

# x-axis and the prefix of what is drawn against it; a metric has one axis, so each is logged under three names.
AXES = {"epoch": "", "train_seconds": "by_seconds/", "gradient_equivalents": "by_work/"}


def mirror(folders: Iterable[Path], tracker: DictConfig) -> int:
    """Mirror the finished records that are not mirrored yet; a failure is one warning.

    Args:
        folders: of records.
        tracker: the config group `tracker`; nothing is done where its mode is null.

    Returns:
        The number of runs mirrored.
    """
    if not tracker.mode:
        return 0
    present = _mirrored(Path(tracker.dir), tracker.mode)
    done = 0
    for folder in map(Path, folders):
        summary = read_summary(folder)
        if folder.name in present or summary.get("status") not in DONE:
            continue
        try:
            _mirror_run(folder, summary, tracker)
        except Exception as error:  # the record is safe: whatever W&B says, the runs go on
            reason = " ".join(str(error).split())[:200]
            print(f"warning: not mirrored to W&B ({type(error).__name__}: {reason}); try again later", file=sys.stderr)
            break
        done += 1
    if done:
        _flush()
    return done


def _flush() -> None:
    """End the service: a finished run may still be on its way to the disk, and a reader would find half of it."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _mirrored(root: Path, mode: str) -> set[str]:
    pattern = "offline-run-*" if mode == "offline" else "run-*"
    return {path.name.rpartition("-")[2] for path in root.glob(f"wandb/{pattern}")}


def _mirror_run(folder: Path, summary: dict, tracker: DictConfig) -> None:
    import wandb

    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    run = wandb.init(
        project=tracker.project,
        entity=tracker.entity,
        dir=tracker.dir,
        id=folder.name,
        name=f"{summary['task']} {summary['optimizer']} seed {summary['seed']}",
        group=_group(summary, config),
        job_type="trial" if summary["holdout"] else "final",
        tags=[summary["task"], summary["optimizer"], config["profile"]["name"]],
        config=config | {"provenance": summary["provenance"]},
        resume="allow",
        settings=_settings(wandb, tracker.mode),
    )
    try:
        for axis, prefix in AXES.items():
            run.define_metric(axis)
            run.define_metric(f"{prefix}*", step_metric=axis)
        layers = _layers(folder)
        for row in _numbers(read_table(folder / "metrics.csv")):
            values = {name: value for name, value in row.items() if name not in COUNTERS}
            logged = {prefix + name: value for prefix in AXES.values() for name, value in values.items()}
            run.log({axis: row[axis] for axis in AXES} | logged | layers[row["step"]], step=int(row["step"]))
        run.summary.update({key: value for key, value in summary.items() if key != "provenance"})
    finally:
        run.finish()


def _settings(wandb, mode: str):
    return wandb.Settings(
        mode=mode,
        silent=True,
        console="off",
        host="",
        username="",
        email="",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


def _group(summary: dict, config: dict) -> str:
    """Task, optimizer and the settings that are searched for: the same for all seeds of a method."""
    settings = config["optimizer"]
    chosen = [f"{field}={settings[field]}" for field in settings.get("search") or {}]
    return " ".join([summary["task"], summary["optimizer"], *chosen])


def _layers(folder: Path) -> dict[float, dict[str, float]]:
    """Per step, `quantity/layer` and its value."""
    layers = defaultdict(dict)
    for row in read_table(folder / "layers.csv"):
        layers[float(row["step"])][f"{row['quantity']}/{row['layer']}"] = float(row["value"])
    return layers


def _numbers(rows: Sequence[dict[str, str]]):
    for row in rows:
        yield {name: float(value) for name, value in row.items() if value != ""}
