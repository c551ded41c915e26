"""The claims of the papers, each one declared entry, judged from records alone.

A claim says which methods it is about, against which rivals, on which families of tasks, and by which test. Every
test returns, for each measure, rows of numbers and a verdict. Missing runs, or fewer seeds than the profile asks for,
make it *not tested*, with the rows that there are beside it; nothing here is typed in by hand. Margins and definitions
are the protocol's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from analysis import statistics
from analysis.records import Records, versions_of

REPRODUCED, NOT_REPRODUCED, NOT_TESTED = "reproduced", "not reproduced", "not tested"
MEASURES = {"train_loss": "training loss", "test_metric": "test metric"}
LW = ("lw_sgdm", "lw_adamw")
FIRST_ORDER = ("sgdm", "adamw")
LOSS_MARGIN, LOSS_FLOOR, ACCURACY_MARGIN = 0.02, 0.01, 0.005
ABOUT, COMPARABLE_MEMORY, SLIGHTLY_ABOVE, INSENSITIVE = 0.15, 1.25, 1.3, 0.1
LINE = 0.9  # least R² of what is called a line
LW_PAPER, MBF_PAPER, KBFGS_PAPER = "arXiv:2305.13664, abstract", "arXiv:2202.04124, abstract", "arXiv:2006.08877"


class NotTestedError(Exception):
    """What is missing for a test."""


@dataclass(frozen=True)
class Verdict:
    """One measure's outcome: the verdict, a sentence, the rows of numbers it rests on, and what to know beside it."""

    measure: str
    verdict: str
    reason: str
    rows: list[dict]
    caveat: str = ""


@dataclass(frozen=True)
class Claim:
    """A declared claim.

    Attributes:
        id: As in the protocol.
        sentence: The claim in our own words.
        source: The paper.
        methods: Whom it is about; every one must hold.
        rivals: Whom each of them is compared with.
        test: Yields the verdicts.
        families: Families of tasks it is about (all where empty).
    """

    id: str
    sentence: str
    source: str
    methods: tuple[str, ...]
    rivals: tuple[str, ...]
    test: Callable[[Records, Claim], list[Verdict]]
    families: tuple[str, ...] = ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(method, rival) for method in self.methods for rival in self.rivals]


# ---- what the tests share ------------------------------------------------------------------------------------------


def tasks_of(records: Records, claim: Claim) -> list[str]:
    """The profile's tasks of the claim's families; a task without any final run is missing, not left out."""
    families = dict(zip(records.runs.task, records.runs.family, strict=True))
    tasks = [t for t in records.tasks if not claim.families or families.get(t, t.split("_")[0]) in claim.families]
    if not tasks:
        raise NotTestedError(f"no task of family {', '.join(claim.families)}" if claim.families else "no final runs")
    return tasks


def runs_of(records: Records, task: str, optimizer: str, alone: bool = False) -> pd.DataFrame:
    """A method's final runs on a task by seed; as many as the profile asks for, or the claim is not tested."""
    runs = records.methods.get(task, {}).get(optimizer, records.finals.head(0)).set_index("seed")
    needed = max(records.seeds(task), 2)
    if len(runs) < needed:
        raise NotTestedError(f"{optimizer} has {len(runs)} of {needed} seeds on {task}")
    if alone and runs.contended.any():
        raise NotTestedError(f"{optimizer} on {task} was timed beside other runs (contended)")
    return runs


def larger_is_better(runs: pd.DataFrame, measure: str) -> bool:
    """Whether a larger value of the measure is better: an accuracy, as opposed to a loss or an error."""
    return measure.endswith("_metric") and runs.metric.iloc[0] == "accuracy"


def final_values(runs: pd.DataFrame, measure: str) -> pd.Series:
    """Final values by seed; nan for a diverged run."""
    return runs[f"final_{measure}"].where(runs.status == "finished")


def values_at_equal_time(records: Records, ours: pd.DataFrame, theirs: pd.DataFrame, measure: str) -> list[pd.Series]:
    """Values by seed at the training time when the sooner finished of the two runs ends; nan for a diverged run."""
    curves = [[records.curves_by_run[run] for run in runs.run] for runs in (ours, theirs)]
    ends = [min(x.train_seconds.iloc[-1], y.train_seconds.iloc[-1]) for x, y in zip(*curves, strict=True)]
    found = []
    for runs, mine in zip((ours, theirs), curves, strict=True):
        at_end = [statistics.value_at_cost(c.train_seconds, c[measure], e) for c, e in zip(mine, ends, strict=True)]
        found.append(pd.Series(at_end, index=runs.index).where(runs.status == "finished"))
    return found


