"""The report: one self-contained folder from one results root.

`python -m analysis.report results/quick` writes `results/quick/report/` with `index.html`, `claims.json`, `figures/`
(PNG, PDF and CSV of each) and `tables/` (CSV, LaTeX, Markdown). The page works from disk, without a network.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import yaml

from analysis import claims, figures, paper, tables
from analysis.curves import learnt, mean_curves, reach
from analysis.panels import AXIS_LABELS, Drawn, methods_of, metric_name, scale_of
from analysis.reading import AXES
from analysis.records import Records, load
from analysis.style import style
from analysis.verdicts import NOT_REPRODUCED, NOT_TESTED, REPRODUCED

CONFIGS = Path(__file__).parents[1] / "configs"
SCHEDULES = {"StepLR": "step", "CosineAnnealingLR": "cosine"}
PAGE = Path(__file__).parent / "page"
FAMILIES = {"autoencoder": "Autoencoders", "cnn": "Convolutional networks", "gcn": "Graph convolutional networks"}
POINTS = 150  # of each interactive curve: finer than a screen shows
# Columns of a claim's numbers: key, heading, digits.
NUMBERS = (
    ("task", "Task", 0), ("method", "Method", 0), ("rival", "Against", 0), ("n", "n", 0),
    ("difference", "Difference", 3), ("interval", "95 % interval", 3), ("margin", "Margin", 3),
    ("p_worse", "p (worse)", 2), ("p_holm", "p (Holm)", 2), ("p_better", "p (better)", 2),
    ("p_not_worse", "p (not worse)", 2), ("ratio", "Ratio", 3),
    ("memory_ratio", "Memory ratio", 3), ("limit", "Limit", 3), ("last_over_peak", "Last / peak", 2),
    ("correlation", "Correlation", 2), ("r_squared", "R²", 3), ("field", "Field", 0), ("from", "From", 2),
    ("to", "To", 2), ("holds", "Holds", 0),
)  # fmt: skip


def build(root: Path | str, out: Path | str | None = None) -> Path:
    """Build the report on the records under `root`; returns the path of its `index.html`.

    It is made in a folder of its own and put in place whole: no half-written report is ever seen.

    Args:
        root: A results folder, such as `results/quick`.
        out: Where the report goes; an earlier report there is replaced. Default: `<root>/report`.

    Raises:
        FileNotFoundError: `root` is not a folder.
        FileExistsError: `out` holds something else than a report.
    """
    root = Path(root)
    out = Path(out) if out else root / "report"
    if out.is_file() or (out.exists() and not (out / "claims.json").exists() and any(out.iterdir())):
        raise FileExistsError(f"{out} is not a report and will not be replaced: name another folder")
    records = load(root)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        fresh.chmod(0o755)
        write(records, fresh)
        replace_folder(out, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return out / "index.html"


def replace_folder(out: Path, fresh: Path) -> None:
    """Put the folder `fresh` in the place of `out`, which is gone as soon as the new one is there."""
    if not out.exists():
        fresh.rename(out)
        return
    old = fresh.with_name(f"{fresh.name}-old")
    out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old)


def write(records: Records, folder: Path) -> None:
    """Write the report's files into an existing folder."""
    judged = claims.judge(records)
    claims.write(judged, folder / "claims.json")
    results = tables.write(records, judged, folder / "tables")
    drawn = figures.draw_all(records, folder / "figures")
    (folder / "paper.tex").write_text(paper.document(records, drawn))
    for name in ("page.css", "page.js"):
        shutil.copyfile(PAGE / name, folder / name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["number"] = tables.number
    page = environment.get_template("index.html.jinja").render(
        head=overview(records),
        claims=[shown_claim(claim, results) for claim in judged],
        counts={v: sum(_overall(c) == v for c in judged) for v in (REPRODUCED, NOT_REPRODUCED)},
        families=families(records, results, drawn),
        across=[figure for figure in drawn if not figure.task],
        missing=missing(records),
        troubled=troubled(records),
        skipped=records.skipped.to_dict("records"),
        warnings=records.warnings,
        provenance=provenance(records),
        typed=shlex.quote(_shown_root(records.root)),
    )
    (folder / "index.html").write_text(page)


def _shown_root(root: Path) -> str:
    try:
        return str(root.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(root)


def overview(records: Records) -> dict:
    """What was run, on what: the numbers of the first screen."""
    runs, finals = records.runs, records.finals
    profiles = sorted({(c.get("profile") or {}).get("name", "") for c in runs.config} - {""})
    return {
        "profile": ", ".join(profiles) or records.root.name,
        "tasks": finals.task.nunique(),
        "methods": finals.optimizer.nunique(),
        "seeds": _range(finals.groupby(["task", "optimizer"]).seed.nunique()),
        "finals": len(finals),
        "trials": int(runs.holdout.sum()),
        "diverged": int((finals.status == "diverged").sum()),
        "training": _duration(float(runs.train_seconds.sum())),
        "contended": int(finals.contended.sum()),
        "surrogates": sorted(runs.surrogate.dropna().unique()),
    }


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{tables.number(seconds / size, 2)} {unit}"
    return f"{seconds:.0f} seconds"


def _range(values: pd.Series) -> str:
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return str(low) if low == high else f"{low}–{high}"


def _overall(claim: dict) -> str:
    """A claim's verdict in one word: it must hold on every measure that was tested."""
    verdicts = [verdict["verdict"] for verdict in claim["verdicts"]]
    for verdict in (NOT_REPRODUCED, NOT_TESTED):
        if verdict in verdicts:
            return verdict
    return REPRODUCED


def shown_claim(claim: dict, results: pd.DataFrame) -> dict:
    """A claim with its numbers as text: accuracies in points, methods by label."""
    labels = dict(zip(results.optimizer, results.method, strict=True)) if len(results) else {}
    verdicts = []
    for verdict in claim["verdicts"]:
        rows = [_shown_row(row, labels) for row in verdict["rows"]]
        keys = [(key, name) for key, name, _ in NUMBERS if any(key in row for row in rows)]
        cells = [[row.get(key, "–") for key, _ in keys] for row in rows]
        verdicts.append(verdict | {"heads": [name for _, name in keys], "cells": cells})
    return claim | {"verdicts": verdicts, "overall": _overall(claim)}


def _shown_row(row: dict, labels: dict) -> dict:
    row = dict(row)
    factor, unit = (100, " pt") if row.get("larger") else (1, "")
    if "low" in row:
        low, high = (tables.number(row[key] * factor, 3) for key in ("low", "high"))
        row["interval"] = f"{low} … {high}"
    for key in ("difference", "margin"):
        if key in row:
            row[key] = tables.number(row[key] * factor, 3) + unit
    for key in ("method", "rival"):
        row[key] = labels.get(row.get(key), row.get(key))
    row["holds"] = "yes" if row["holds"] else "no"
    if row["rival"] is None:
        del row["rival"]
    digits = {key: digits for key, _, digits in NUMBERS}
    return {
        k: v if isinstance(v, str) or not digits[k] else tables.number(v, digits[k])
        for k, v in row.items()
        if k in digits
    }


def families(records: Records, results: pd.DataFrame, drawn: list[Drawn]) -> list[dict]:
    """The tasks of each family with their figures, curves and results."""
    costs = tables.costs_to_target(records)
    costs = costs.groupby(["task", "optimizer", "measure"]).gradient_equivalents.median()
    found = []
    for family in sorted(results.family.unique() if len(results) else [], key=lambda f: (f not in FAMILIES, f)):
        tasks = []
        for task in dict.fromkeys(results[results.family == family].task):
            mine = [figure for figure in drawn if figure.task == task]
            rows = results[results.task == task]
            tasks.append({
                "name": task, "note": records.surrogate(task), "accuracy": rows.metric.iloc[0] == "accuracy",
                "curves": [(axis, f) for axis in AXES for f in mine if f.name == f"curves_{axis}_{task}"],
                "axes": AXIS_LABELS,
                "others": [f for f in mine if not f.name.startswith("curves_")],
                "rows": _shown_results(rows, costs), "plot": plot_data(records, task),
            })  # fmt: skip
        found.append({"id": family, "title": FAMILIES.get(family, family), "tasks": tasks})
    return found


def _shown_results(rows: pd.DataFrame, costs: pd.Series) -> list[dict]:
    shown = tables.shown_results(rows)
    best = {"loss": rows.train_loss_mean.idxmin() if rows.train_loss_mean.notna().any() else None}
    metric = rows.test_metric_mean if rows.metric.iloc[0] != "accuracy" else -rows.test_metric_mean
    best["metric"] = metric.idxmin() if metric.notna().any() else None
    found = []
    for index, row in rows.iterrows():
        text = shown.loc[index]
        cells = {"name": row.method, "bold": style(row.optimizer).bold, "loss": text["Training loss"]}
        cells |= {"metric": text["Test accuracy (%) / error"], "n": row.n, "trials": text["Trials"]}
        cells |= {"best": [key for key, value in best.items() if value == index], "color": style(row.optimizer).color}
        cells |= {"time": text["Time (s)"], "time_ratio": text["Time per step / SGD-m"]}
        cells |= {"memory_ratio": text["Memory / SGD-m"]}
        cells["work"] = tables.number(costs.get((row.task, row.optimizer, "train_loss"), np.nan), 3)
        found.append(cells)
    return found


def plot_data(records: Records, task: str) -> dict:
    """The data of a task's interactive curves."""
    data = mean_curves(records, task)
    labels = {optimizer: (label, group) for optimizer, label, group in methods_of(records, task)}
    methods, accuracy = [], scale_of(records, task, "test_metric")[1]
    for optimizer in labels:
        rows = data[data.optimizer == optimizer]
        rows = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), POINTS)).round().astype(int))]
        look, (label, group) = style(optimizer), labels[optimizer]
        entry = {"name": optimizer, "label": label, "kind": group, "color": look.color}
        entry |= {"width": look.width, "dash": look.dashes(), "bold": look.bold}
        for axis in AXES:
            entry[axis] = _rounded(rows[axis])
        for measure in ("train_loss", "test_metric"):
            factor = scale_of(records, task, measure)[0]
            entry[measure] = [_rounded(rows[f"{measure}{end}"] * factor) for end in ("", "_low", "_high")]
        methods.append(entry)
    floor = learnt(data.test_metric, data.evaluation) * 100 if accuracy else None
    panels = [
        {"key": "train_loss", "label": "Training loss", "loss": True, "floor": None},
        {"key": "test_metric", "label": metric_name(records, task), "loss": not accuracy, "floor": floor},
    ]
    ends = {axis: reach(data, axis) for axis in AXES}
    return {"task": task, "axes": AXIS_LABELS, "ends": ends, "panels": panels, "methods": methods}


