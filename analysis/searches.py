"""Figures 5 and 11: what the learning rate does to the result, and what a user with k trials gets."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from analysis import statistics, tables
from analysis.comparisons import final_values
from analysis.panels import CROWD, MEASURES, Drawn, Panel, measure_names, methods_of, panels, scale_of
from analysis.records import Records
from analysis.style import heading, method_handles, names_at_ends, shade, style, value_axis


def trial_values(records: Records, task: str) -> pd.DataFrame:
    """Tuning trials of a task with their final values; infinite losses (zero accuracy) for what did not finish.

    `rate` is the learning rate, or the first searched field of a method without one; `selected` marks the one that was
    chosen; equal scores are told apart by validation loss, as they were then. One whose run is not to be read is left
    out.
    """
    trials, runs = records.trials[records.trials.task == task], records.runs.set_index("run")
    finished = trials.status == "finished"
    trials = trials[~finished | trials.run.isin(runs.index)].copy()
    finished = trials.status == "finished"
    chosen = {
        search.optimizer: search.selected for search in records.tunings[records.tunings.task == task].itertuples()
    }
    trials["selected"] = [row["values"] == chosen.get(row["optimizer"]) for _, row in trials.iterrows()]
    trials["val_loss"] = runs.final_val_loss.reindex(trials.run).to_numpy()
    for measure in MEASURES:
        worst = -np.inf if scale_of(records, task, measure)[1] else np.inf
        values = runs[f"final_{measure}"].reindex(trials.run).to_numpy()
        trials[measure] = np.where(finished, values, worst)
    trials["rate"] = [v.get("lr", next(iter(v.values()), np.nan)) for v in trials["values"]]
    trials["fields"] = [len(v) for v in trials["values"]]
    return trials


def untuned(records: Records, task: str) -> dict[str, pd.DataFrame]:
    """Final runs of the methods without any trial on a task, by method: the flat lines."""
    return {o: r for _, o, r in tables.methods(records, task) if not tables.tuning_of(r).get("trials")}


def sensitivity(records: Records, task: str) -> Drawn | None:
    """Final value against the searched rate; methods without trials as flat lines; None without a search."""
    trials = trial_values(records, task)
    if not len(trials):
        return None
    flat = untuned(records, task)
    methods = [entry for entry in methods_of(records, task) if entry[0] in {*trials.optimizer, *flat}]
    title = f"{records.title(task)}: sensitivity to the learning rate"
    figure, found = panels(title, measure_names(records, task, "Final"), methods, records.surrogate(task))
    for panel in found:
        _sensitivity(records, task, panel, trials, flat)
    for panel in found[1:] if len(methods) <= CROWD else [p for p in found if p.measure == "train_loss"]:
        _key(panel)
    widths = {o: _width(rows) for o, rows in trials.groupby("optimizer")}
    labels = dict((o, label) for o, label, _ in methods)
    alt = f"Final value against the learning rate of each trial on {task}; methods without trials are flat lines. "
    alt += "Decades of rates within 10 % of the best training loss: "
    alt += ", ".join(f"{labels.get(o, o)} {tables.number(w, 2)}" for o, w in widths.items()) + "."
    data = trials.drop(columns=["values", "fields", "val_loss"])
    return Drawn(f"sensitivity_{task}", task, f"{records.title(task)}: sensitivity", alt, figure, data)


def _sensitivity(records: Records, task: str, panel: Panel, trials: pd.DataFrame, flat: dict) -> None:
    axis, (factor, accuracy) = panel.axis, scale_of(records, task, panel.measure)
    levels = {o: final_values(runs, panel.measure).mean(skipna=False) * factor for o, runs in flat.items()}
    finite = trials[panel.measure].where(np.isfinite(trials[panel.measure])) * factor
    value_axis(axis, [*finite, *levels.values()], accuracy, _first_value(records, task, panel.measure) * factor)
    edge = axis.get_ylim()[0 if accuracy else 1]
    searches = dict(tuple(trials.sort_values("rate").groupby("optimizer")))
    for optimizer, *_ in panel.methods:
        look, rows = style(optimizer), searches.get(optimizer)
        if optimizer in levels:
            level = [levels[optimizer]] * 2
            axis.plot([trials.rate.min(), trials.rate.max()], level, **(look.plot() | {"marker": ""}), gid=optimizer)
        if rows is None:
            continue
        y = finite.reindex(rows.index)
        axis.plot(rows.rate, y, **look.plot() | ({"linestyle": "none"} if rows.fields.max() > 1 else {}), gid=optimizer)
        axis.plot(
            rows.rate[rows.selected], y[rows.selected], "o", color="none", markeredgecolor=look.color, markersize=11
        )
        lost = rows.rate[y.isna()]
        axis.plot(lost, np.full(len(lost), edge), "x", color=look.color, markersize=7, clip_on=False, zorder=5)
    axis.set(xlabel="Learning rate", xscale="log", xlim=(trials.rate.min() / 1.5, trials.rate.max() * 1.5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _key(panel: Panel) -> None:
    """The names of a panel's methods on its right, and what its marks mean."""
    selected = Line2D([], [], linestyle="none", marker="o", markersize=9, color="none", label="selected")
    selected.set_markeredgecolor("#444444")
    diverged = Line2D([], [], linestyle="none", marker="x", color="#444444", label="diverged")
    handles = [*method_handles(panel.methods), heading(""), selected, diverged]
    box = panel.axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.03), handlelength=2, fontsize=7)
    for handle, text in zip(handles, box.get_texts(), strict=True):
        if handle.get_gid() == "heading":
            text.set_color("#666666")


