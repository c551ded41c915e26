"""Tests of "at least as good" and "better": paired over seeds, on final values or at equal training time.

Margins and definitions are the protocol's, but that "better" is a t-test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.records import Records
from analysis.verdicts import (
    REPRODUCED,
    Claim,
    NotTestedError,
    Verdict,
    all_hold,
    check_comparable,
    each,
    guarded,
    runs_of,
    tasks_of,
)

MEASURES = {"train_loss": "training loss", "test_metric": "test metric"}
LOSS_MARGIN, LOSS_FLOOR, ACCURACY_MARGIN = 0.02, 0.01, 0.005


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


def compared(better: bool, equal_time: bool = False) -> Callable[[Records, Claim], list[Verdict]]:
    """The paired test over seeds of "at least as good" or "better", on final values or at equal training time."""

    def comparison(records: Records, measure: str, task: str, method: str, rival: str) -> dict:
        ours = runs_of(records, task, method, alone=equal_time)
        theirs = runs_of(records, task, rival, alone=equal_time)
        seeds = ours.index.intersection(theirs.index)
        if len(seeds) < (needed := max(records.seeds(task), 2)):
            raise NotTestedError(f"{method} and {rival} share {len(seeds)} of {needed} seeds on {task}")
        ours, theirs = ours.loc[seeds], theirs.loc[seeds]
        check_comparable(task, ours, theirs, timed=equal_time)
        larger = larger_is_better(ours, measure)
        if equal_time:
            x, y = values_at_equal_time(records, ours, theirs, measure)
        else:
            x, y = final_values(ours, measure), final_values(theirs, measure)
        if any((v.isna() & (runs.status == "finished")).any() for v, runs in ((x, ours), (y, theirs))):
            raise NotTestedError(f"{MEASURES[measure]} of {method} or {rival} on {task} was not measured")
        if (x.notna() | y.notna()).sum() < 2:
            raise NotTestedError(f"{method} and {rival} both diverged on {task}, but for one seed at most")
        result = statistics.compare(x, y, margin(y, larger), larger)
        return {"task": task, "method": method, "rival": rival, "larger": larger} | asdict(result)

    def judge(records: Records, claim: Claim, measure: str) -> Verdict:
        cases = [(task, *pair) for task in tasks_of(records, claim) for pair in claim.pairs]
        rows, missing = each(cases, lambda *case: comparison(records, measure, *case))
        for pair in claim.pairs:  # Holm over the tasks
            of_pair = [row for row in rows if (row["method"], row["rival"]) == pair]
            for row, p in zip(of_pair, statistics.holm([row["p_worse"] for row in of_pair]), strict=True):
                # where every task must be better there is nothing to correct for
                passes = row["better"] if better else bool(p > statistics.ALPHA)
                row |= {} if better else {"p_holm": float(p)}
                # to diverge is to fail, however few the seeds are that a test could count
                row["holds"] = passes and row["diverged"] <= row["rival_diverged"]
        failing = "is not better" if better else "is worse by more than the margin or diverges more often"
        verdict = all_hold(measure, rows, failing, missing=missing)
        weak = not better and verdict.verdict == REPRODUCED
        return replace(verdict, caveat="; ".join(filter(None, (_unresolved(rows), _shown(rows))))) if weak else verdict

    return lambda records, claim: [guarded(m, lambda m=m: judge(records, claim, m)) for m in MEASURES]


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
