"""A run's record: one folder of files that analysis, the tracker and a rerun read. The format, version 1:

`config.yaml`   the resolved config, less where it was run.
`metrics.csv`   one row per evaluation, from step 0 (before training) on; an undefined value is an empty cell.
    step                    optimizer steps taken
    epoch                   passes over the training set (a fraction where a budget ends within one)
    train_seconds           training time alone: no evaluation, no logging, no checkpoint; kept across resumes
    gradient_equivalents    work by construction of the method: one forward and one full backward make 1
    train_loss, val_loss, test_loss     mean over the whole split, evaluation mode, no decay term
    val_<metric>, test_<metric>         accuracy (share, 0 to 1) or error (squared reconstruction error per example)
`layers.csv`    for methods that have diagnostics: `step, epoch, layer, quantity, value`, a row per number.
`summary.json`  written when a run ends, whichever way: see `runners.trainer`. Keys:
    record_version, status (finished | diverged | interrupted | failed), message (of a failed run, else null)
    task, family, optimizer, label, kind, seed, holdout (true: a tuning trial), surrogate (str or null)
    final, best             {column: value} of the losses and metrics: last finite row; best of each column over the run
    steps, epochs, train_seconds, seconds_per_step, gradient_equivalents
    wall_seconds            of the whole run: training, evaluation, checkpoints
    peak_memory_bytes       of training, less the data set: see `runners.memory`
    contended               true: something else ran beside it, its times do not count
    diverged_at             step whose loss (or after which the evaluation) was not finite, or null
    diverged_in             layer in which the first number was found that is not finite, or null where not known
    tuning                  {trials, selected: {field: value}, on_edge} of the search behind the settings, or null
    provenance              {commit, dirty, versions, device, driver, threads, created}; no host, user or path
`error.txt`     of a failed run: where the error came from.
`checkpoint.pt` the model's weights; tuning trials keep none. While running, in its place `checkpoint-<n>-<digest>.pt`:
                everything to go on from, and the one before it. `.owner` is there as long as a process makes the run.

Every file is replaced whole: a reader, or a kill at any moment, sees the old one or the new one. While a run lasts its
tables are those of its last checkpoint.
A record whose status is finished or diverged never changes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path

from data.files import replace_file

RECORD_VERSION = 1
COUNTERS = ("step", "epoch", "train_seconds", "gradient_equivalents")
LAYER_COLUMNS = ("step", "epoch", "layer", "quantity", "value")
DONE = ("finished", "diverged")


def write_json(path: Path, content: dict) -> None:
    """Replace `path` by `content`; numbers that are not finite become null, as JSON has none."""
    replace_file(path, lambda file: file.write_text(json.dumps(_finite(content), indent=1) + "\n"))


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Replace `path` by a CSV table; None becomes an empty cell, floats keep every bit."""

    def write(file: Path) -> None:
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)

    replace_file(path, write)


def read_summary(folder: Path) -> dict:
    """The summary in a record's folder; {} where there is none that can be read."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def is_done(folder: Path) -> bool:
    """Whether the run of this folder has its result and is not to be made again."""
    return read_summary(folder).get("status") in DONE


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV table, as text; [] where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def columns(metric: str) -> tuple[str, ...]:
    """The columns of `metrics.csv` for a task whose metric has this name."""
    return (*COUNTERS, "train_loss", "val_loss", "test_loss", f"val_{metric}", f"test_{metric}")


def final_and_best(rows: list[dict], metric: str, mode: str) -> tuple[dict, dict]:
    """The last row's losses and metrics, and the best of each over all rows."""
    names = [name for name in columns(metric) if name not in COUNTERS]
    final = {name: rows[-1][name] for name in names} if rows else {}
    best = {}
    for name in names:
        choose = max if name.endswith(metric) and mode == "max" else min
        best[name] = choose((row[name] for row in rows if row[name] is not None), default=None)
    return final, best


def _finite(node):
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
