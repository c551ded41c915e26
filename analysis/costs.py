"""Figures 6 and 7: performance profiles over tasks, and what a step costs in the records and in the benchmark."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis import statistics, tables
from analysis.panels import AXIS_LABELS, Drawn, panels
from analysis.records import Records
from analysis.style import canvas, group, legend, names_at_ends, order, style

WORDS = {"train_loss": "training loss", "test_metric": "test metric"}
# Columns of ratios: heading, limit drawn, and what the limit means.
RATIOS = {
    "time_ratio": ("Time per step", 2.0, "SGD-m + one gradient"),
    "memory_ratio": ("Peak memory", 1.25, "comparable"),
}


def performance_profiles(records: Records) -> Drawn | None:
    """Share of tasks solved within τ times the best cost, by target and cost; None without a target.

    Costs in steps are in the data and not drawn; time is drawn only where no run was made beside others.
    """
    costs = tables.costs_to_target(records)
    if not len(costs):
        return None
    found = {(m, c): tables.median_costs(costs, m, c) for m in WORDS for c in tables.COSTS}
    found = {key: table for key, table in found.items() if len(table.columns)}
    shown = {key: key for key in found if key[1] != "step"}
    names = {f"{m} {c}": f"Share of tasks\n{_cost(c)} to {WORDS[m]}" for m, c in shown}
    labels = records.finals.drop_duplicates("optimizer").set_index("optimizer")
    everywhere = {optimizer for table in found.values() for optimizer in table.columns}
    methods = [(o, labels.label[o], group(o, labels.kind[o])) for o in order(costs.optimizer) if o in everywhere]
    n = costs.task.nunique()
    timed = any(c == "train_seconds" for _, c in found)
    note = "" if timed else "Training time is not shown: runs were made beside others."
    if left := costs.optimizer.nunique() - len(methods):
        note += f" Left out: {left} method{'s' * (left > 1)} that did not run on every task."
    note = note.strip()
    figure, drawn = panels(f"Performance profiles over {n} task{'s' * (n > 1)}", names, methods, note)
    taus, areas = np.linspace(1, statistics.TAU, 301), []
    for (measure, cost), table in found.items():
        for optimizer, area in zip(table.columns, statistics.profile_area(table.to_numpy()), strict=True):
            areas.append({"measure": measure, "cost": cost, "optimizer": optimizer, "area": area, "tasks": len(table)})
    data = pd.DataFrame(areas)
    area = data.set_index(["measure", "cost", "optimizer"]).area
    for panel in drawn:
        measure, cost = panel.measure.split(" ")
        table = found[measure, cost]
        shares = dict(zip(table.columns, statistics.performance_profile(table.to_numpy(), taus).T, strict=True))
        panel.axis.set(xlabel="τ (times the best)", ylim=(-0.03, 1.03), xlim=(1, statistics.TAU))
        ends = []
        for i, (optimizer, label, _) in enumerate(panel.methods):
            if optimizer not in shares:
                continue
            look = style(optimizer).plot() | {"markevery": (10 + 7 * (i % 9), 75), "drawstyle": "steps-post"}
            panel.axis.plot(taus, shares[optimizer], **look, gid=optimizer)
            ends.append((optimizer, f"{label} {area[measure, cost, optimizer]:.2f}", taus[-1], shares[optimizer][-1]))
        names_at_ends(panel.axis, ends)
    best = data[(data.cost == "gradient_equivalents") & (data.measure == "train_loss")]
    words = ", ".join(
        f"{labels.label[r.optimizer]} {r.area:.2f}" for r in best.sort_values("area").iloc[::-1].itertuples()
    )
    alt = "Performance profiles: share of tasks on which each method reaches the target within τ times the best cost; "
    alt += f"the number is the area to τ = 4. For training loss in gradient equivalents: {words}."
    return Drawn("performance_profiles", "", "Performance profiles; numbers are areas to τ = 4", alt, figure, data)


def _cost(cost: str) -> str:
    return "steps" if cost == "step" else AXIS_LABELS[cost].removesuffix(" (s)").lower()


def cost(records: Records) -> Drawn | None:
    """Time and peak memory per step relative to SGD-m, a point per task; None without SGD-m."""
    table = tables.results(records)
    table = table[table.memory_ratio.notna() | table.time_ratio.notna()] if len(table) else table
    if not len(table):
        return None
    # Times count only where nothing else ran; a task with any contended run has no ratio of times.
    timed = ~table.task.isin(table.task[table.contended])
    table = table.assign(time_ratio=table.time_ratio.where(timed))
    note = "" if timed.any() else "Time is not shown: runs were made beside others. `make bench` measures it."
    figure, words = _ratios("Cost of a step relative to SGD-m", table, note)
    columns = ["task", "optimizer", "time_ratio", "memory_ratio", "seconds_per_step", "peak_memory_mb", "contended"]
    return Drawn("cost", "", "Cost of a step in these runs", words, figure, table[columns])


def bench(records: Records, device: str) -> Drawn:
    """The benchmark's time and peak memory per step relative to SGD-m, a point per workload."""
    table = records.benches[device].rename(columns={"workload": "task"})
    labels = records.runs.drop_duplicates("optimizer").set_index("optimizer").label
    named = [optimizer.partition(" ") for optimizer in table.optimizer]
    table = table.assign(method=[f"{labels.get(name, name)} {rest}".strip() for name, _, rest in named])
    figure, words = _ratios(f"Cost of a step relative to SGD-m: benchmark on {device}", table, "")
    title = f"Cost of a step in the benchmark on {device}"
    return Drawn(f"bench_{device}", "", title, f"Benchmark on {device}. {words}", figure, table.drop(columns="method"))


