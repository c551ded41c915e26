"""Load every record under a results root into tidy tables.

A record is a folder `<task>/<optimizer>/<hash>/` with `summary.json`, `metrics.csv`, `config.yaml` and, for methods
with per-layer step sizes, `layers.csv`; of a task also packed (`analysis.packed`). Only files are read, never project
code, so that records of another machine or another version of the harness can be analysed too; which tasks and seeds a
profile asks for stands in `configs/profile/`. What cannot be read is listed with its reason, never fatal.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from analysis.packed import unpack

RECORD_VERSION = 1
PROFILES = Path(__file__).parents[1] / "configs" / "profile"
AXES = ("epoch", "train_seconds", "gradient_equivalents", "step")
VALUES = ("train_loss", "val_loss", "test_loss", "val_metric", "test_metric")
FLAT = (
    "status", "task", "family", "optimizer", "label", "kind", "seed", "holdout", "steps", "epochs", "train_seconds",
    "seconds_per_step", "peak_memory_bytes", "gradient_equivalents", "contended", "diverged_at", "surrogate", "message",
)  # fmt: skip
PROVENANCE = ("commit", "dirty", "device", "driver", "threads", "created")
STUDIES = {
    "linear_convergence": ["task", "width", "estimator", "seed", "step", "gap", "rate_derived"],
    "estimators": ["model", "layer", "estimator", "relative_bias", "standard_error"],
}
BENCH = ["workload", "optimizer", "time_ratio", "memory_ratio", "steps"]
REQUIRED = ("record_version", "status", "task", "optimizer", "seed", "final")
# Where a run was made, logged and stored does not change what it computes: left out when two configs are compared.
# `profile` is represented by the budget it gives to the task.
WHERE = (
    "seed", "results", "data", "tracker", "launcher", "device", "threads", "profile", "tuning", "progress",
    "experiment", "hydra", "cuda_graphs",
)  # fmt: skip


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: what is computed from it can be cached
class Records:
    """Everything read from one results root.

    Attributes:
        root: The folder that was read.
        folder: Where the runs are.
        unpacked: Where they are unpacked to; None if they were not packed.
        runs: One row per readable run, trials included; `run` is its folder relative to `root`. `final_*` columns hold
            the last finite values, `variant` names the settings (config without seed and place), `current` marks the
            variant that stands for its method on its task.
        curves: One row per evaluation: `run`, the four axes of `AXES` and the columns of `VALUES`.
        trials: One row per tuning trial: `task, optimizer, values, run, status, score, metric, mode`.
        tunings: One row per search: `task, optimizer, trials, selected, score, on_edge, metric, mode`.
        skipped: Folders that are not readable records: `folder, reason`.
        warnings: Sentences on records that should be comparable and are not.
    """

    root: Path
    folder: Path
    unpacked: tempfile.TemporaryDirectory | None
    runs: pd.DataFrame
    curves: pd.DataFrame
    trials: pd.DataFrame
    tunings: pd.DataFrame
    skipped: pd.DataFrame
    warnings: list[str]

    @cached_property
    def finals(self) -> pd.DataFrame:
        """The finished and diverged final runs that stand for their methods, ordered by task, optimizer and seed."""
        runs = self.runs
        keep = ~runs.holdout & runs.current & runs.status.isin(["finished", "diverged"])
        return runs[keep].sort_values(["task", "optimizer", "seed"], ignore_index=True)

    @cached_property
    def methods(self) -> dict[str, dict[str, pd.DataFrame]]:
        """Final runs by task and optimizer."""
        found = {}
        for (task, optimizer), runs in self.finals.groupby(["task", "optimizer"]):
            found.setdefault(task, {})[optimizer] = runs
        return found

    @cached_property
    def tasks(self) -> list[str]:
        """All tasks of the profile, whichever of them were run, in its order; then any other that has final runs."""
        declared = [task for profile in self._profiles for task in profile.get("tasks") or []]
        return list(dict.fromkeys([*declared, *sorted(self.finals.task.unique())]))

    def seeds(self, task: str) -> int:
        """Number of seeds that the profile asks of a task; without a profile, the most that any method has."""
        asked = [p.get("seeds") or 0 for p in self._profiles]
        asked = [int(s.get(task, s.get("default", 0)) if isinstance(s, dict) else s) for s in asked]
        if any(asked):
            return max(asked)
        counts = self.finals[self.finals.task == task].groupby("optimizer").seed.nunique()
        return int(counts.max()) if len(counts) else 0

    @cached_property
    def _profiles(self) -> list[dict]:
        """The profiles that the final runs were made with, as declared: a run's config holds them as the command line
        left them, with fewer tasks perhaps, and a claim is not the smaller for that."""
        finals = self.runs[~self.runs.holdout]
        used = {json.dumps(p, sort_keys=True): p for c in finals.config if isinstance(p := c.get("profile"), dict)}
        declared = [_declared(used[key]) for key in sorted(used)]
        return [profile for i, profile in enumerate(declared) if profile not in declared[:i]]

    @cached_property
    def curves_by_run(self) -> dict[str, pd.DataFrame]:
        """Evaluations of each run, keyed by its folder."""
        return dict(tuple(self.curves.groupby("run", sort=False)))

    def config(self, task: str, optimizer: str) -> dict:
        """Resolved config of one final run of a method on a task ({} if there is none)."""
        runs = self.methods.get(task, {}).get(optimizer)
        return {} if runs is None else runs.config.iloc[0]

    def surrogate(self, task: str) -> str:
        """What stands in for the task's original data set ("" where it is the original)."""
        surrogates = self.runs[self.runs.task == task].surrogate.dropna().unique()
        return f"Surrogate data: {surrogates[0]}" if len(surrogates) else ""

    def title(self, task: str) -> str:
        """The task's name in titles; one on surrogate data says so."""
        return f"{task} (surrogate data)" if self.surrogate(task) else task

    def layers(self, run: str) -> pd.DataFrame:
        """Per-layer diagnostics of one run: `step, epoch, layer, quantity, value` (empty if it has none)."""
        columns = ["step", "epoch", "layer", "quantity", "value"]
        try:
            layers = _table(self.folder / run / "layers.csv", columns)
        except (FileNotFoundError, ValueError):
            return pd.DataFrame(columns=columns)
        return layers.assign(value=pd.to_numeric(layers.value, errors="coerce"))

    def study(self, name: str) -> pd.DataFrame | None:
        """The table `study/<name>.csv` under the root; None where there is none."""
        path = self.root / "study" / f"{name}.csv"
        return _table(path, STUDIES[name]) if path.exists() else None

    @cached_property
    def benches(self) -> dict[str, pd.DataFrame]:
        """The benchmark's tables by device, from `bench/<device>/bench.csv` beside the root: the rows that ran."""
        paths = sorted(self.root.resolve().parent.glob("bench/*/bench.csv"))
        tables = {path.parent.name: _table(path, BENCH) for path in paths}
        return {device: table[table.time_ratio.notna()] for device, table in tables.items()}

    @cached_property
    def ablations(self) -> dict[str, pd.DataFrame]:
        """Tables of `analysis.ablation` by what they vary, from `ablation/<name>/ablation.csv` beside the root."""
        paths = sorted(self.root.resolve().parent.glob("ablation/*/ablation.csv"))
        return {
            path.parent.name: _table(path, ["task", "optimizer", "n", "diverged", "train_loss_mean"]) for path in paths
        }


