"""The tables: results, costs to target, settings; each as CSV, LaTeX and Markdown."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.comparisons import final_values, larger_is_better
from analysis.records import Records
from analysis.style import order

EDGE = 0.1
BASE = "sgdm"  # the method whose cost is 1 and whose tuned result is the target
COSTS = ("train_seconds", "gradient_equivalents", "step")
DIGITS = "%.12g"  # those behind them are the processor's


@lru_cache(maxsize=64)
def results(records: Records, *tasks: str) -> pd.DataFrame:
    """One row per task (of those given, or of all) and method: means over seeds, costs relative to SGD-m, trials.

    Means are empty where a seed diverged: the mean of the survivors would hide it.
    """
    rows = []
    for task, optimizer, runs in methods(records, *tasks):
        finished = int((runs.status == "finished").sum())
        tuning = tuning_of(runs)
        row = {"task": task, "family": runs.family.iloc[0], "optimizer": optimizer, "method": runs.label.iloc[0]}
        row |= {"kind": runs.kind.iloc[0], "n": len(runs), "diverged": len(runs) - finished}
        row |= {"metric": runs.metric.iloc[0], "surrogate": runs.surrogate.iloc[0]}
        for measure in ("train_loss", "test_metric"):
            values = final_values(runs, measure)
            row[f"{measure}_mean"] = values.mean(skipna=False)
            row[f"{measure}_std"] = values.std(skipna=False) if len(values) > 1 else np.nan
        row |= {"trials": int(tuning.get("trials") or 0), "on_edge": bool(tuning.get("on_edge") or False)}
        row |= {"train_seconds": runs.train_seconds.mean(), "seconds_per_step": runs.seconds_per_step.median()}
        row |= {"peak_memory_mb": runs.peak_memory_bytes.median() / 1e6, "contended": bool(runs.contended.any())}
        row |= {"on_gpu": bool(runs.driver.notna().any()), "machine": f"{runs.device.iloc[0]} {runs.threads.iloc[0]}"}
        rows.append(row)
    table = pd.DataFrame(rows)
    if len(table):
        base = table[table.optimizer == BASE].set_index("task")
        alike = {name: table[name] == table.task.map(base[name]) for name in ("machine", "on_gpu")}
        ratio = table.seconds_per_step / table.task.map(base.seconds_per_step)
        table["time_ratio"] = ratio.where(alike["machine"])  # what one takes is no multiple of what another takes
        table["memory_ratio"] = (table.peak_memory_mb / table.task.map(base.peak_memory_mb)).where(alike["on_gpu"])
        table = table.drop(columns=["on_gpu", "machine"])
    return table


def tuning_of(runs: pd.DataFrame) -> dict:
    """The search that a method's runs come from; one made again by hand does not say so."""
    return max(runs.tuning, key=len)


def methods(records: Records, *tasks: str):
    """Yield `(task, optimizer, final runs)` of the given tasks, or of all, in the order of every table."""
    for task in tasks or records.tasks:
        of_task = records.methods.get(task, {})
        for optimizer in order(of_task):
            yield task, optimizer, of_task[optimizer]


def targets(records: Records) -> dict[str, dict[str, float]]:
    """Targets by task and measure: the task file's own, or the median final value of tuned SGD-m."""
    found = {}
    for task, optimizer, runs in methods(records):
        if optimizer == BASE:
            own = (records.config(task, BASE).get("task") or {}).get("target")
            # A diverged seed of SGD-m is a bad value, not a missing one.
            worst = {m: -np.inf if larger_is_better(runs, m) else np.inf for m in ("train_loss", "test_metric")}
            found[task] = {m: float(np.median(final_values(runs, m).fillna(worst[m]))) for m in worst}
            found[task] |= own if isinstance(own, dict) else {} if own is None else {"train_loss": float(own)}
    return found


@lru_cache(maxsize=4)
def costs_to_target(records: Records) -> pd.DataFrame:
    """One row per run and measure: the time, gradient equivalents and steps until the target; misses are infinite."""
    goals, rows = targets(records), []
    for task, optimizer, runs in methods(records):
        for run in runs.itertuples() if task in goals else ():
            curve = records.curves_by_run[run.run]
            for measure, target in goals[task].items():
                row = {"task": task, "optimizer": optimizer, "seed": run.seed, "measure": measure, "target": target}
                larger = larger_is_better(runs, measure)
                reachable = run.status == "finished" and np.isfinite(target)
                for cost in COSTS:
                    reached = statistics.cost_to_target(curve[cost], curve[measure], target, larger)
                    row[cost] = reached if reachable else np.inf
                rows.append(row | {"contended": run.contended})
    return pd.DataFrame(rows, columns=["task", "optimizer", "seed", "measure", "target", *COSTS, "contended"])