def margin(theirs: pd.Series, accuracy: bool) -> float:
    """By how much ours may be worse: 0.5 points of accuracy, or 2 % of the rival's loss but at least 0.01."""
    loss = theirs[np.isfinite(theirs)].mean()
    return ACCURACY_MARGIN if accuracy else max(LOSS_FLOOR, LOSS_MARGIN * (loss if np.isfinite(loss) else 0.0))


def guarded(measure: str, judge: Callable[[], Verdict]) -> Verdict:
    try:
        return judge()
    except NotTestedError as missing:
        return Verdict(measure, NOT_TESTED, str(missing), [])


def each(cases: Iterable[tuple], row: Callable[..., dict]) -> tuple[list[dict], str]:
    """A row of every case that can be tested, at least one, and what the first of the others lacks."""
    rows, missing = _found(cases, row)
    if not rows:
        raise NotTestedError(missing)
    return rows, missing


def _found(cases: Iterable[tuple], row: Callable[..., dict]) -> tuple[list[dict], str]:
    rows, missing = [], ""
    for case in cases:
        try:
            rows.append(row(*case))
        except NotTestedError as lack:
            missing = missing or str(lack)
    return rows, missing


# ---- tests ---------------------------------------------------------------------------------------------------------


def compared(better: bool, equal_time: bool = False) -> Callable[[Records, Claim], list[Verdict]]:
    """The paired test over seeds of "at least as good" or "better", on final values or at equal training time."""

    def comparison(records: Records, measure: str, task: str, method: str, rival: str) -> dict:
        ours = runs_of(records, task, method, alone=equal_time)
        theirs = runs_of(records, task, rival, alone=equal_time)
        seeds = ours.index.intersection(theirs.index)
        if len(seeds) < 2:
            raise NotTestedError(f"{method} and {rival} share {len(seeds)} seeds on {task}")
        ours, theirs = ours.loc[seeds], theirs.loc[seeds]
        larger = larger_is_better(ours, measure)
        if equal_time:
            x, y = values_at_equal_time(records, ours, theirs, measure)
        else:
            x, y = final_values(ours, measure), final_values(theirs, measure)
        if any((v.isna() & (runs.status == "finished")).any() for v, runs in ((x, ours), (y, theirs))):
            raise NotTestedError(f"{MEASURES[measure]} of {method} or {rival} on {task} was not measured")
        result = statistics.compare(x, y, margin(y, larger), larger)
        return {"task": task, "method": method, "rival": rival, "larger": larger} | asdict(result)

    def judge(records: Records, claim: Claim, measure: str) -> Verdict:
        cases = [(task, *pair) for task in tasks_of(records, claim) for pair in claim.pairs]
        rows, missing = each(cases, lambda *case: comparison(records, measure, *case))
        for pair in claim.pairs:  # Holm over the tasks
            of_pair = [row for row in rows if (row["method"], row["rival"]) == pair]
            for row, p in zip(of_pair, statistics.holm([row["p_worse"] for row in of_pair]), strict=True):
                # where every task must be better there is nothing to correct for
                row |= {"holds": row["better"]} if better else {"p_holm": float(p), "holds": bool(p > statistics.ALPHA)}
        failing = "is not better" if better else "is worse by more than the margin"
        verdict = _all_hold(measure, rows, failing, missing=missing)
        weak = not better and verdict.verdict == REPRODUCED
        return replace(verdict, caveat="; ".join(filter(None, (_unresolved(rows), _shown(rows))))) if weak else verdict

    return lambda records, claim: [guarded(m, lambda m=m: judge(records, claim, m)) for m in MEASURES]


def _all_hold(measure: str, rows: list[dict], failing: str, where: str = "", missing: str = "") -> Verdict:
    failed = [row for row in rows if not row["holds"]]
    if missing:
        held = f"{len(rows) - len(failed)} of the {len(rows)} comparisons that there are{where} hold"
        return Verdict(measure, NOT_TESTED, f"{missing}; {held}", rows)
    if not failed:
        return Verdict(measure, REPRODUCED, f"holds in all {len(rows)} comparisons{where}", rows)
    names = ", ".join(f"{row['method']} {failing} on {row['task']}" for row in failed[:3])
    return Verdict(measure, NOT_REPRODUCED, f"{len(failed)} of {len(rows)}{where} fail: {names}", rows)


