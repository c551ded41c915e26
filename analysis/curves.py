"""Figures 1-4 and 10: curves, step sizes of layers, and what the scale of curvature rescaling does."""

from __future__ import annotations

from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from analysis import tables
from analysis.panels import AXIS_LABELS, MEASURES, Drawn, measure_names, methods_of, panels, scale_of
from analysis.reading import AXES
from analysis.records import Records
from analysis.style import canvas, heading, legend, log_axis, names_at_ends, shade, style, value_axis

SCALED = "curvature_rescaling"


@lru_cache(maxsize=64)
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
        for measure in MEASURES:
            values = np.stack([curve[measure].to_numpy()[:length] for curve in curves])
            part |= {measure: values.mean(0), f"{measure}_low": values.min(0), f"{measure}_high": values.max(0)}
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def curves(records: Records, task: str, axis: str) -> Drawn:
    """Training loss and test metric against one axis: mean over seeds and the band of all seeds."""
    data, methods = mean_curves(records, task), methods_of(records, task)
    contended = axis == "train_seconds" and records.finals[records.finals.task == task].contended.any()
    names = measure_names(records, task)
    figure, found = panels(records.title(task), names, methods, records.surrogate(task))
    by_method, end = dict(tuple(data.groupby("optimizer"))), reach(data, axis)
    for panel in found:
        factor, accuracy = scale_of(records, task, panel.measure)
        shown = data[[panel.measure, f"{panel.measure}_low", f"{panel.measure}_high"]] * factor
        _limits(panel.axis, shown, data.evaluation, accuracy)
        panel.axis.set_xlabel(AXIS_LABELS[axis] + (" — made beside other runs" if contended else ""))
        panel.axis.set_xlim(0, end)
        ends = []
        for i, (optimizer, label, _) in enumerate(panel.methods):
            rows, look = by_method[optimizer], style(optimizer)
            x, middle, low, high = rows[axis], *(shown.loc[rows.index, column] for column in shown)
            panel.axis.fill_between(x, low, high, **shade(optimizer, len(panel.methods)))
            every = max(1, len(x) // 6)
            panel.axis.plot(x, middle, markevery=(i % every, every), **look.plot(), gid=optimizer)
            if rows.diverged.iloc[0]:
                panel.axis.plot(x.iloc[-1:], middle.iloc[-1:], "x", color=look.color, markersize=8, zorder=5)
            last = min(x.iloc[-1], end)
            ends.append((optimizer, label, last, np.interp(last, x, middle)))
        names_at_ends(panel.axis, ends)
    alt = f"Training loss and {names['test_metric'].lower()} against {AXIS_LABELS[axis].lower()} on {task}, "
    alt += f"mean and range over seeds. {_best_words(records, task)}"
    title = f"{records.title(task)}: curves against {AXIS_LABELS[axis].lower()}"
    return Drawn(f"curves_{axis}_{task}", task, title, alt, figure, data)


def reach(data: pd.DataFrame, axis: str) -> float:
    """Where an axis of curves ends: with the last method, at most at four times where the median one ends."""
    ends = data.groupby("optimizer")[axis].max()
    return float(min(ends.max(), 4 * ends.median())) or 1.0


def _limits(axis, shown: pd.DataFrame, evaluation: pd.Series, accuracy: bool) -> None:
    """The value axis of curves: losses up to the first value, accuracies from where most of the curves are."""
    values = shown.to_numpy().ravel()
    if accuracy:
        values = values[~(values < learnt(shown.iloc[:, 0], evaluation))]
    value_axis(axis, values, accuracy, shown[evaluation == 0].iloc[:, 0].max())


def learnt(values: pd.Series, evaluation: pd.Series) -> float:
    """Where an axis of accuracies begins: four fifths of the values after the first are above."""
    return float(values[evaluation > 0].quantile(0.2))


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
    columns, rows = min(len(found), 3), -(-len(found) // 3)
    figure, axes = canvas(
        f"{records.title(task)}: step size of each layer", columns, rows, note=records.surrogate(task)
    )
    for spare in axes.flat[len(found) :]:
        spare.remove()
    colors, rates, handles = plt.get_cmap("viridis"), {}, []
    names = dict((optimizer, label) for optimizer, label, _ in methods_of(records, task))
    for panel, (optimizer, sizes) in zip(axes.flat, found.items(), strict=False):
        order_of_layers = list(dict.fromkeys(sizes.layer))
        for i, layer in enumerate(order_of_layers):
            rows = sizes[sizes.layer == layer]
            positive = rows.value.where(rows.value > 0)
            color = colors(0.92 * i / max(len(order_of_layers) - 1, 1))
            every = max(1, len(rows) // 5)
            look = {"color": color, "linewidth": 1.5, "marker": "osD^vPX"[i % 7], "markersize": 4}
            look |= {"markeredgecolor": "white", "markeredgewidth": 0.5, "markevery": (i % every, every)}
            panel.plot(rows.step, positive, label=layer if len(layer) < 22 else f"…{layer[-20:]}", **look)
        handles = handles or panel.get_legend_handles_labels()[0]
        for base in ("sgdm", "adamw"):
            rate = scheduled_rate(records.config(task, base), sizes.step.max(), records, task, base)
            if rate is not None:
                look = style(base).plot() | {"marker": ""}
                rates[base] = panel.plot(rate.index, rate, **look)
        panel.set(title=names[optimizer], xlabel="Step")
        log_axis(panel, np.concatenate([line.get_ydata() for line in panel.lines]))
        panel.set_ylabel("Step size" if panel in axes[:, 0] else "")
        panel.set_xlim(left=0)
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


# ---- figure 10: regimes of curvature rescaling ----------------------------------------------------------------------


def regimes(records: Records, task: str) -> Drawn | None:
    """Training loss and step size of curvature rescaling by its scale ℓ, a line per run; None with fewer than two ℓ."""
    runs = records.runs[(records.runs.task == task) & (records.runs.optimizer == SCALED)]
    runs = runs[runs.status.isin(["finished", "diverged"])]
    scales = pd.Series([config.get("optimizer", {}).get("lr", np.nan) for config in runs.config], runs.index)
    runs = runs.assign(scale=pd.to_numeric(scales)).sort_values(["scale", "seed"]).dropna(subset="scale")
    if runs.scale.nunique() < 2:
        return None
    words = [records.surrogate(task), "ℓ = 1: minimum of the model along the step; ℓ = 2: border of decrease"]
    title = f"{records.title(task)}: curvature rescaling by its scale ℓ"
    figure, axes = canvas(title, 2, note=". ".join(filter(None, words)))
    levels, parts = {scale: i for i, scale in enumerate(runs.scale.unique())}, []
    for run in runs.itertuples():
        curve, layers = records.curves_by_run[run.run], records.layers(run.run)
        sizes = layers[layers.quantity == "step_size"].set_index("step").value
        part = curve[["step", "epoch", "train_loss"]].assign(scale=run.scale, seed=run.seed, trial=run.holdout)
        parts.append(part.assign(status=run.status, step_size=part.step.map(sizes)))
        level = levels[run.scale]
        look = {"color": plt.get_cmap("viridis")(0.92 * level / (len(levels) - 1)), "linewidth": 1.4}
        look |= {"marker": "osD^vPX"[level % 7], "markersize": 4, "markeredgecolor": "white", "gid": f"{run.scale:g}"}
        look |= {"markevery": (level % max(1, len(curve) // 6), max(1, len(curve) // 6))}
        axes[0, 0].plot(curve.epoch, curve.train_loss, label=f"ℓ = {run.scale:.3g}", **look)
        axes[0, 1].plot(part.epoch, parts[-1].step_size, **look)
        if run.status == "diverged":
            axes[0, 0].plot(curve.epoch.iloc[-1:], curve.train_loss.iloc[-1:], "x", color=look["color"], markersize=8)
    data = pd.concat(parts, ignore_index=True)
    value_axis(axes[0, 0], data.train_loss, False, data.train_loss[data.step == 0].max())
    axes[0, 0].set(title="Training loss", xlabel="Epoch")
    axes[0, 1].set(title="Step size", xlabel="Epoch")
    log_axis(axes[0, 1], np.concatenate([line.get_ydata() for line in axes[0, 1].lines]))
    handles = {handle.get_gid(): handle for handle in axes[0, 0].get_legend_handles_labels()[0]}
    legend(figure, [heading("Scale"), *handles.values()])
    last = data.groupby(["scale", "seed", "trial"]).tail(1).groupby("scale").train_loss.mean()
    alt = f"Training loss and step size of curvature rescaling on {task} by its scale ℓ. Final training loss: "
    alt += ", ".join(f"ℓ = {scale:.3g}: {tables.number(loss, 3)}" for scale, loss in last.items()) + "."
    return Drawn(f"regimes_{task}", task, f"{records.title(task)}: regimes of curvature rescaling", alt, figure, data)