def _width(rows: pd.DataFrame) -> float:
    return statistics.sensitivity_width(rows.rate, rows.train_loss)


def _first_value(records: Records, task: str, measure: str) -> float:
    """The largest value before training: where a value axis may end."""
    runs = records.finals[records.finals.task == task].run
    return max((records.curves_by_run[run][measure].iloc[0] for run in runs), default=np.nan)


def best_of_k(records: Records, task: str) -> Drawn | None:
    """What a user with k trials gets: median and quartiles over all choices of k trials; None without a search."""
    trials = trial_values(records, task)
    if not len(trials):
        return None
    flat = untuned(records, task)
    methods = [entry for entry in methods_of(records, task) if entry[0] in {*trials.optimizer, *flat}]
    data = pd.concat([_best_of_k(trials, flat, measure) for measure in MEASURES], ignore_index=True)
    title = f"{records.title(task)}: best of k trials"
    figure, found = panels(title, measure_names(records, task, "Final"), methods, records.surrogate(task))
    for panel in found:
        factor, accuracy = scale_of(records, task, panel.measure)
        here = data[data.measure == panel.measure].set_index("optimizer")
        value_axis(panel.axis, here["median"] * factor, accuracy, _first_value(records, task, panel.measure) * factor)
        bottom, top = panel.axis.get_ylim()
        panel.axis.set(xlabel="Trials k", xlim=(-0.15, here.k.max() + 0.15))
        panel.axis.xaxis.get_major_locator().set_params(integer=True)
        ends = []
        for optimizer, label, _ in panel.methods:
            rows, look = here.loc[[optimizer]], style(optimizer)
            low, middle, high = (rows[c].to_numpy() * factor for c in ("first_quartile", "median", "third_quartile"))
            middle = np.where(np.isfinite(middle), middle, np.nan)
            if optimizer in flat:
                panel.axis.plot([0, here.k.max()], middle.repeat(2), **look.plot(), markevery=[0], gid=optimizer)
            else:
                if len(methods) <= CROWD:  # bands of more would hide the lines
                    band = shade(optimizer, len(methods))
                    panel.axis.fill_between(rows.k, np.clip(low, bottom, top), np.clip(high, bottom, top), **band)
                panel.axis.plot(rows.k, middle, **look.plot(), gid=optimizer)
            ends.append((optimizer, label, here.k.max() if optimizer in flat else rows.k.max(), middle[-1]))
        names_at_ends(panel.axis, ends)
    alt = f"Median final value that k tuning trials give on {task}, with quartiles; methods without trials start at 0. "
    alt += "Trial runs train on what tuning leaves of the training set, the methods without trials on all of it."
    return Drawn(f"best_of_k_{task}", task, f"{records.title(task)}: best of k trials", alt, figure, data)


def _best_of_k(trials: pd.DataFrame, flat: dict[str, pd.DataFrame], measure: str) -> pd.DataFrame:
    parts = []
    for optimizer, rows in trials.sort_values("val_loss").groupby("optimizer"):
        low, middle, high = statistics.best_of_k(rows.score, rows[measure], rows["mode"].iloc[0] == "max")
        part = {"optimizer": optimizer, "measure": measure, "k": np.arange(1, len(rows) + 1)}
        parts.append(pd.DataFrame(part | {"first_quartile": low, "median": middle, "third_quartile": high}))
    for optimizer, runs in flat.items():
        value = final_values(runs, measure).mean(skipna=False)
        part = {"optimizer": optimizer, "measure": measure, "k": [0], "first_quartile": value}
        parts.append(pd.DataFrame(part | {"median": value, "third_quartile": value}))
    return pd.concat(parts, ignore_index=True)
