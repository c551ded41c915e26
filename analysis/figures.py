"""Every figure of the protocol, for every family of tasks: figures 1-3 (curves), 4, 5, 6, 7 and 11.

Each function builds one matplotlib figure from records and returns it with the data it shows. `draw_all` writes each as
`<name>.png`, `<name>.pdf` and `<name>.csv`, in parallel processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import statistics, tables
from analysis.claims import final_values
from analysis.records import AXES, Records, load
from analysis.style import canvas, heading, legend, method_handles, order, shade, style, value_axis

AXIS_LABELS = {
    "epoch": "Epoch", "train_seconds": "Training time (s)",
    "gradient_equivalents": "Gradient equivalents", "step": "Step",
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One figure: its stable name, the task it is about ("" for all), a title, alternative text and the data shown."""

    name: str
    task: str
    title: str
    alt: str
    figure: Figure | None
    data: pd.DataFrame


# ---- shared parts --------------------------------------------------------------------------------------------------


def metric_name(records: Records, task: str) -> str:
    runs = records.runs[records.runs.task == task]
    return "Test accuracy (%)" if runs.metric.iloc[0] == "accuracy" else "Test reconstruction error"


def scale_of(records: Records, task: str, measure: str) -> tuple[float, bool]:
    """Factor for showing a measure, and whether it is an accuracy."""
    accuracy = measure == "test_metric" and records.runs[records.runs.task == task].metric.iloc[0] == "accuracy"
    return (100.0 if accuracy else 1.0), accuracy


def labels_of(records: Records, task: str) -> list[tuple[str, str, str]]:
    """(optimizer, label, kind) of each method with final runs on a task; diverged seeds are told in the label."""
    entries = []
    for _, optimizer, runs in tables.methods(records, task):
        diverged = int((runs.status == "diverged").sum())
        label = runs.label.iloc[0] + (f" ({diverged}/{len(runs)} div.)" if diverged else "")
        entries.append((optimizer, label, runs.kind.iloc[0]))
    return entries


# ---- figures 1-3: curves -------------------------------------------------------------------------------------------