def _costs_hold(measure: str, rows: list[dict], failing: str, where: str, missing: str) -> Verdict:
    """Costs are no matter of chance: one that is too high decides, whatever has not been measured."""
    return _all_hold(measure, rows, failing, where, missing if all(row["holds"] for row in rows) else "")


def _unresolved(rows: list[dict]) -> str:
    """Comparisons that hold only because so few seeds cannot tell the difference from chance."""
    worse = [row for row in rows if row["holds"] and (-1 if row["larger"] else 1) * row["difference"] > row["margin"]]
    if not worse:
        return ""
    names = ", ".join(dict.fromkeys(f"{row['task']} (n = {row['n']})" for row in worse))
    return f"the mean is worse by more than the margin on {names}, but not significantly"


def _shown(rows: list[dict]) -> str:
    """To hold is not to have been found worse; of how many comparisons the converse was found."""
    shown = sum(row["p_not_worse"] <= statistics.ALPHA for row in rows)
    return f"shown not to be worse by more than the margin (p ≤ {statistics.ALPHA:g}) in {shown} of {len(rows)}"


COSTS = {"seconds_per_step": "time_ratio", "peak_memory_bytes": "memory_ratio"}  # a record's column, the benchmark's


def cost_ratio(column: str, measure: str, limit: float, text: str) -> Callable[[Records, Claim], list[Verdict]]:
    """The ratio of a per-step cost is at most `limit` on every task and on every workload of the benchmark."""

    def judge(records: Records, claim: Claim) -> Verdict:
        rows, missing, where = _cost_rows(records, claim, column)
        for row in rows:
            row |= {"ratio": row.pop(column), "limit": limit}
            row["holds"] = row["ratio"] <= limit
        return _costs_hold(measure, rows, text, where, missing)

    return lambda records, claim: [guarded(measure, lambda: judge(records, claim))]


def _cost_rows(records: Records, claim: Claim, *columns: str) -> tuple[list[dict], str, str]:
    """Costs relative to the rival's by task and pair, of the runs and of the benchmark; what is missing of the runs, if
    it is of the benchmark, too; where from.

    Times count only where nothing else ran, in the runs (median over seeds) as in the benchmark (steps take turns).
    """

    def of_runs(task: str, method: str, rival: str) -> dict:
        return {"task": task, "method": method, "rival": rival} | _ratios(records, task, method, rival, columns)

    workloads = [(device, name) for device, table in records.benches.items() for name in table.workload.unique()]
    steps = [(*workload, *pair) for workload in workloads for pair in claim.pairs]
    rows, missing = _found([(task, *pair) for task in tasks_of(records, claim) for pair in claim.pairs], of_runs)
    timed, untimed = _found(steps, lambda *step: _bench_row(records, *step, columns))
    if not rows and not timed:
        raise NotTestedError(f"{missing}, and there is no benchmark (make bench)")
    where = " of the runs and the benchmark" if rows and timed else " of the benchmark" if timed else ""
    return [*rows, *timed], missing and (untimed if timed else missing), where


def _ratios(records: Records, task: str, method: str, rival: str, columns: tuple[str, ...]) -> dict:
    found = {}
    for column in columns:
        alone = column == "seconds_per_step"
        ours, theirs = (runs_of(records, task, name, alone=alone) for name in (method, rival))
        if ours.driver.notna().any() != theirs.driver.notna().any():
            raise NotTestedError(f"of {method} and {rival} on {task} one was run on a GPU, the other on a CPU")
        ratios = (ours[column] / theirs[column]).replace([np.inf, -np.inf], np.nan).dropna()
        if not len(ratios):
            raise NotTestedError(f"{column} of {method} or {rival} on {task} was not measured")
        found = {"n": len(ratios)} | found | {column: float(ratios.median())}
    return found


