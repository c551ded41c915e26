"""Read a record, the searches, a table; what cannot be read is a ValueError that says why in a few words.

Only files are read, never project code, so that records of another machine or another version of the harness can be
analysed too.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from analysis.alike import variant_of

RECORD_VERSION = 1
AXES = ("epoch", "train_seconds", "gradient_equivalents", "step")
VALUES = ("train_loss", "val_loss", "test_loss", "val_metric", "test_metric")
FLAT = (
    "status", "task", "family", "optimizer", "label", "kind", "seed", "holdout", "steps", "epochs", "train_seconds",
    "seconds_per_step", "peak_memory_bytes", "gradient_equivalents", "contended", "diverged_at", "surrogate", "message",
)  # fmt: skip
PROVENANCE = ("commit", "dirty", "device", "driver", "threads", "created")
REQUIRED = ("record_version", "status", "task", "optimizer", "seed", "final")


def read_record(path: Path) -> tuple[dict, pd.DataFrame]:
    """One record's row and curve; a ValueError tells in a few words why it cannot be read."""
    try:
        summary = json.loads((path / "summary.json").read_bytes())
    except FileNotFoundError:
        half = (path / "config.yaml").exists() or (path / "metrics.csv").exists()
        raise ValueError("unfinished: no summary.json" if half else "not a record: no summary.json") from None
    except ValueError:
        raise ValueError("summary.json is not JSON") from None
    missing = [key for key in REQUIRED if not isinstance(summary, dict) or key not in summary]
    if missing:
        raise ValueError(f"summary.json lacks {', '.join(missing)}")
    if summary["record_version"] != RECORD_VERSION:
        raise ValueError(f"record version {summary['record_version']}; this analysis reads version {RECORD_VERSION}")
    try:
        curve = pd.read_csv(path / "metrics.csv")
    except (FileNotFoundError, ValueError):  # pandas' own errors and a bad encoding are of the latter kind
        raise ValueError("metrics.csv is missing or unreadable") from None
    metric = next((c.removeprefix("test_") for c in curve.columns if c.startswith("test_") and c != "test_loss"), None)
    missing = [column for column in (*AXES, "train_loss") if column not in curve.columns]
    if missing or metric is None:
        raise ValueError(f"metrics.csv lacks {', '.join(missing) or 'a test metric'}")
    curve = curve.rename(columns={f"val_{metric}": "val_metric", f"test_{metric}": "test_metric"})
    if not len(curve):  # of a run that was not finite at its first evaluation
        curve.loc[0] = {column: 0.0 if column in AXES else np.nan for column in curve}
    if summary["status"] == "finished" and curve.step.iloc[-1] != summary.get("steps", curve.step.iloc[-1]):
        raise ValueError(f"metrics.csv ends at step {curve.step.iloc[-1]} of {summary['steps']}")
    try:
        return _row(summary, _read_config(path / "config.yaml"), metric), curve
    except (AttributeError, TypeError):
        raise ValueError("summary.json or config.yaml has another form than records have") from None


def _row(summary: dict, config: dict, metric: str) -> dict:
    """The columns of one record."""
    row = {key: summary.get(key) for key in FLAT} | {"metric": metric, "config": config, "variant": variant_of(config)}
    for kind in ("final", "best"):
        values = summary.get(kind) or {}
        for value in VALUES:
            row[f"{kind}_{value}"] = values.get(value.replace("metric", metric))
    row["tuning"] = {} | (summary.get("tuning") or {})
    provenance = summary.get("provenance") or {}
    versions = {package: str(version) for package, version in (provenance.get("versions") or {}).items()}
    return row | {key: provenance.get(key) for key in PROVENANCE} | {"versions": versions}


def _read_config(path: Path) -> dict:
    """A run's config, {} if there is none; a TypeError if its groups are no groups."""
    try:
        # Seeds of one method differ in this line alone: without it each text is parsed once.
        config = _parse(re.sub(r"(?m)^seed:.*\n", "", path.read_text()))
    except FileNotFoundError:
        return {}
    for group in ("task", "optimizer", "profile"):
        if not isinstance(config.get(group) or {}, dict):
            raise TypeError(group)
    return config


@lru_cache(maxsize=4096)
def _parse(text: str) -> dict:
    try:
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def read_searches(root: Path, skipped: list[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The trials and the outcomes of all searches in `<root>/tuning/`; what is none is added to `skipped`."""
    trials, tunings = [], []
    for path in sorted(root.glob("tuning/*/*.json")):
        try:
            search = json.loads(path.read_bytes())
            key = {"task": search["task"], "optimizer": search["optimizer"]}
            key |= {"metric": search.get("metric"), "mode": search.get("mode") or "min"}
            for trial in search["trials"]:
                # A trial's folder may be written from any place; its last three parts are its name here.
                run = "/".join(Path(trial["folder"] or "").parts[-3:])
                trials.append(key | {"values": trial["values"], "run": run, "status": trial.get("status")})
                trials[-1]["score"] = trial.get("score")
            searched = {name: search.get(name) for name in ("selected", "score", "on_edge")}
            tunings.append(key | searched | {"trials": len(search["trials"])})
        except (ValueError, KeyError, TypeError) as error:
            reason = f"not a search: {type(error).__name__} {error}"
            skipped.append({"folder": str(path.relative_to(root)), "reason": reason})
    trials = pd.DataFrame(trials, columns=["task", "optimizer", "values", "run", "status", "score", "metric", "mode"])
    trials["score"] = pd.to_numeric(trials.score, errors="coerce").astype(float)
    columns = ["task", "optimizer", "trials", "selected", "score", "on_edge", "metric", "mode"]
    return trials, pd.DataFrame(tunings, columns=columns)


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV file that has these columns.

    Raises:
        ValueError: it has not, or is none.
    """
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); make it again, or remove it") from None
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; make it again, or remove it")
    return table