def mean_curves(records: Records, task: str) -> pd.DataFrame:
    """Mean, smallest and largest value over seeds at each evaluation, by method; axes are means over seeds.

    Only evaluations that every seed reached: the mean of the seeds that survive a divergence would flatter the method.
    """
    parts = []
    for _, optimizer, runs in tables.methods(records, task):
        curves = [records.curves_by_run[run] for run in runs.run]
        length = min(len(curve) for curve in curves)
        part = {"optimizer": optimizer, "seeds": len(curves), "diverged": int((runs.status == "diverged").sum())}
        part = {key: [value] * length for key, value in part.items()} | {"evaluation": range(length)}
        for axis in AXES:
            part[axis] = np.mean([curve[axis].to_numpy()[:length] for curve in curves], axis=0)
        for measure in ("train_loss", "test_metric"):
            values = np.stack([curve[measure].to_numpy()[:length] for curve in curves])
            part |= {measure: values.mean(0), f"{measure}_low": values.min(0), f"{measure}_high": values.max(0)}
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def curves(records: Records, task: str, axis: str) -> Drawn:
    """Training loss and test metric against one axis: mean over seeds and the band of all seeds."""
    data = mean_curves(records, task)
    handles = method_handles(labels_of(records, task))
    contended = axis == "train_seconds" and records.finals[records.finals.task == task].contended.any()
    figure, axes = canvas(records.title(task), 2, note=records.surrogate(task), entries=len(handles))
    names = {"train_loss": "Training loss", "test_metric": metric_name(records, task)}
    for panel, (measure, name) in zip(axes[0], names.items(), strict=True):
        factor, accuracy = scale_of(records, task, measure)
        shown = {}
        for optimizer, rows in data.groupby("optimizer"):
            look, x = style(optimizer), rows[axis]
            low, high = rows[f"{measure}_low"] * factor, rows[f"{measure}_high"] * factor
            panel.fill_between(x, low, high, **shade(optimizer, len(handles)))
            every = max(1, len(x) // 6)
            panel.plot(x, rows[measure] * factor, markevery=(len(shown) % every, every), **look.plot(), gid=optimizer)
            if rows.diverged.iloc[0]:
                panel.plot(x.iloc[-1:], rows[measure].iloc[-1:] * factor, "x", color=look.color, markersize=8, zorder=5)
            shown[optimizer] = np.r_[low, high]
        panel.set(title=name, xlabel=AXIS_LABELS[axis] + (" — made beside other runs" if contended else ""))
        value_axis(
            panel, np.concatenate([*shown.values()]), accuracy, data[measure][data.evaluation == 0].max() * factor
        )
        panel.set_xlim(left=0)
    legend(figure, handles)
    alt = f"Training loss and {names['test_metric'].lower()} against {AXIS_LABELS[axis].lower()} on {task}, "
    alt += f"mean and range over seeds. {_best_words(records, task)}"
    return Drawn(f"curves_{axis}_{task}", task, f"{records.title(task)}: curves", alt, figure, data)


def _best_words(records: Records, task: str) -> str:
    """The final training losses in words, best first, for readers who do not see the figure."""
    table = tables.results(records, task).sort_values("train_loss_mean")
    parts = [
        f"{r.method} {'diverged' if r.diverged else tables.number(r.train_loss_mean, 3)}" for r in table.itertuples()
    ]
    return f"Final training loss: {', '.join(parts)}."


# ---- figure 4: step sizes ------------------------------------------------------------------------------------------


def step_sizes(records: Records, task: str) -> Drawn | None:
    """Per-layer step sizes over time (median over seeds), beside the tuned rates; None where no method has any."""
    found = {}
    for _, optimizer, runs in tables.methods(records, task):
        layers = pd.concat([records.layers(run) for run in runs.run])
        sizes = layers[layers.quantity == "step_size"]
        if len(sizes):
            found[optimizer] = sizes.groupby(["layer", "step"], sort=False).value.median().reset_index()
    if not found:
        return None
    figure, axes = canvas(f"{records.title(task)}: step size of each layer", len(found), note=records.surrogate(task))
    colors, rates = plt.get_cmap("viridis"), {}
    names = dict((optimizer, label) for optimizer, label, _ in labels_of(records, task))
    for panel, (optimizer, sizes) in zip(axes[0], found.items(), strict=True):
        order_of_layers = list(dict.fromkeys(sizes.layer))
        for i, layer in enumerate(order_of_layers):
            rows = sizes[sizes.layer == layer]
            positive = rows.value.where(rows.value > 0)
            color = colors(0.92 * i / max(len(order_of_layers) - 1, 1))
            every = max(1, len(rows) // 5)
            look = {"color": color, "linewidth": 1.5, "marker": "osD^vPX"[i % 7], "markersize": 4}
            look |= {"markeredgecolor": "white", "markeredgewidth": 0.5, "markevery": (i % every, every)}
            panel.plot(rows.step, positive, label=layer if len(layer) < 22 else f"…{layer[-20:]}", **look)
        for base in ("sgdm", "adamw"):
            rate = scheduled_rate(records.config(task, base), sizes.step.max(), records, task, base)
            if rate is not None:
                look = style(base).plot() | {"marker": ""}
                rates[base] = panel.plot(rate.index, rate, **look)
        panel.set(title=names[optimizer], xlabel="Step", ylabel="Step size", yscale="log")
        panel.set_xlim(left=0)
    handles = axes[0][0].get_legend_handles_labels()[0]
    if len(handles) > 12:  # a deep net: a few of its layers stand for the scale
        handles = [handles[i] for i in np.linspace(0, len(handles) - 1, 8).round().astype(int)]
    handles = [heading("Layer, first to last"), *handles]
    if rates:
        lines = [Line2D([], [], label=names[b], **(style(b).plot() | {"marker": ""})) for b in rates]
        handles += [heading(""), heading("Tuned schedule"), *lines]
    legend(figure, handles)
    data = pd.concat([sizes.assign(optimizer=name) for name, sizes in found.items()], ignore_index=True)
    last = data[data.step == data.groupby("optimizer").step.transform("max")]
    ranges = last.groupby("optimizer").value.agg(["min", "max"])
    alt = f"Step size of each layer over training steps on {task}, median over seeds. At the end: "
    alt += "; ".join(f"{names[o]} from {r['min']:.2g} to {r['max']:.2g}" for o, r in ranges.iterrows()) + "."
    return Drawn(f"step_sizes_{task}", task, f"{records.title(task)}: per-layer step sizes", alt, figure, data)


def scheduled_rate(config: dict, last_step: float, records: Records, task: str, optimizer: str) -> pd.Series | None:
    """The tuned method's learning rate by step under its schedule (constant or stepwise); None where it has none."""
    rate = (config.get("optimizer") or {}).get("lr")
    if not isinstance(rate, int | float):
        return None
    schedule, steps = config.get("schedule") or {}, np.linspace(0, last_step, 200)
    if schedule.get("_target_") and not {"step_size", "gamma"} <= set(schedule):
        return None
    runs = records.finals[(records.finals.task == task) & (records.finals.optimizer == optimizer)]
    per_epoch = (runs.steps / runs.epochs).median()
    decays = (steps / per_epoch) // schedule["step_size"] if "step_size" in schedule else 0
    return pd.Series(rate * schedule.get("gamma", 1.0) ** (decays * np.ones_like(steps)), index=steps)


# ---- figure 5: sensitivity; figure 11: best of K -------------------------------------------------------------------


def trial_values(records: Records, task: str) -> pd.DataFrame:
    """Tuning trials of a task with their final values; infinite losses (zero accuracy) for what did not finish.

    `rate` is the learning rate, or the first searched field of a method without one.
    """
    trials = records.trials[records.trials.task == task].copy()
    runs = records.runs.set_index("run")
    finished = trials.run.isin(runs.index) & (trials.status == "finished")
    for measure in ("train_loss", "test_metric"):
        worst = -np.inf if scale_of(records, task, measure)[1] else np.inf
        values = runs[f"final_{measure}"].reindex(trials.run).to_numpy()
        trials[measure] = np.where(finished, values, worst)
    trials["rate"] = [v.get("lr", next(iter(v.values()), np.nan)) for v in trials["values"]]
    trials["fields"] = [len(v) for v in trials["values"]]
    return trials


def untuned(records: Records, task: str) -> dict[str, pd.DataFrame]:
    """Final runs of the methods without any trial on a task, by method: the flat lines."""
    return {o: r for _, o, r in tables.methods(records, task) if not r.tuning.iloc[0].get("trials")}


def sensitivity(records: Records, task: str) -> Drawn | None:
    """Final value against the searched rate; methods without trials as flat lines; None without a search."""
    trials = trial_values(records, task)
    if not len(trials):
        return None
    flat = untuned(records, task)
    shown = set(trials.optimizer) | set(flat)
    handles = method_handles([entry for entry in labels_of(records, task) if entry[0] in shown])
    note, entries = records.surrogate(task), len(handles) + 3
    figure, axes = canvas(f"{records.title(task)}: sensitivity to the learning rate", 2, note=note, entries=entries)
    names = {"train_loss": "Final training loss", "test_metric": "Final " + metric_name(records, task).lower()}
    span = trials.rate.min(), trials.rate.max()
    for panel, (measure, name) in zip(axes[0], names.items(), strict=True):
        factor, accuracy = scale_of(records, task, measure)
        levels = {o: final_values(runs, measure).mean(skipna=False) * factor for o, runs in flat.items()}
        finite = trials[measure].where(np.isfinite(trials[measure])) * factor
        value_axis(panel, [*finite, *levels.values()], accuracy, _first_value(records, task, measure) * factor)
        edge = panel.get_ylim()[0 if accuracy else 1]
        for optimizer, rows in trials.sort_values("rate").groupby("optimizer"):
            look, y = style(optimizer), finite.reindex(rows.index)
            line = look.plot() | ({"linestyle": "none"} if rows.fields.max() > 1 else {})
            panel.plot(rows.rate, y, **line, gid=optimizer)
            if rows.score.notna().any():
                best = rows.score.idxmax() if rows["mode"].iloc[0] == "max" else rows.score.idxmin()
                panel.plot(rows.rate[best], y[best], "o", color="none", markeredgecolor=look.color, markersize=11)
            lost = rows.rate[y.isna()]
            panel.plot(lost, np.full(len(lost), edge), "x", color=look.color, markersize=7, clip_on=False, zorder=5)
        for optimizer, level in levels.items():
            panel.plot(span, [level, level], **(style(optimizer).plot() | {"marker": ""}), gid=optimizer)
        panel.set(title=name, xlabel="Learning rate", xscale="log")
    selected = Line2D([], [], linestyle="none", marker="o", markersize=9, color="none", label="selected")
    selected.set_markeredgecolor("#444444")
    diverged = Line2D([], [], linestyle="none", marker="x", color="#444444", label="diverged")
    legend(figure, [*handles, heading(""), selected, diverged])
    widths = {o: _width(rows) for o, rows in trials.groupby("optimizer")}
    labels = dict((o, label) for o, label, _ in labels_of(records, task))
    alt = f"Final value against the learning rate of each trial on {task}; methods without trials are flat lines. "
    alt += "Decades of rates within 10 % of the best training loss: "
    alt += ", ".join(f"{labels.get(o, o)} {tables.number(w, 2)}" for o, w in widths.items()) + "."
    data = trials.drop(columns=["values", "fields"])
    return Drawn(f"sensitivity_{task}", task, f"{records.title(task)}: sensitivity", alt, figure, data)


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
    shown = set(trials.optimizer) | set(flat)
    handles = method_handles([entry for entry in labels_of(records, task) if entry[0] in shown])
    note, entries = records.surrogate(task), len(handles)
    figure, axes = canvas(f"{records.title(task)}: best of k trials", 2, note=note, entries=entries)
    names = {"train_loss": "Final training loss", "test_metric": "Final " + metric_name(records, task).lower()}
    parts = []
    for panel, (measure, name) in zip(axes[0], names.items(), strict=True):
        factor, accuracy = scale_of(records, task, measure)
        for optimizer, rows in trials.groupby("optimizer"):
            low, middle, high = statistics.best_of_k(rows.score, rows[measure], rows["mode"].iloc[0] == "max")
            part = {"optimizer": optimizer, "measure": measure, "k": np.arange(1, len(rows) + 1)}
            parts.append(pd.DataFrame(part | {"first_quartile": low, "median": middle, "third_quartile": high}))
        for optimizer, runs in flat.items():
            value = final_values(runs, measure).mean(skipna=False)
            part = {"optimizer": optimizer, "measure": measure, "k": [0], "first_quartile": value}
            parts.append(pd.DataFrame(part | {"median": value, "third_quartile": value}))
        data = pd.concat(parts, ignore_index=True)
        here = data[data.measure == measure]
        values = here[["first_quartile", "median", "third_quartile"]].to_numpy() * factor
        value_axis(panel, values, accuracy, _first_value(records, task, measure) * factor)
        bottom, top = panel.get_ylim()
        for optimizer, rows in here.groupby("optimizer"):
            look = style(optimizer)
            if optimizer in flat:
                level = [rows["median"].iloc[0] * factor] * 2
                panel.plot([0, here.k.max()], level, **look.plot(), markevery=[0], clip_on=False, gid=optimizer)
                continue
            low, middle, high = (rows[c] * factor for c in ("first_quartile", "median", "third_quartile"))
            if len(handles) <= 8:  # more bands than that would hide the lines
                panel.fill_between(rows.k, low.clip(bottom, top), high.clip(bottom, top), **shade(optimizer, 1))
            panel.plot(rows.k, middle.where(np.isfinite(middle)), **look.plot(), gid=optimizer)
        panel.set(title=name, xlabel="Trials k", xlim=(-0.15, here.k.max() + 0.15))
        panel.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, handles)
    alt = f"Median final value that k tuning trials give on {task}, with quartiles; methods without trials start at 0. "
    alt += "Trial runs train on what tuning leaves of the training set, the methods without trials on all of it."
    return Drawn(f"best_of_k_{task}", task, f"{records.title(task)}: best of k trials", alt, figure, data)


# ---- figure 6: performance profiles; figure 7: cost ----------------------------------------------------------------


def performance_profiles(records: Records) -> Drawn | None:
    """Share of tasks solved within τ times the best cost, by target (rows) and cost (columns)."""
    costs = tables.costs_to_target(records)
    if not len(costs):
        return None
    n = costs.task.nunique()
    figure, axes = canvas(
        f"Performance profiles over {n} task{'s' * (n > 1)}", 3, 2, 2.9, entries=costs.optimizer.nunique() + 3
    )
    taus, parts, drawn = np.linspace(1, statistics.TAU, 301), [], set()
    for row, (measure, words) in zip(
        axes, {"train_loss": "training loss", "test_metric": "test metric"}.items(), strict=True
    ):
        for panel, cost in zip(row, tables.COSTS, strict=True):
            name = AXIS_LABELS[cost].removesuffix(" (s)").lower() if cost != "step" else "steps"
            panel.set(title=f"{name} to target {words}", xlabel="τ (times the best)", ylim=(-0.03, 1.03))
            panel.set(xlim=(1, statistics.TAU), ylabel="share of tasks" if panel is row[0] else None)
            table = tables.median_costs(costs, measure, cost)
            if not len(table.columns):
                panel.text(2.5, 0.5, "not shown: runs were made\nbeside others", ha="center", va="center", color="#777")
                continue
            shares = statistics.performance_profile(table.to_numpy(), taus)
            areas = statistics.profile_area(table.to_numpy())
            for optimizer, share, area in zip(table.columns, shares.T, areas, strict=True):
                look = style(optimizer).plot() | {
                    "markevery": (10 + 7 * (len(drawn) % 9), 75),
                    "drawstyle": "steps-post",
                }
                panel.plot(taus, share, **look, gid=optimizer)
                parts.append(
                    {"measure": measure, "cost": cost, "optimizer": optimizer, "area": area, "tasks": len(table)}
                )
                drawn.add(optimizer)
    data = pd.DataFrame(parts)
    entries = {entry[0]: (*entry[:2], entry[2]) for task in records.tasks for entry in labels_of(records, task)}
    names = {o: records.finals[records.finals.optimizer == o].label.iloc[0] for o in drawn}
    legend(figure, method_handles([(o, names[o], entries[o][2]) for o in order(drawn)]))
    best = data[data.cost == "gradient_equivalents"].sort_values("area", ascending=False) if len(data) else data
    words = ", ".join(f"{names[r.optimizer]} {r.area:.2f}" for r in best[best.measure == "train_loss"].itertuples())
    alt = "Performance profiles: share of tasks on which each method reaches the target within τ times the best cost. "
    alt += f"Area to τ = 4 for training loss in gradient equivalents: {words}."
    return Drawn("performance_profiles", "", "Performance profiles", alt, figure, data)


def cost(records: Records) -> Drawn | None:
    """Time and peak memory per step relative to SGD-m, a point per task; None without SGD-m."""
    table = tables.results(records)
    table = table[table.memory_ratio.notna() | table.time_ratio.notna()] if len(table) else table
    if not len(table):
        return None
    # Times count only where nothing else ran; a task with any contended run has no ratio of times.
    timed = ~table.task.isin(table.task[table.contended])
    table = table.assign(time_ratio=table.time_ratio.where(timed))
    optimizers = order(table.optimizer)
    names = table.drop_duplicates("optimizer").set_index("optimizer").method
    marks = dict(zip(table.task.unique(), "osD^vP*Xhd<>p", strict=False))
    figure, axes = canvas("Cost of a step relative to SGD-m", 2, height=0.27 * len(optimizers) + 1.25)
    figure.subplots_adjust(left=1.35 / figure.get_size_inches()[0])
    parts = (("time_ratio", "Time per step", 2.0, "SGD-m + one gradient"),
             ("memory_ratio", "Peak memory", 1.25, "comparable"))  # fmt: skip
    for panel, (column, name, limit, words) in zip(axes[0], parts, strict=True):
        panel.set_title(name, pad=14)
        panel.set(yticks=range(len(optimizers)), ylim=(len(optimizers) - 0.5, -0.5), xlabel="times SGD-m")
        panel.set_yticklabels([names[o] for o in optimizers] if panel is axes[0][0] else [])
        panel.grid(axis="y", visible=False)
        _ratios(panel, table, column, optimizers, marks, limit, words)
    tick = Line2D([], [], color="#555555", linewidth=2, label="geometric mean")
    points = {"linestyle": "none", "color": "#555555", "markersize": 5}
    legend(figure, [*(Line2D([], [], marker=m, label=_short(t), **points) for t, m in marks.items()), tick])
    alt = "Time and peak memory per step relative to SGD-m. Geometric means over tasks: "
    means = table.groupby("optimizer")[["time_ratio", "memory_ratio"]].agg(_geometric_mean).map(tables.number, digits=3)
    alt += "; ".join(f"{names[o]} {means.time_ratio[o]} × time, {means.memory_ratio[o]} × memory" for o in optimizers)
    columns = ["task", "optimizer", "time_ratio", "memory_ratio", "seconds_per_step", "peak_memory_mb", "contended"]
    return Drawn("cost", "", "Cost of a step", alt + ".", figure, table[columns])


def _ratios(panel, table, column: str, optimizers: list[str], marks: dict, limit: float, words: str) -> None:
    """One method per row: a point per task, a tick and a number for the geometric mean."""
    known = table[table[column].notna()]
    if not len(known):
        panel.set_xticks([])
        panel.text(0.5, 0.5, "not shown: runs were made\nbeside others", ha="center", va="center",
                   transform=panel.transAxes, color="#777777")  # fmt: skip
        return
    panel.axvline(1, color="#444444", linewidth=0.8)
    panel.axvline(limit, color="#999999", linewidth=0.8, linestyle=(0, (3, 2)))
    panel.text(limit, 1.01, words, transform=panel.get_xaxis_transform(), ha="center", fontsize=7, color="#777777")
    panel.set_xlim(0, max(limit, known[column].max()) * 1.22)
    point = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 3}
    for y, optimizer in enumerate(optimizers):
        rows, color = known[known.optimizer == optimizer], style(optimizer).color
        for row in rows.itertuples():
            panel.plot(getattr(row, column), y, marks.get(row.task, "o"), color=color, **point)
        if len(rows):
            middle = _geometric_mean(rows[column])
            panel.plot([middle] * 2, [y - 0.32, y + 0.32], color=color, linewidth=2, zorder=2)
            panel.text(0.99, y, f"{middle:.2f}", transform=panel.get_yaxis_transform(), ha="right", va="center",
                       fontsize=7.5, color="#444444")  # fmt: skip