def _bench_row(records: Records, device: str, workload: str, method: str, rival: str, columns: tuple[str, ...]) -> dict:
    """The benchmark's costs of a pair on a workload, all relative to SGD-m's step; `n` counts steps."""
    table = records.benches[device]
    table = table[table.workload == workload].set_index("optimizer")
    if not {method, rival} <= set(table.index):
        raise NotTestedError(f"the benchmark on {device} has no {method} or no {rival} on {workload}")
    ratios = {c: float(table[COSTS[c]][method] / table[COSTS[c]][rival]) for c in columns}
    if any(map(math.isnan, ratios.values())):
        raise NotTestedError(f"the benchmark on {device} has not measured {' and '.join(columns)} on {workload}")
    row = {"task": f"{workload} ({device})", "method": method, "rival": rival, "n": int(table.steps[method])}
    return row | ratios


def rescaling_cost(records: Records, claim: Claim) -> list[Verdict]:
    """AD-1: (time, memory) is about (1.5, 2) or about (2, 1) times the gradient's, or less."""

    def judge() -> Verdict:
        rows, missing, where = _cost_rows(records, claim, *COSTS)
        for row in rows:
            row |= {"ratio": row.pop("seconds_per_step"), "memory_ratio": row.pop("peak_memory_bytes")}
            row["holds"] = any(
                row["ratio"] <= time * (1 + ABOUT) and row["memory_ratio"] <= memory * (1 + ABOUT)
                for time, memory in ((1.5, 2.0), (2.0, 1.0))
            )
        return _costs_hold("cost per step", rows, "costs more", where, missing)

    return [guarded("cost per step", judge)]


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
        return _all_hold("linear convergence", rows, "is slower than derived, or not linear,")

    return [guarded("linear convergence", judge)]


def two_regimes(records: Records, claim: Claim) -> list[Verdict]:
    """AD-2 (the test is ours): with ℓ > 1 curvature rescaling takes longer steps and settles higher than with ℓ ≤ 1.

    Of the tuning trials, all from one seed and one budget: the best with ℓ ≤ 1 against the best with ℓ > 1.
    """

    def judge() -> Verdict:
        (method,) = claim.methods
        rows, missing = each([(task, method) for task in tasks_of(records, claim)], partial(_regimes, records))
        return _all_hold("two regimes", rows, "has none", missing=missing)

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
    """From their peak on, the step sizes fall like a schedule's: Spearman's correlation with time, Holm over all.

    Step sizes of one run follow from one another, so p says how straight the fall is and not how sure it is.
    """
    cases = [(task, method) for task in tasks_of(records, claim) for method in claim.methods]
    rows, missing = each(cases, partial(_fall, records))
    for row, p in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": float(p), "holds": bool(p <= statistics.ALPHA)}
    return _all_hold("step sizes as a schedule", rows, "has no falling trend", missing=missing)


def _fall(records: Records, task: str, method: str) -> dict:
    seeds = [mean_step_sizes(records, run) for run in runs_of(records, task, method).run]
    sizes = np.exp(pd.concat([np.log(s) for s in seeds], axis=1).mean(axis=1)).sort_index()
    if len(sizes) < 5:
        raise NotTestedError(f"{method} on {task} has step sizes at {len(sizes)} evaluations, 5 are needed")
    fall = sizes.loc[sizes.idxmax() :]
    test = scipy_stats.spearmanr(fall.index, fall, alternative="less") if len(fall) > 4 else None
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
    return _all_hold("insensitivity", rows, "is sensitive", " of the ablations")


def _over_decades(table: pd.DataFrame, methods: tuple[str, ...]) -> list[dict]:
    """A row by task and method if the one setting that an ablation varies spans two decades, with a value in each."""
    settings = list(table.columns[2 : table.columns.get_loc("n")])
    values = pd.to_numeric(table[settings[0]], errors="coerce")
    decades = np.log10(np.unique(values[values > 0]))
    gaps = np.diff(decades)
    if len(settings) > 1 or values.min() <= 0 or gaps.sum() < 1.99 or gaps.max() > 1.01:
        return []
    table = table.assign(value=values, loss=table.train_loss_mean.where(table.diverged == 0, np.inf))
    groups = table[table.optimizer.isin(methods) & values.notna()].groupby(["task", "optimizer"], sort=False)
    return [_spread(settings[0], *key, group) for key, group in groups]


def _spread(setting: str, task: str, method: str, runs: pd.DataFrame) -> dict:
    best, worst = float(runs.loss.min()), float(runs.loss.max())
    near = runs.value[np.isfinite(runs.loss) & (runs.loss <= best + max(INSENSITIVE * best, LOSS_FLOOR))]
    row = {"task": f"{task}, {setting} {runs.value.min():g} – {runs.value.max():g}", "method": method}
    row |= {"n": int(runs.n.min()), "best": best, "worst": worst}
    return row | {"near_from": float(near.min()), "near_to": float(near.max()), "holds": len(near) == len(runs)}