def _table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A table that has these columns, and rows.

    Raises:
        ValueError: it has not.
    """
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); make it again, or remove it") from None
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; make it again, or remove it")
    return table


def load(root: Path | str) -> Records:
    """Read all records under `root` (`<root>/runs/` where there is one) and the searches in `<root>/tuning/`.

    Raises:
        FileNotFoundError: `root` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no results folder {root}: run `make reproduce-paper` first, or name another folder")
    rows, tables, skipped = [], [], []
    unpacked = unpack(root / "runs")
    folder = Path(unpacked.name) if unpacked else _runs_folder(root)
    for path in sorted(folder.glob("[!.]*/[!.]*/[!.]*")):
        if not path.is_dir() or (folder == root and path.parts[len(root.parts)] in ("tuning", "report")):
            continue
        try:
            row, curve = _read(path)
        except ValueError as error:
            shown = Path("runs") / path.relative_to(folder) if unpacked else path.relative_to(root)
            skipped.append({"folder": str(shown), "reason": str(error)})
            continue
        row["run"] = str(path.relative_to(folder))
        rows.append(row)
        tables.append(curve)
    for path in sorted(root.glob("runs/[!.]*/")) if unpacked else ():
        skipped.append({"folder": str(path.relative_to(root)), "reason": "beside packed records, which alone are read"})
    trials, tunings = _read_tunings(root, skipped)
    runs = _runs_table(rows)
    runs["current"] = _current(runs, tunings)
    curves = _curves_table([row["run"] for row in rows], tables)
    skipped = pd.DataFrame(skipped, columns=["folder", "reason"])
    return Records(root, folder, unpacked, runs, curves, trials, tunings, skipped, _warnings(runs))


