"""Figures 8 and 9, from the tables that the study writes under `<root>/study/`; without its table a figure is left out.

`linear_convergence.csv` has `task, width, estimator, seed, step, gap, rate_derived`: the gap is the training loss
minus the best loss known, `rate_derived` the factor per step that the derivation promises. `estimators.csv` has `model,
layer, estimator, draws, relative_bias, standard_error`: of an estimate against the exact block, over so many draws.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from analysis.panels import Drawn
from analysis.records import Records
from analysis.style import (
    BLUE,
    DASHDOT,
    DASHED,
    DOTTED,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SOLID,
    canvas,
    heading,
    legend,
)  # fmt: skip

COLORS = (BLUE, RED, GREEN, PINK, ORANGE, GREY)
LINES, MARKS = (SOLID, DASHED, DOTTED, DASHDOT), "osD^vP"


def linear_convergence(records: Records) -> Drawn | None:
    """Gap to the best known loss by step on a logarithmic axis, a line per seed, and the derived rate."""
    data = records.study("linear_convergence")
    if data is None:
        return None
    tasks, estimators = list(data.task.unique()), list(data.estimator.unique())
    figure, axes = canvas("Linear convergence of full-batch SGD with layer-wise steps", len(tasks))
    widths, fits = sorted(data.width.unique()), []
    for panel, task in zip(axes[0], tasks, strict=True):
        here = data[(data.task == task) & (data.gap > 0)]
        for (width, estimator, seed), run in here.groupby(["width", "estimator", "seed"]):
            run = run.sort_values("step")
            look = {"color": COLORS[widths.index(width) % len(COLORS)], "linewidth": 1.3}
            look |= {
                "linestyle": LINES[estimators.index(estimator) % len(LINES)],
                "marker": MARKS[widths.index(width) % 6],
            }
            panel.plot(run.step, run.gap, markersize=4, markevery=max(1, len(run) // 6),
                       gid=f"{width} {estimator} {seed}", **look)  # fmt: skip
            fits.append({"task": task, "width": width, "estimator": estimator, "rate": observed_rate(run)})
        start, last = here.gap[here.step == here.step.min()].max(), here.step.max()
        for width, rate in here.groupby("width").rate_derived.first().items():
            steps = np.linspace(here.step.min(), last, 50)
            color = COLORS[widths.index(width) % len(COLORS)]
            panel.plot(
                steps, start * rate ** (steps - steps[0]), color=color, linewidth=3, alpha=0.25, gid=f"derived {width}"
            )
        panel.set(title=task, xlabel="Step", yscale="log", ylim=(here.gap.min() / 2, start * 2))
    axes[0, 0].set_ylabel("Training loss above the best known")
    by_width = [Line2D([], [], color=COLORS[i % 6], marker=MARKS[i % 6], label=f"{w:g}") for i, w in enumerate(widths)]
    by_line = [Line2D([], [], color="#555555", linestyle=LINES[i % 4], label=e) for i, e in enumerate(estimators)]
    derived = Line2D([], [], color="#555555", linewidth=3, alpha=0.3, label="derived rate")
    legend(figure, [heading("Width"), *by_width, heading("Curvature"), *by_line, derived])
    rates = pd.DataFrame(fits).groupby(["task", "width", "estimator"]).rate.median()
    alt = "Training loss above the best known by step, logarithmic: a straight line is linear convergence. "
    alt += "Factor per step: "
    alt += ", ".join(
        f"{task} width {width:g}, {estimator} {rate:.4g}" for (task, width, estimator), rate in rates.items()
    )
    return Drawn("linear_convergence", "", "Linear convergence of the idealised method", alt + ".", figure, data)


def observed_rate(run: pd.DataFrame) -> float:
    """The factor per step by which a run's gap shrinks: least squares on its logarithm."""
    if len(run) < 2:
        return np.nan
    return float(np.exp(np.polyfit(run.step, np.log(run.gap), 1)[0]))


def estimators(records: Records) -> Drawn | None:
    """Relative bias of each curvature estimator by layer, with two standard errors, a panel per model."""
    data = records.study("estimators")
    if data is None:
        return None
    models, names = list(data.model.unique()), list(data.estimator.unique())
    layers = max(data[data.model == model].layer.nunique() for model in models)
    figure, axes = canvas("Curvature estimators against the exact block", len(models), height=0.3 * layers + 1.25)
    figure.subplots_adjust(left=1.25 / figure.get_size_inches()[0])
    for panel, model in zip(axes[0], models, strict=True):
        here = data[data.model == model]
        places = {layer: i for i, layer in enumerate(here.layer.unique())}
        for i, name in enumerate(names):
            rows = here[here.estimator == name]
            y = rows.layer.map(places) + 0.7 * ((i + 0.5) / len(names) - 0.5)
            panel.errorbar(rows.relative_bias, y, xerr=2 * rows.standard_error, fmt=MARKS[i % 6], markersize=4,
                           color=COLORS[i % 6], elinewidth=1, capsize=2, label=name)  # fmt: skip
        panel.axvline(0, color="#444444", linewidth=0.8)
        panel.set(title=model, xlabel="Relative bias (± 2 standard errors)", yticks=list(places.values()))
        panel.set_yticklabels(list(places))
        panel.set_ylim(len(places) - 0.5, -0.5)
    points = [
        Line2D([], [], linestyle="none", marker=MARKS[i % 6], color=COLORS[i % 6], label=n) for i, n in enumerate(names)
    ]
    legend(figure, [heading("Estimator"), *points])
    worst = data.loc[data.relative_bias.abs().groupby([data.model, data.estimator]).idxmax()]
    alt = "Relative bias of curvature estimators by layer. Largest in absolute value: "
    alt += ", ".join(f"{r.model}, {r.estimator} {r.relative_bias:.2g} ({r.layer})" for r in worst.itertuples()) + "."
    return Drawn("estimators", "", "Curvature estimators: bias and spread", alt, figure, data)
