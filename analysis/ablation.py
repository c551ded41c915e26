"""The table of an ablation: `python -m analysis.ablation results/ablation/own`.

A row per task, method and value of what was varied: the settings in which runs of one method on one task differ. Of a
method's versions the latest counts. Writes `ablation.csv` into the folder and prints it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from analysis.records import Records, load
from analysis.tables import number, to_markdown


def ablation(records: Records) -> pd.DataFrame:
    """Final values by varied setting.

    Returns:
        `task, optimizer`, a column per varied setting, then `n` finished and `diverged` runs, and mean and standard
        deviation over the finished ones of `train_loss` and of the test metric, and the method's `version`.

    Raises:
        ValueError: nothing varies between the runs, or something else than the method's settings does.
    """
    runs = records.runs[~records.runs.holdout & records.runs.status.isin(["finished", "diverged"])]
    runs = (
        runs.sort_values("created").drop_duplicates(["task", "optimizer", "variant", "seed"], keep="last").sort_index()
    )
    if not runs.config.map(lambda config: bool(config.get("optimizer"))).all():
        raise ValueError(f"runs in {records.root} have no config.yaml that says what varies")
    version = runs.config.map(lambda config: config["optimizer"]["about"]["version"])
    latest = version == version.groupby([runs.task, runs.optimizer]).transform("max")
    runs, version = runs[latest], version[latest]
    _check_alike(runs)
    settings = pd.json_normalize(runs.config.map(_optimizer).tolist()).set_index(runs.index).astype(str).fillna("null")
    differ = settings.groupby([runs.task, runs.optimizer]).nunique().max()
    varied = list(differ[differ > 1].index)
    if not varied:
        raise ValueError(f"no optimizer setting differs between the runs in {records.root}")
    finished = runs.status == "finished"
    columns = {
        name: runs[f"final_{name}"].where(finished).astype(float) for name in ("train_loss", "test_metric")
    }  # a run that diverged has no final value
    table = pd.DataFrame({"task": runs.task, "optimizer": runs.optimizer} | settings[varied].to_dict("series"))
    groups = table.assign(**columns, finished=finished, version=version).groupby(["task", "optimizer", *varied])
    return pd.DataFrame(
        {"n": groups.finished.sum(), "diverged": groups.finished.count() - groups.finished.sum()}
        | {f"{name}_{what}": getattr(groups[name], what)() for name in columns for what in ("mean", "std")}
        | {"version": groups.version.first()}
    ).reset_index()


def _check_alike(runs: pd.DataFrame) -> None:
    """Runs of other budgets, tasks or schedules are no comparison of a method's settings."""
    for part in ("task", "budget", "schedule"):
        forms = runs.config.map(lambda config, part=part: json.dumps(config.get(part), sort_keys=True, default=str))
        for (task, optimizer), count in forms.groupby([runs.task, runs.optimizer]).nunique().items():
            if count > 1:
                raise ValueError(
                    f"the runs of {optimizer} on {task} differ in {part}, too: "
                    "make each ablation in a folder of its own (results.root)"
                )


def without_effect(table: pd.DataFrame) -> list[str]:
    """Cases in which all values of what was varied gave the same: it did not act in so few steps, or at all."""
    groups = table.groupby(["task", "optimizer"])
    same = (groups.train_loss_mean.nunique() == 1) & (groups.size() > 1)
    return [f"{optimizer} on {task}" for task, optimizer in same[same].index]


def _optimizer(config: dict) -> dict:
    return {name: value for name, value in config["optimizer"].items() if name not in ("about", "search")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.ablation", description="Table of an ablation.")
    parser.add_argument("root", type=Path, help="a results folder, such as results/ablation/own")
    root = parser.parse_args().root
    try:
        table = ablation(load(root))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    table.to_csv(root / "ablation.csv", index=False, float_format="%.6g")
    for case in without_effect(table):
        print(f"warning: {case} ended alike with every value, to the last digit", file=sys.stderr)
    print(to_markdown(table.map(lambda value: number(value) if isinstance(value, float) else str(value))), end="")


if __name__ == "__main__":
    main()