def _declared(profile: dict) -> dict:
    """The project's file of that profile; of one that has none (made by hand, or since removed) what the run says."""
    path = PROFILES / f"{profile.get('name')}.yaml"
    return (yaml.safe_load(path.read_text()) or profile) if path.is_file() else profile


def _runs_folder(root: Path) -> Path:
    return root / "runs" if (root / "runs").is_dir() else root


def _read(path: Path) -> tuple[dict, pd.DataFrame]:
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
    row = {key: summary.get(key) for key in FLAT} | {"metric": metric, "config": config, "variant": _variant(config)}
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


def _variant(config: dict) -> str:
    """A short name of a run's settings: equal for two runs that differ only in the seed or in where they were made."""
    settings = {key: value for key, value in config.items() if key not in WHERE}
    settings["profile_budget"] = _profile_budget(config)
    if config.get("optimizer"):  # what is said about a method is none of its settings
        about = config["optimizer"].get("about") or {}
        settings["optimizer"] = {key: value for key, value in config["optimizer"].items() if key != "search"}
        settings["optimizer"]["about"] = [about.get("name"), about.get("version")]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _runs_table(rows: list[dict]) -> pd.DataFrame:
    columns = [
        "run", *FLAT, "metric", *(f"{kind}_{value}" for kind in ("final", "best") for value in VALUES),
        "tuning", *PROVENANCE, "versions", "config", "variant",
    ]  # fmt: skip
    runs = pd.DataFrame(rows, columns=columns)
    numbers = [c for c in columns if c.startswith(("final_", "best_"))]
    numbers += ["steps", "epochs", "train_seconds", "seconds_per_step", "peak_memory_bytes", "gradient_equivalents"]
    runs[numbers] = runs[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    runs["seed"] = pd.to_numeric(runs.seed, errors="coerce").fillna(-1).astype(int)
    for column in ("holdout", "contended"):
        runs[column] = np.array([bool(value) for value in runs[column]], dtype=bool)
    runs["label"] = runs.label.fillna(runs.optimizer)
    return runs


def _curves_table(names: list[str], tables: list[pd.DataFrame]) -> pd.DataFrame:
    columns = ["run", *AXES, *VALUES]
    if not tables:
        return pd.DataFrame(columns=columns)
    lengths = [len(table) for table in tables]
    curves = pd.concat(tables, ignore_index=True).reindex(columns=columns[1:])
    curves = curves.apply(pd.to_numeric, errors="coerce").astype(float)
    curves.insert(0, "run", pd.Categorical.from_codes(np.repeat(np.arange(len(names)), lengths), categories=names))
    return curves


def _read_tunings(root: Path, skipped: list[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
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


def _current(runs: pd.DataFrame, tunings: pd.DataFrame) -> np.ndarray:
    """Which runs belong to the settings that stand for their method on their task.

    A root may hold older settings of a method (a search repeated with more trials, a rate set by hand, a method or task
    of an earlier version). The settings that the present search selected come first, then the latest versions, then the
    most seeds, then the newest.
    """
    selected = {(t.task, t.optimizer): (t.selected, t.trials) for t in tunings.itertuples()}
    current = np.zeros(len(runs), dtype=bool)
    finals = runs[~runs.holdout & runs.status.isin(["finished", "diverged"])]
    for key, group in finals.groupby(["task", "optimizer"]):

        def rank(variant: str, group: pd.DataFrame = group, key: tuple = key) -> tuple:
            rows = group[group.variant == variant]
            tuning = rows.tuning.iloc[0]
            tuned = (tuning.get("selected"), tuning.get("trials")) == selected.get(key, (None, None))
            return tuned, versions_of(rows.config.iloc[0]), rows.seed.nunique(), str(rows.created.max()), variant

        best = max(group.variant.unique(), key=rank)
        current[group.index[group.variant == best]] = True
    current |= (runs.holdout | ~runs.index.isin(finals.index)).to_numpy()
    # The same seed run twice with the same settings (on two machines): the newest stands.
    newest = finals[current[finals.index]].sort_values("created", kind="stable")
    current[newest.index[newest.duplicated(["task", "optimizer", "seed"], keep="last")]] = False
    return current


def problem_of(config: dict) -> str:
    """What a run was to solve, and for how long: task and budget, without what is only read off."""
    task = {k: v for k, v in (config.get("task") or {}).items() if k not in ("target", "evaluate_every", "select")}
    return json.dumps([task, config.get("budget"), _profile_budget(config)], sort_keys=True, default=str)


def _profile_budget(config: dict) -> dict | None:
    """What the run's profile gives to its task."""
    task, profile = config.get("task") or {}, config.get("profile") or {}
    return (profile.get("budgets") or {}).get(task.get("name"))


def versions_of(config: dict) -> tuple[int, int]:
    """Versions of the task and of the method; 0 where a config states none."""
    task, about = config.get("task"), (config.get("optimizer") or {}).get("about")
    return tuple(int(part.get("version") or 0) if isinstance(part, dict) else 0 for part in (task, about))


def _warnings(runs: pd.DataFrame) -> list[str]:
    """What should be the same among the runs of one task and is not."""
    found = []
    finals = runs[~runs.holdout & runs.current & runs.status.isin(["finished", "diverged"])]
    for task, group in finals.groupby("task"):
        same = {column: group[column] for column in ("device", "threads", "commit", "surrogate")}
        same["cuda_graphs"] = group.config.map(lambda config: config.get("cuda_graphs") or False)
        same["number of trials"] = group.tuning.map(lambda tuning: tuning.get("trials")).replace(0, np.nan).dropna()
        for name, values in same.items():
            methods = group.groupby(values.where(values.notna(), "none").map(str)).optimizer.unique()
            if len(methods) > 1:
                parts = [f"{value[:24]} ({', '.join(sorted(names))})" for value, names in methods.items()]
                found.append(f"{task}: runs differ in {name}: {'; '.join(parts)}")
        versions = pd.DataFrame(group.versions.tolist())
        for package in versions.columns[versions.nunique() > 1]:
            seen = ", ".join(sorted(versions[package].dropna().astype(str).unique()))
            found.append(f"{task}: runs differ in version of {package}: {seen}")
        if group.dirty.fillna(False).any():
            found.append(f"{task}: {int(group.dirty.fillna(False).sum())} runs were made from uncommitted code")
        if group.config.map(problem_of).nunique() > 1:
            found.append(f"{task}: runs differ in the task's settings or the budget; no claim compares those")
    for optimizer, group in finals.groupby("optimizer"):
        versions = group.groupby(group.config.map(lambda config: versions_of(config)[1])).task.unique()
        if len(versions) > 1:
            parts = [f"{version} ({', '.join(sorted(tasks))})" for version, tasks in versions.items()]
            found.append(f"{optimizer}: of several versions: {'; '.join(parts)}")
    stale = runs[~runs.current]
    for (task, optimizer), group in stale.groupby(["task", "optimizer"]):
        found.append(f"{task}: {len(group)} runs of {optimizer} with other settings are set aside")
    no_config = runs[runs.config.map(len) == 0]
    if len(no_config):
        found.append(f"{len(no_config)} runs have no readable config.yaml: their settings cannot be compared")
    return found
