"""Tests of how a method behaves: linear convergence, regimes, step sizes as a schedule, insensitivity.

All but the first are ours, for the abstracts give none.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from analysis import statistics
from analysis.alike import versions_of
from analysis.comparisons import LOSS_FLOOR
from analysis.records import Records
from analysis.verdicts import Claim, NotTestedError, Verdict, all_hold, each, guarded, runs_of, tasks_of

LINE = 0.9  # least R² of what is called a line
EVALUATIONS = 7  # fewer cannot fall so straight that a test over a dozen cases would tell it from chance
INSENSITIVE = 0.1  # by how much of the best a loss may differ


def linear_rate(records: Records, claim: Claim) -> list[Verdict]:
    """LW-7: of every run, the fitted factor per step is at most the derived one, and the fit is a line (R² ≥ 0.9)."""

    def judge() -> Verdict:
        data = records.study("linear_convergence")
        if data is None or not len(data):
            raise NotTestedError("needs study/linear_convergence.csv: full-batch runs with exact block curvature")
        rows = []
        for (task, width, estimator), runs in data[data.gap > 0].groupby(["task", "width", "estimator"]):
            seeds = [run for _, run in runs.groupby("seed")]
            fits = [scipy_stats.linregress(run.step, np.log(run.gap)) for run in seeds]
            factors, derived = [np.exp(fit.slope) for fit in fits], [run.rate_derived.iloc[0] for run in seeds]
            nearest = int(np.argmax(np.subtract(factors, derived)))  # the seed that comes nearest to its limit
            row = {"task": f"{task}, width {width:g}, {estimator}", "method": "idealised", "n": len(fits)}
            row |= {"ratio": float(factors[nearest]), "limit": float(derived[nearest])}
            row["r_squared"] = float(min(fit.rvalue**2 for fit in fits))
            rows.append(row | {"holds": row["ratio"] <= row["limit"] and row["r_squared"] >= LINE})
        return all_hold("linear convergence", rows, "is slower than derived, or not linear,")

    return [guarded("linear convergence", judge)]


def two_regimes(records: Records, claim: Claim) -> list[Verdict]:
    """AD-2 (the test is ours): with ℓ > 1 curvature rescaling takes longer steps and settles higher than with ℓ ≤ 1.

    Of the tuning trials, all from one seed and one budget: the best with ℓ ≤ 1 against the best with ℓ > 1.
    """

    def judge() -> Verdict:
        (method,) = claim.methods
        rows, missing = each([(task, method) for task in tasks_of(records, claim)], partial(_regimes, records))
        return all_hold("two regimes", rows, "has none", missing=missing)

    return [guarded("two regimes", judge)]


def _regimes(records: Records, task: str, method: str) -> dict:
    runs = records.runs
    runs = runs[(runs.task == task) & (runs.optimizer == method) & runs.holdout & (runs.status == "finished")]
    versions = runs.config.map(versions_of)
    runs = runs[versions == versions.max()]
    scale = pd.to_numeric(pd.Series([c.get("optimizer", {}).get("lr") for c in runs.config], runs.index, dtype=object))
    best = []
    for side, words in ((runs[scale <= 1], "ℓ ≤ 1"), (runs[scale > 1], "ℓ > 1")):
        if not len(side):
            raise NotTestedError(f"no finished trial of {method} on {task} has {words}")
        best.append(side.loc[side.final_train_loss.idxmin()])
    settle, explore = best
    sizes = [float(mean_step_sizes(records, run.run).median()) for run in (settle, explore)]
    if not np.isfinite(sizes).all():
        raise NotTestedError(f"the trials of {method} on {task} have no step sizes (layers.csv)")
    row = {"task": task, "method": method, "field": "lr", "n": 1, "ratio": sizes[1] / sizes[0]}
    row |= {"from": float(scale[settle.name]), "to": float(scale[explore.name])}
    row["difference"] = float(explore.final_train_loss - settle.final_train_loss)
    return row | {"holds": row["ratio"] > 1 and row["difference"] > 0}


def schedule_and_insensitivity(records: Records, claim: Claim) -> list[Verdict]:
    """LW-6, in two parts (both tests are ours: the abstract gives none)."""
    return [
        guarded("step sizes as a schedule", lambda: _schedule(records, claim)),
        guarded("insensitivity", lambda: _insensitive(records, claim)),
    ]


def mean_step_sizes(records: Records, run: str) -> pd.Series:
    """Geometric mean over layers of the step sizes by step, of the positive ones."""
    layers = records.layers(run)
    sizes = layers[(layers.quantity == "step_size") & (layers.value > 0)]
    return np.exp(np.log(sizes.value.astype(float)).groupby(sizes.step).mean())


def _schedule(records: Records, claim: Claim) -> Verdict:
    """From their peak on, the step sizes fall like a schedule's: Kendall's correlation with time, Holm over all.

    Step sizes of one run follow from one another, so p says how straight the fall is and not how sure it is.
    """
    cases = [(task, method) for task in tasks_of(records, claim) for method in claim.methods]
    rows, missing = each(cases, partial(_fall, records))
    for row, p in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": float(p), "holds": bool(p <= statistics.ALPHA)}
    return all_hold("step sizes as a schedule", rows, "has no falling trend", missing=missing)


def _fall(records: Records, task: str, method: str) -> dict:
    seeds = [mean_step_sizes(records, run) for run in runs_of(records, task, method).run]
    sizes = np.exp(pd.concat([np.log(s) for s in seeds], axis=1).mean(axis=1)).sort_index()
    if len(sizes) < EVALUATIONS:
        raise NotTestedError(f"{method} on {task} has step sizes at {len(sizes)} evaluations, {EVALUATIONS} are needed")
    fall = sizes.loc[sizes.idxmax() :]
    test = scipy_stats.kendalltau(fall.index, fall, alternative="less") if len(fall) > 1 else None
    correlation, p = (float(test.statistic), float(test.pvalue)) if test else (np.nan, 1.0)
    row = {"task": task, "method": method, "n": len(seeds), "peak_at": float(sizes.idxmax() / sizes.index[-1])}
    return row | {"last_over_peak": float(fall.iloc[-1] / fall.iloc[0]), "correlation": correlation, "p": p}


def _insensitive(records: Records, claim: Claim) -> Verdict:
    """Over two decades of a setting the final training loss is within 10 % of the best, or within 0.01.

    The runs are the project's ablations, which belong to no profile.
    """
    rows = [row for table in records.ablations.values() for row in _over_decades(table, claim.methods)]
    if not rows:
        how = "python -m runners.train -m experiment=ablation_trust, python -m analysis.ablation results/ablation/trust"
        raise NotTestedError(f"no ablation varies a setting over two decades ({how})")
    return all_hold("insensitivity", rows, "is sensitive", " of the ablations")


def _over_decades(table: pd.DataFrame, methods: tuple[str, ...]) -> list[dict]:
    """A row by task and method if the one setting that an ablation varies spans two decades, with a value in each."""
    settings = list(table.columns[2 : table.columns.get_loc("n")])
    values = pd.to_numeric(table[settings[0]], errors="coerce")
    if len(settings) > 1 or values.min() <= 0:
        return []
    table = table.assign(value=values, loss=table.train_loss_mean.where(table.diverged == 0, np.inf))
    groups = table[table.optimizer.isin(methods) & values.notna()].groupby(["task", "optimizer"], sort=False)
    return [_spread(settings[0], *key, group) for key, group in groups if _spans_decades(group.value)]


def _spans_decades(values: pd.Series) -> bool:
    gaps = np.diff(np.log10(np.unique(values)))
    return gaps.sum() >= 1.99 and gaps.max() <= 1.01


def _spread(setting: str, task: str, method: str, runs: pd.DataFrame) -> dict:
    best, worst = float(runs.loss.min()), float(runs.loss.max())
    near = runs.value[np.isfinite(runs.loss) & (runs.loss <= best + max(INSENSITIVE * best, LOSS_FLOOR))]
    row = {"task": f"{task}, {setting} {runs.value.min():g} – {runs.value.max():g}", "method": method}
    row |= {"n": int(runs.n.min()), "best": best, "worst": worst}
    return row | {"near_from": float(near.min()), "near_to": float(near.max()), "holds": len(near) == len(runs)}