def _geometric_mean(values: pd.Series) -> float:
    return float(np.exp(np.log(values).mean()))


def _short(task: str) -> str:
    return task.replace("autoencoder_", "ae_")


# ---- all of them ---------------------------------------------------------------------------------------------------


def jobs(records: Records) -> dict[str, tuple[Callable, tuple]]:
    """Every figure that the records may show, in the report's order: its stable name, function and arguments."""
    tasks = [task for task in records.tasks if (records.finals.task == task).any()]
    found = {"performance_profiles": (performance_profiles, ()), "cost": (cost, ())} if tasks else {}
    for task in tasks:
        found |= {f"curves_{axis}_{task}": (curves, (task, axis)) for axis in AXES}
        found |= {f"{draw.__name__}_{task}": (draw, (task,)) for draw in (step_sizes, sensitivity, best_of_k)}
    return found


def draw_all(records: Records, folder: Path, names: list[str] | None = None) -> list[Drawn]:
    """Write figures (all, or those named) as PNG, PDF and CSV; what is returned carries no matplotlib figure.

    Raises:
        ValueError: a name that these records have no figure for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = jobs(records)
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"no figure {', '.join(unknown)}; there are {', '.join(known)}")
    work = [known[name] for name in names or known]
    processes = min(os.cpu_count() or 1, len(work), 8)
    if processes < 2:
        drawn = [_draw(records, folder, *job) for job in work]
    else:
        # Forked where that exists: the records are shared, and nothing is imported a second time.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(processes, context, initializer=_share, initargs=(records, folder)) as pool:
            drawn = list(pool.map(_draw_shared, work))
    return [figure for figure in drawn if figure is not None]


def _share(records: Records, folder: Path) -> None:
    global _SHARED
    _SHARED = records, folder


def _draw_shared(job: tuple[Callable, tuple]) -> Drawn | None:
    return _draw(*_SHARED, *job)


def _draw(records: Records, folder: Path, function: Callable, arguments: tuple) -> Drawn | None:
    drawn = function(records, *arguments)
    if drawn is None:
        return None
    drawn.figure.savefig(folder / f"{drawn.name}.png", metadata={"Software": None})
    drawn.figure.savefig(
        folder / f"{drawn.name}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None}
    )
    plt.close(drawn.figure)
    drawn.data.to_csv(folder / f"{drawn.name}.csv", index=False, float_format="%.8g")
    return Drawn(drawn.name, drawn.task, drawn.title, drawn.alt, None, drawn.data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.figures", description="Draw figures again.")
    parser.add_argument("root", type=Path, help="a results folder, such as results/quick")
    parser.add_argument("names", nargs="*", help="figures by name; all without any")
    parser.add_argument("--out", type=Path, help="default: <root>/report/figures")
    arguments = parser.parse_args()
    folder = arguments.out or arguments.root / "report" / "figures"
    try:
        for drawn in draw_all(load(arguments.root), folder, arguments.names):
            print(folder / f"{drawn.name}.pdf")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