def _ratios(title: str, table: pd.DataFrame, note: str):
    """One method per row, a point per task, a tick and a number for the geometric mean; the figure and its words."""
    optimizers, names = order(table.optimizer), table.drop_duplicates("optimizer").set_index("optimizer").method
    marks = dict(zip(table.task.unique(), cycle("osD^vP*Xhd<>p"), strict=False))
    shown = {column: parts for column, parts in RATIOS.items() if table[column].notna().any()}
    tall = max(0.25 * len(optimizers) + 1.25, 0.18 * len(marks) + 1.2)  # of the rows, and of the legend beside them
    figure, axes = canvas(title, len(shown), height=tall, note=note)
    width, tall = figure.get_size_inches()
    figure.subplots_adjust(left=1.6 / width, top=1 - 0.95 / tall)
    for panel, (column, (name, limit, words)) in zip(axes[0], shown.items(), strict=True):
        panel.set_title(name, pad=14)
        panel.set(yticks=range(len(optimizers)), ylim=(len(optimizers) - 0.5, -0.5), xlabel="times SGD-m", xscale="log")
        panel.set_yticklabels([names[o] for o in optimizers] if panel is axes[0][0] else [])
        panel.grid(axis="y", visible=False)
        panel.axvline(1, color="#444444", linewidth=0.8)
        panel.axvline(limit, color="#999999", linewidth=0.8, linestyle=(0, (3, 2)))
        panel.text(limit, 1.01, words, transform=panel.get_xaxis_transform(), ha="left", fontsize=7, color="#777777")
        known = table[table[column] > 0]
        panel.set_xlim(min(0.8, known[column].min() / 1.1), max(limit, known[column].max()) * 1.8)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        for y, optimizer in enumerate(optimizers):
            rows, color = known[known.optimizer == optimizer], style(optimizer.partition(" ")[0]).color
            for row in rows.itertuples():
                panel.plot(getattr(row, column), y, marks[row.task], color=color, markersize=5,
                           markeredgecolor="white", markeredgewidth=0.5, zorder=3)  # fmt: skip
            if len(rows):
                middle = _geometric_mean(rows[column])
                panel.plot([middle] * 2, [y - 0.32, y + 0.32], color=color, linewidth=2, zorder=2)
                panel.text(0.99, y, f"{middle:.2f}", transform=panel.get_yaxis_transform(), ha="right", va="center",
                           fontsize=7.5, color="#444444")  # fmt: skip
    tick = Line2D([], [], color="#555555", linewidth=2, label="geometric mean")
    points = {"linestyle": "none", "color": "#555555", "markersize": 5}
    legend(figure, [*(Line2D([], [], marker=m, label=_short(t), **points) for t, m in marks.items()), tick])
    means = table.groupby("optimizer")[list(shown)].agg(_geometric_mean)
    units = {"time_ratio": "time", "memory_ratio": "memory"}
    told = [
        f"{names[o]} " + ", ".join(f"{tables.number(means[column][o], 3)} × {units[column]}" for column in shown)
        for o in optimizers
    ]
    return figure, f"Cost of a step relative to SGD-m. Geometric means over tasks: {'; '.join(told)}."


def _geometric_mean(values: pd.Series) -> float:
    return float(np.exp(np.log(values).mean()))


def _short(task: str) -> str:
    return task.replace("autoencoder_", "ae_")