def median_costs(costs: pd.DataFrame, measure: str, cost: str) -> pd.DataFrame:
    """Median cost to target over seeds (tasks × methods) of the methods that ran on every task; empty if contended."""
    chosen = costs[costs.measure == measure]
    if not len(chosen) or (cost == "train_seconds" and chosen.contended.any()):
        return pd.DataFrame()
    table = chosen.groupby(["task", "optimizer"])[cost].median().unstack()
    table = table.dropna(axis=1, how="any")  # a method that did not run on a task is not compared, not a miss
    return table[order(table.columns)]


def settings(records: Records) -> pd.DataFrame:
    """One row per task, method and hyperparameter: its value, whether it was searched, where, and what was chosen."""
    rows = []
    searches = {(t.task, t.optimizer): t for t in records.tunings.itertuples()}
    for task, optimizer, runs in methods(records):
        config = dict(records.config(task, optimizer).get("optimizer") or {})
        space = config.pop("search", None) or {}
        for key in ("about", "_target_", "_partial_"):
            config.pop(key, None)
        search, tuning = searches.get((task, optimizer)), tuning_of(runs)
        for name, value in config.items():
            entry = space.get(name) or {}
            bounds = entry.get(runs.family.iloc[0])
            row = {"task": task, "optimizer": optimizer, "method": runs.label.iloc[0], "field": name}
            row |= {"value": value if isinstance(value, str) else json.dumps(value)}
            low, high = bounds if bounds else (np.nan, np.nan)
            row |= {"search_low": low, "search_high": high, "source": entry.get("source", space.get("source", ""))}
            row |= {"trials": int(tuning.get("trials") or 0) if bounds else 0}
            row |= {"selected": (tuning.get("selected") or {}).get(name), "on_edge": False, "score": np.nan}
            if bounds:
                row["on_edge"] = is_on_edge(row["selected"], low, high)
                row["score"] = search.score if search is not None else np.nan
            rows.append(row)
    columns = ["task", "optimizer", "method", "field", "value", "search_low", "search_high", "source", "trials"]
    return pd.DataFrame(rows, columns=[*columns, "selected", "on_edge", "score"])


def is_on_edge(value: float | None, low: float, high: float) -> bool:
    """Whether a selected value lies in the outer tenth of its range, as `runners.tune` has it of a whole search."""
    return value is not None and not EDGE <= np.log(value / low) / np.log(high / low) <= 1 - EDGE


# ---- as shown ------------------------------------------------------------------------------------------------------


def shown_results(table: pd.DataFrame) -> pd.DataFrame:
    """The results table as a reader sees it: `mean ± std`, ratios, and flags in words."""
    tasks = [f"{r.task} (surrogate)" if isinstance(r.surrogate, str) else r.task for r in table.itertuples()]
    shown = pd.DataFrame({"Task": tasks, "Method": table.method})
    shown["Training loss"] = [_spread(r.train_loss_mean, r.train_loss_std, r) for r in table.itertuples()]
    accuracy = table.metric == "accuracy"
    shown["Test accuracy (%) / error"] = [
        _spread(*(x * (100 if a else 1) for x in (r.test_metric_mean, r.test_metric_std)), r)
        for r, a in zip(table.itertuples(), accuracy, strict=True)
    ]
    shown["n"] = table.n
    shown["Trials"] = [f"{r.trials}{' (edge)' if r.on_edge else ''}" for r in table.itertuples()]
    notes = [" (contended)" if contended else "" for contended in table.contended]
    shown["Time (s)"] = [number(s) + note for s, note in zip(table.train_seconds, notes, strict=True)]
    alone = ~table.contended & ~table.task.isin(table.task[table.contended & (table.optimizer == BASE)])
    shown["Time per step / SGD-m"] = table.time_ratio.where(alone).map(lambda x: number(x, 3))
    shown["Memory / SGD-m"] = table.memory_ratio.map(lambda x: number(x, 3))
    return shown


def _spread(mean: float, std: float, row) -> str:
    if row.diverged:
        return f"diverged {row.diverged}/{row.n}"
    return number(mean) if np.isnan(std) else f"{number(mean)} ± {number(std, 2)}"


def number(value, digits: int = 4) -> str:
    """A number for reading: significant digits, no exponent where it can be helped, a dash for nothing.

    >>> number(0.012345), number(123456.0), number(float("nan")), number(1e-7), number(float("inf"))
    ('0.01235', '123456', '–', '1e-07', '∞')
    """
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:.{min(decimals, 6)}f}"


def to_markdown(table: pd.DataFrame) -> str:
    """A GitHub table."""
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


TEX = str.maketrans(
    {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}"}
    | {
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "±": r"$\pm$",
        "–": "--",
        "—": "---",
    }
    | {"∞": r"$\infty$", "−": "$-$", "×": r"$\times$", "≤": r"$\le$", "≥": r"$\ge$", "²": "$^2$", "ℓ": r"$\ell$"}
    | {"τ": r"$\tau$", "σ": r"$\sigma$", "λ": r"$\lambda$", "ε": r"$\varepsilon$", "β": r"$\beta$", "…": r"\dots{}"}
    | {"“": "``", "”": "''", "’": "'", "·": r"$\cdot$", "→": r"$\to$", "½": r"$\tfrac12$"}
)


