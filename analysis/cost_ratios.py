"""Tests of what a step costs, in the runs and in the benchmark, as ratios to another method's."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from analysis.records import Records
from analysis.verdicts import (
    Claim,
    NotTestedError,
    Verdict,
    all_hold,
    check_comparable,
    guarded,
    runs_of,
    tasks_of,
    testable,
)

ABOUT = 0.15  # what "about" allows
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
    rows, missing = testable([(task, *pair) for task in tasks_of(records, claim) for pair in claim.pairs], of_runs)
    timed, untimed = testable(steps, lambda *step: _bench_row(records, *step, columns))
    if not rows and not timed:
        raise NotTestedError(f"{missing}, and there is no benchmark (make bench)")
    where = " of the runs and the benchmark" if rows and timed else " of the benchmark" if timed else ""
    return [*rows, *timed], missing and (untimed if timed else missing), where


def _ratios(records: Records, task: str, method: str, rival: str, columns: tuple[str, ...]) -> dict:
    found = {}
    for column in columns:
        alone = column == "seconds_per_step"
        ours, theirs = (runs_of(records, task, name, alone=alone) for name in (method, rival))
        check_comparable(task, ours, theirs, timed=alone)
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


def _costs_hold(measure: str, rows: list[dict], failing: str, where: str, missing: str) -> Verdict:
    """Costs are no matter of chance: one that is too high decides, whatever has not been measured."""
    return all_hold(measure, rows, failing, where, missing if all(row["holds"] for row in rows) else "")