def _rounded(values: pd.Series) -> list:
    return [None if not np.isfinite(value) else float(f"{value:.5g}") for value in values]


def troubled(records: Records) -> list[dict]:
    """Every run that did not finish, trials included, with the command that makes it again."""
    rows, root = [], Path("results", records.root.name) if records.unpacked else records.root  # not into kept records
    for run in records.runs[records.runs.status != "finished"].sort_values("run").itertuples():
        at = "" if run.diverged_at is None or pd.isna(run.diverged_at) else f"step {int(run.diverged_at)}"
        rows.append({
            "run": run.run, "task": run.task, "method": run.label, "seed": run.seed, "status": run.status, "at": at,
            "kind": "trial" if run.holdout else "final", "message": run.message if isinstance(run.message, str) else "",
            "command": command(run, root / "runs"),
        })  # fmt: skip
    return rows


def command(run, root: Path) -> str:
    """The command that makes one run again, under `root`: what differs by run from the config files."""
    config = run.config
    parts = [f"python -m runners.train task={run.task} optimizer={run.optimizer} seed={run.seed}"]
    profile = (config.get("profile") or {}).get("name")
    parts += [f"profile={profile}"] if profile else []
    parts += [f"threads={config['threads']}"] if config.get("threads") else []
    parts += [f"budget.{unit}={amount}" for unit, amount in (config.get("budget") or {}).items() if amount]
    schedule = ((config.get("schedule") or {}).get("_target_") or "").rpartition(".")[2]
    parts += [f"schedule={SCHEDULES[schedule]}"] if schedule in SCHEDULES else []
    parts += _chosen("task", run.task, config.get("task") or {})
    parts += _chosen("optimizer", run.optimizer, config.get("optimizer") or {})
    parts += [f"{name}=true" for name in ("cuda_graphs", "holdout") if config.get(name) is True]
    return " ".join([*parts, f"results.root={shlex.quote(str(root))}"])


