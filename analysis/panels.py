"""What figures share: their measures and methods, and panels of few methods each where there are many."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import tables
from analysis.records import Records
from analysis.style import group, multiples

AXIS_LABELS = {
    "epoch": "Epoch", "train_seconds": "Training time (s)",
    "gradient_equivalents": "Gradient equivalents", "step": "Step",
}  # fmt: skip
MEASURES = ("train_loss", "test_metric")
CROWD = 8  # methods that one panel can hold


@dataclass(frozen=True)
class Drawn:
    """One figure: its stable name, the task it is about ("" for all), a title, alternative text and the data shown."""

    name: str
    task: str
    title: str
    alt: str
    figure: Figure | None
    data: pd.DataFrame


@dataclass(frozen=True)
class Panel:
    """One panel: what it measures, and the (optimizer, label, group) of the methods it shows."""

    axis: Axes
    measure: str
    methods: list[tuple[str, str, str]]


def metric_name(records: Records, task: str) -> str:
    runs = records.runs[records.runs.task == task]
    return "Test accuracy (%)" if runs.metric.iloc[0] == "accuracy" else "Test reconstruction error"


def measure_names(records: Records, task: str, first: str = "") -> dict[str, str]:
    """The two measures of a task by key, each name led by the word `first` (such as "Final")."""
    names = {"train_loss": "Training loss", "test_metric": metric_name(records, task)}
    return {key: f"{first} {name.lower()}" if first else name for key, name in names.items()}


def scale_of(records: Records, task: str, measure: str) -> tuple[float, bool]:
    """Factor for showing a measure, and whether it is an accuracy."""
    accuracy = measure == "test_metric" and records.runs[records.runs.task == task].metric.iloc[0] == "accuracy"
    return (100.0 if accuracy else 1.0), accuracy


def methods_of(records: Records, task: str) -> list[tuple[str, str, str]]:
    """(optimizer, label, group) of each method with final runs on a task; diverged seeds are told in the label."""
    entries = []
    for _, optimizer, runs in tables.methods(records, task):
        diverged = int((runs.status == "diverged").sum())
        label = runs.label.iloc[0] + (f" ({diverged}/{len(runs)} div.)" if diverged else "")
        entries.append((optimizer, label, group(optimizer, runs.kind.iloc[0])))
    return entries


def panels(title: str, measures: dict[str, str], methods: list[tuple[str, str, str]], note: str = ""):
    """A figure with a panel per measure; of more than `CROWD` methods, a column per group, layer-wise ones in each.

    Returns:
        The figure and its panels, row by row.
    """
    if len(methods) <= CROWD:
        figure, axes = multiples(title, 1, len(measures), plot=3.2, note=note)
        for axis, name in zip(axes[0], measures.values(), strict=True):
            axis.set_title(name)
        return figure, [Panel(axis, key, methods) for axis, key in zip(axes[0], measures, strict=True)]
    columns = dict.fromkeys(of for *_, of in methods if of != "Layer-wise")
    figure, axes = multiples(title, len(measures), len(columns), note=note)
    found = []
    for row, (key, name) in zip(axes, measures.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, of in zip(row, columns, strict=True):
            axis.set_title(of)
            axis.tick_params(labelleft=axis is row[0])  # all panels of a row have the same limits
            found.append(Panel(axis, key, [entry for entry in methods if entry[2] in ("Layer-wise", of)]))
    return figure, found