# ---- the declared claims -------------------------------------------------------------------------------------------

CLAIMS = (
    Claim("LW-1", "LW-SGDm, untuned, is at least as good as tuned SGD with momentum on each family", LW_PAPER,
          ("lw_sgdm",), ("sgdm",), compared(better=False)),
    Claim("LW-2", "LW-AdamW, untuned, is at least as good as tuned AdamW on each family", LW_PAPER,
          ("lw_adamw",), ("adamw",), compared(better=False)),
    Claim("LW-3", "Both are at least as good as the second-order methods after equal training time", LW_PAPER,
          LW, ("kfac", "shampoo", "kbfgs", "mbf", "tnt"), compared(better=False, equal_time=True)),
    Claim("LW-4", "An iteration takes at most SGD-m's time plus about one gradient computation", LW_PAPER,
          LW, ("sgdm",), cost_ratio("seconds_per_step", "time per step", 2 + ABOUT, "takes longer")),
    Claim("LW-5", "Memory is comparable to a first-order method's", LW_PAPER,
          LW, ("sgdm",), cost_ratio("peak_memory_bytes", "peak memory", COMPARABLE_MEMORY, "needs more memory")),
    Claim("LW-6", "Step sizes behave like an effective schedule; the result is insensitive to what is left to choose",
          LW_PAPER, LW, (), schedule_and_insensitivity),
    Claim("LW-7", "Idealised full-batch SGD with layer-wise steps converges linearly (rate derived here)", LW_PAPER,
          LW, (), linear_rate),
    Claim("MBF-1", "An iteration of MBF costs only slightly more than a first-order one", MBF_PAPER,
          ("mbf",), ("sgdm",), cost_ratio("seconds_per_step", "time per step", SLIGHTLY_ABOVE, "costs more")),
    Claim("MBF-2", "MBF's final result is competitive with first- and second-order methods", MBF_PAPER,
          ("mbf",), (*FIRST_ORDER, "kfac", "shampoo"), compared(better=False)),
    Claim("QN-1", "K-BFGS and K-BFGS(L) match or outperform KFAC and first-order methods on autoencoders", KBFGS_PAPER,
          ("kbfgs", "kbfgs_l"), ("kfac", "sgdm", "adam"), compared(better=False), families=("autoencoder",)),
    Claim("LS-1", "Layer-specific rates improve accuracy and time over SGD", "arXiv:1510.04609, abstract",
          ("layer_specific",), ("sgdm",), compared(better=True, equal_time=True)),
    Claim("BM-1", "Back-matching rates improve over SGD", "arXiv:1802.09750, abstract",
          ("back_matching",), ("sgdm",), compared(better=True)),
    Claim("AD-1", "The curvature along a direction costs (1.5 C, 2 M) or (2 C, 1 M)", "arXiv:2210.14520, abstract",
          ("curvature_rescaling",), ("sgdm",), rescaling_cost),
    Claim("AD-2", "Curvature rescaling has two regimes, exploration and convergence", "arXiv:2210.14520, abstract",
          ("curvature_rescaling",), (), two_regimes),
)  # fmt: skip


def judge(records: Records) -> list[dict]:
    """Every claim with its verdicts, ready for JSON: `id, sentence, source, methods, rivals, verdicts`."""
    return [
        {"id": claim.id, "sentence": claim.sentence, "source": claim.source, "methods": list(claim.methods)}
        | {"rivals": list(claim.rivals), "verdicts": [asdict(verdict) for verdict in claim.test(records, claim)]}
        for claim in CLAIMS
    ]


def write(judged: list[dict], path: Path) -> None:
    """Write `claims.json`: numbers that are not finite become null or the words "inf" and "-inf"; of the others twelve
    digits, for those behind them are the processor's."""
    path.write_text(json.dumps(_plain(judged), indent=1, ensure_ascii=False) + "\n")


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        value = float(value)
        if np.isfinite(value):
            return float(f"{value:.12g}")
        return None if np.isnan(value) else "inf" if value > 0 else "-inf"
    return bool(value) if isinstance(value, np.bool_) else int(value) if isinstance(value, np.integer) else value