def to_latex(table: pd.DataFrame, columns: str = "", long: bool = False) -> str:
    """A booktabs table that drops into a paper; rows of the first column are parted by rules.

    Args:
        table: as shown; cells are text.
        columns: LaTeX's column types; by default two left-aligned ones, then right-aligned ones.
        long: a longtable, which breaks over pages.
    """
    body, last = [], None
    for row in table.astype(str).to_numpy().tolist():
        if long and last not in (None, row[0]):
            body.append(r"\midrule")
        cells = [("" if row[0] == last else row[0]), *row[1:]] if long else row
        body.append(" & ".join(cell.translate(TEX) for cell in cells) + r" \\")
        last = row[0]
    kind = "longtable" if long else "tabular"
    columns = columns or "ll" + "r" * (len(table.columns) - 2)
    head = [r"\toprule", " & ".join(str(column).translate(TEX) for column in table.columns) + r" \\", r"\midrule"]
    head += [r"\endhead"] if long else []
    foot = [r"\bottomrule", rf"\end{{{kind}}}"]
    return "\n".join([rf"\begin{{{kind}}}{{{columns}}}", *head, *body, *foot]) + "\n"


def searches(chosen: pd.DataFrame) -> pd.DataFrame:
    """Of the settings, the searched fields as a reader sees them: where, how often, and what was selected."""
    found = chosen[chosen.trials > 0]
    shown = pd.DataFrame({"Task": found.task, "Method": found.method, "Field": found.field})
    bounds = zip(found.search_low, found.search_high, strict=True)
    shown["Searched"] = [f"{low:g} – {high:g}" for low, high in bounds]
    shown["Trials"] = found.trials
    edges = zip(found.selected, found.on_edge, strict=True)
    shown["Selected"] = [f"{value:.4g}{' (edge)' if edge else ''}" for value, edge in edges]
    return shown


def hyperparameters(chosen: pd.DataFrame) -> pd.DataFrame:
    """Of the settings, those that were not searched, a row per method; values that differ by task in tasks' order."""
    rows = []
    for method, fields in chosen[chosen.trials == 0].groupby("method", sort=False):
        parts = [
            f"{field} {' / '.join(dict.fromkeys(values.value))}"
            for field, values in fields.groupby("field", sort=False)
        ]
        rows.append({"Method": method, "Fixed settings": ", ".join(parts)})
    return pd.DataFrame(rows, columns=["Method", "Fixed settings"])


def claims_table(judged: list[dict]) -> pd.DataFrame:
    """A row per claim and measure: the verdict and why."""
    rows = [
        {"Claim": claim["id"], "Sentence": claim["sentence"], "Measure": verdict["measure"].replace("_", " ")}
        | {"Verdict": verdict["verdict"], "Why": "; ".join(filter(None, (verdict["reason"], verdict["caveat"])))}
        for claim in judged
        for verdict in claim["verdicts"]
    ]
    return pd.DataFrame(rows)


def write(records: Records, judged: list[dict], folder: Path) -> pd.DataFrame:
    """Write every table under `folder`; returns the results."""
    folder.mkdir(parents=True, exist_ok=True)
    table, chosen, costs = results(records), settings(records), costs_to_target(records)
    runs = records.runs.drop(columns=["config", "tuning", "versions"])
    for name, data in (("results", table), ("settings", chosen), ("costs_to_target", costs), ("runs", runs)):
        data.to_csv(folder / f"{name}.csv", index=False, float_format=DIGITS)
    _write_shown(folder, "claims", claims_table(judged), "lp{4cm}lp{2cm}p{5cm}", long=True)
    if len(table):
        shown = shown_results(table)
        _write_shown(folder, "results", shown, "ll" + "r" * 7, long=True, csv=False)
        for task, rows in shown.groupby(table.task, sort=False):
            text = to_latex(rows.drop(columns="Task"), "l" + "r" * 7)
            (folder / f"results_{task}.tex").write_text(text)
        _write_shown(folder, "hyperparameters", hyperparameters(chosen), "lp{11cm}")
        _write_shown(folder, "searches", searches(chosen), "lllrrr", long=True)
    return table


def _write_shown(
    folder: Path, name: str, table: pd.DataFrame, columns: str, long: bool = False, csv: bool = True
) -> None:
    (folder / f"{name}.tex").write_text(to_latex(table, columns, long))
    (folder / f"{name}.md").write_text(to_markdown(table))
    if csv:
        table.to_csv(folder / f"{name}.csv", index=False, float_format=DIGITS)
