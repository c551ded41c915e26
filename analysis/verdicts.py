"""What every test of a claim is made of: the claim, the verdict, and what the tests share.

A test yields, for each measure, rows of numbers and a verdict. Missing runs, or fewer seeds than the profile asks for,
make it *not tested*, with the rows that there are beside it; nothing is typed in by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

from analysis.alike import problem_of
from analysis.records import Records

REPRODUCED, NOT_REPRODUCED, NOT_TESTED = "reproduced", "not reproduced", "not tested"


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
    if runs.config.iloc[0].get("optimizer", {}).get("search") and not runs.tuning.map(len).any():
        raise NotTestedError(f"{optimizer} on {task} was not tuned")
    return runs


def check_comparable(task: str, ours: pd.DataFrame, theirs: pd.DataFrame, timed: bool = False) -> None:
    """Runs are compared where the problem and the budget are the same; of times, on the same machine."""
    facts = {"another task or budget": [runs.config.map(problem_of) for runs in (ours, theirs)]}
    facts |= {"other data": [runs.surrogate for runs in (ours, theirs)]}
    if timed:
        facts |= {f"another {column}": [runs[column] for runs in (ours, theirs)] for column in ("device", "threads")}
        facts |= {"CUDA graphs": [runs.config.map(lambda c: bool(c.get("cuda_graphs"))) for runs in (ours, theirs)]}
    for what, (mine, others) in facts.items():
        if set(mine.map(str)) != set(others.map(str)):
            names = " and ".join(runs.optimizer.iloc[0] for runs in (ours, theirs))
            raise NotTestedError(f"one of {names} on {task} was run with {what}")


def guarded(measure: str, judge: Callable[[], Verdict]) -> Verdict:
    """The verdict, or *not tested* where something is missing."""
    try:
        return judge()
    except NotTestedError as missing:
        return Verdict(measure, NOT_TESTED, str(missing), [])


def each(cases: Iterable[tuple], row: Callable[..., dict]) -> tuple[list[dict], str]:
    """A row of every case that can be tested, at least one, and what the first of the others lacks."""
    rows, missing = testable(cases, row)
    if not rows:
        raise NotTestedError(missing)
    return rows, missing


def testable(cases: Iterable[tuple], row: Callable[..., dict]) -> tuple[list[dict], str]:
    """A row of every case that can be tested, and what the first of the others lacks."""
    rows, missing = [], ""
    for case in cases:
        try:
            rows.append(row(*case))
        except NotTestedError as lack:
            missing = missing or str(lack)
    return rows, missing


def all_hold(measure: str, rows: list[dict], failing: str, where: str = "", missing: str = "") -> Verdict:
    """A claim holds where every row does; with rows missing it is not tested."""
    failed = [row for row in rows if not row["holds"]]
    if missing:
        held = f"{len(rows) - len(failed)} of the {len(rows)} comparisons that there are{where} hold"
        return Verdict(measure, NOT_TESTED, f"{missing}; {held}", rows)
    if not failed:
        return Verdict(measure, REPRODUCED, f"holds in all {len(rows)} comparisons{where}", rows)
    names = ", ".join(f"{row['method']} {failing}{_than(row)} on {row['task']}" for row in failed[:3])
    return Verdict(measure, NOT_REPRODUCED, f"{len(failed)} of {len(rows)}{where} fail: {names}", rows)


def _than(row: dict) -> str:
    return f" than {row['rival']}" if "rival" in row else ""