def _chosen(group: str, name: str, settings: dict) -> list[str]:
    """The settings of a task or a method that its config file does not give, or gives by another field."""
    path = CONFIGS / group / f"{name}.yaml"
    given = yaml.safe_load(path.read_text()) if path.exists() else {}
    own = {field: value for field, value in settings.items() if field not in ("_target_", "about", "search")}
    return [
        f"{'' if field in given else '++'}{group}.{field}={'null' if value is None else str(value).replace(' ', '')}"
        for field, value in own.items()
        if not isinstance(value, dict) and (field not in given or value != given[field])
    ]


def missing(records: Records) -> list[tuple[str, Path, str]]:
    """What is not drawn for want of a table: the figure, where its table would be, and what tells how it is made."""
    root = Path(_shown_root(records.root))
    study = {"linear_convergence": "Linear convergence of the idealised method", "estimators": "Curvature estimators"}
    rows = [
        (what, root / "study" / f"{name}.csv", "docs/figures.md")
        for name, what in study.items()
        if records.study(name) is None
    ]
    return rows if records.benches else [*rows, ("Benchmark of a step", root.parent / "bench", "make bench")]


def provenance(records: Records) -> list[tuple[str, str]]:
    """Where the records come from: each fact once, with the number of runs where it differs."""
    runs = records.runs
    facts = []
    for column in ("commit", "dirty", "device", "driver", "threads"):
        counts = runs[column].dropna().astype(str).value_counts()
        text = "; ".join(f"{value}" + (f" ({n} runs)" if len(counts) > 1 else "") for value, n in counts.items())
        facts.append((column, text or "–"))
    versions = pd.DataFrame(runs.versions.tolist())
    for package in versions.columns:
        facts.append((package, ", ".join(sorted(versions[package].dropna().astype(str).unique()))))
    created = runs.created.dropna().astype(str)
    facts.append(("made", f"{created.min()} to {created.max()}" if len(created) else "–"))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report", description="Build the report of a results folder."
    )
    parser.add_argument("root", type=Path, help="a results folder, such as results/quick")
    parser.add_argument("--out", type=Path, help="where the report goes (default: <root>/report)")
    arguments = parser.parse_args()
    root = arguments.root
    holds = any((root / name).is_dir() for name in ("runs", "tuning", "study"))
    if root.is_dir() and not holds and not any(root.glob("*/*/*/summary.json")):  # which a sweep's own folder has
        sys.exit(f"error: there is no record in {root}: name the folder that has runs/, such as results/quick")
    try:
        print(build(root, arguments.out))
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
