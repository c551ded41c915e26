"""Weights & Biases as a mirror of finished records: written from their files, last, and never at a run's cost.

A mirror is an offline log in `<tracker.dir>/wandb/`, whole or not there at all; `wandb sync` uploads it and marks it as
uploaded. Online mode does so at once. A run's id is its record's hash, so that a second mirror or upload of it is none,
and an upload that broke off is simply made again. What W&B would add by itself (host, user, code, requirements, system
metrics) stays out: the record's provenance says what matters.

`python -m runners.tracking profile=quick` mirrors the final runs under `<results.root>/<profile>/runs` and uploads
every log that is not uploaded yet.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from runners.command import command, describe
from runners.config import ConfigError
from runners.record import COUNTERS, DONE, read_summary, read_table

# x-axis and the prefix of what is drawn against it; a metric has one axis, so each is logged under three names.
AXES = {"epoch": "", "train_seconds": "by_seconds/", "gradient_equivalents": "by_work/"}
# A server that does not answer is given up after some seconds; the log stays, and a later upload sends it.
PATIENCE = {
    f"WANDB_X_{client}_RETRY_{setting}": value
    for client in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
    for setting, value in (("MAX", "5"), ("WAIT_MIN_SECONDS", "0.5"), ("WAIT_MAX_SECONDS", "8"))
}
SECONDS = 60  # for an upload, and as much again for every ten runs


def mirror(folders: Iterable[Path], tracker: DictConfig) -> int:
    """Mirror the finished records that are not mirrored yet, in online mode to the server; a failure is one warning.

    Args:
        folders: of records.
        tracker: the config group `tracker`; nothing is done where its mode is null.

    Returns:
        The number of runs mirrored.
    """
    if not tracker.mode:
        return 0
    made = []
    try:
        made, failed = _write_logs([Path(folder) for folder in folders], tracker)
        if failed:
            _warn(f"{len(failed)} runs not mirrored to W&B, first {failed[0]}")
        if tracker.mode == "online":
            upload(made)
    except Exception as error:  # the record is safe: whatever W&B says, the runs go on
        _warn(f"not mirrored to W&B ({type(error).__name__}: {describe(error)[:200]})")
    return len(made)


def _warn(what: str) -> None:
    print(f"warning: {what}; type make wandb-sync", file=sys.stderr)


def logs(root: Path) -> list[Path]:
    """The folders of the offline logs under `root`, which holds the folder `wandb/`."""
    return sorted(root.glob("wandb/offline-run-*-*"))


def is_uploaded(log: Path) -> bool:
    return any(_marks(log))


def _marks(log: Path) -> Iterable[Path]:
    return log.glob("*.wandb.synced")


def _run_id(log: Path) -> str:
    return log.name.rpartition("-")[2]


def upload(logs: Sequence[Path]) -> None:
    """Send logs to the server that the user is logged in to; those already there are skipped.

    Raises:
        ConfigError: some could not be sent, with the reason that `wandb sync` gave.
    """
    waiting = [log for log in logs if not is_uploaded(log)]
    if not waiting:
        return
    program = "runners.tracking"  # sent as the run's program: without it, a path of this machine
    try:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *map(str, waiting)],
            env=os.environ | PATIENCE | {"WANDB_PROGRAM": program, "WANDB_SILENT": "false"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS * (1 + len(waiting) / 10),
        )  # fmt: skip
        said = f"{done.stdout}\n{done.stderr}".splitlines()
    except subprocess.TimeoutExpired as expired:
        said = [f"error: no answer within {expired.timeout:.0f} s"]
    errors = [line.strip() for line in said if "error" in line.lower() and "error logs" not in line]
    for log in waiting:
        if any(f"/{_run_id(log)}]" in line for line in errors):
            for mark in _marks(log):  # wandb sync marks a run even where its history did not arrive
                mark.unlink()
    left = sum(not is_uploaded(log) for log in waiting)
    if left:
        reason = errors[0] if errors else "wandb sync gave no reason"
        raise ConfigError(f"{left} of {len(waiting)} runs not uploaded ({reason[:200]})")


def _write_logs(folders: Sequence[Path], tracker: DictConfig) -> tuple[list[Path], list[str]]:
    """Logs of the finished records that have none, and which of these failed and why.

    They are written in a folder of their own, so that half of one is none.
    """
    root = Path(tracker.dir)
    present = {_run_id(log) for log in logs(root)}
    todo = [(folder, summary) for folder in folders if (summary := read_summary(folder)).get("status") in DONE]
    todo = [(folder, summary) for folder, summary in todo if folder.name not in present]
    if not todo:
        return [], []
    failed = {}
    (root / "wandb").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mirror-", dir=root / "wandb") as made:
        try:
            for folder, summary in todo:
                try:
                    _write_log(folder, summary, tracker, made)
                except Exception as error:  # one damaged record is not in the others' way
                    failed[folder.name] = f"{'/'.join(folder.parts[-3:])} ({describe(error)[:200]})"
        finally:
            _flush()
        whole = [log for log in logs(Path(made)) if _run_id(log) not in failed]
        return [log.rename(root / "wandb" / log.name) for log in whole], list(failed.values())


def _flush() -> None:
    """End the service: a finished run may still be on its way to the disk, and a reader would find half of it."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _write_log(folder: Path, summary: dict, tracker: DictConfig, root: str) -> None:
    import wandb

    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    run = wandb.init(
        project=tracker.project,
        entity=tracker.entity,
        dir=root,
        id=folder.name,
        name=f"{summary['task']} {summary['optimizer']} seed {summary['seed']}",
        group=_group(summary, config),
        job_type="trial" if summary["holdout"] else "final",
        tags=[summary["task"], summary["optimizer"], config["profile"]["name"]],
        config=config | {"provenance": summary["provenance"]},
        settings=_settings(wandb),
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


def _settings(wandb):
    return wandb.Settings(
        mode="offline",
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


def sync(cfg: DictConfig) -> None:
    """Mirror the final runs of the config's profile and upload every log that is not uploaded yet."""
    tracker = cfg.tracker
    if not tracker.mode:
        raise ConfigError("tracker=none mirrors nothing; type tracker=wandb_offline")
    records = sorted(Path(cfg.results.root, cfg.profile.name, "runs").glob("*/*/*"))
    finals = [folder for folder in records if not read_summary(folder).get("holdout")]
    _, failed = _write_logs(finals, OmegaConf.merge(tracker, {"mode": "offline"}))
    found = logs(Path(tracker.dir))
    waiting = [log for log in found if not is_uploaded(log)]
    upload(found)
    print(f"{len(waiting)} runs uploaded, {len(found) - len(waiting)} had been before")
    if failed:
        raise ConfigError(f"{len(failed)} records could not be mirrored: {'; '.join(failed[:3])}")


if __name__ == "__main__":
    command(sync)()
