"""Load every record under a results root into tidy tables.

A record is a folder `<task>/<optimizer>/<hash>/` with `summary.json`, `metrics.csv`, `config.yaml` and, for methods
with per-layer step sizes, `layers.csv`; of a task also packed (`analysis.packed`). Which tasks and seeds a profile asks
for stands in `configs/profile/`. What cannot be read is listed with its reason, never fatal.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from analysis.alike import current_of, warnings_of
from analysis.packed import unpack
from analysis.reading import AXES, FLAT, PROVENANCE, VALUES, read_record, read_searches, read_table

PROFILES = Path(__file__).parents[1] / "configs" / "profile"
STUDIES = {
    "linear_convergence": ["task", "width", "estimator", "seed", "step", "gap", "rate_derived"],
    "estimators": ["model", "layer", "estimator", "relative_bias", "standard_error"],
}
BENCH = ["workload", "optimizer", "time_ratio", "memory_ratio", "steps"]
ABLATION = ["task", "optimizer", "n", "diverged", "train_loss_mean"]


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
            layers = read_table(self.folder / run / "layers.csv", columns)
        except (FileNotFoundError, ValueError):
            return pd.DataFrame(columns=columns)
        return layers.assign(value=pd.to_numeric(layers.value, errors="coerce"))

    def study(self, name: str) -> pd.DataFrame | None:
        """The table `study/<name>.csv` under the root; None where there is none."""
        path = self.root / "study" / f"{name}.csv"
        return read_table(path, STUDIES[name]) if path.exists() else None

    @cached_property
    def benches(self) -> dict[str, pd.DataFrame]:
        """The benchmark's tables by device, from `bench/<device>/bench.csv` beside the root: the rows that ran."""
        paths = sorted(self.root.resolve().parent.glob("bench/*/bench.csv"))
        tables = {path.parent.name: read_table(path, BENCH) for path in paths}
        return {device: table[table.time_ratio.notna()] for device, table in tables.items()}

    @cached_property
    def ablations(self) -> dict[str, pd.DataFrame]:
        """Tables of `analysis.ablation` by what they vary, from `ablation/<name>/ablation.csv` beside the root."""
        paths = sorted(self.root.resolve().parent.glob("ablation/*/ablation.csv"))
        return {path.parent.name: read_table(path, ABLATION) for path in paths}


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
            row, curve = read_record(path)
        except ValueError as error:
            shown = Path("runs") / path.relative_to(folder) if unpacked else path.relative_to(root)
            skipped.append({"folder": str(shown), "reason": str(error)})
            continue
        row["run"] = str(path.relative_to(folder))
        rows.append(row)
        tables.append(curve)
    for path in sorted(root.glob("runs/[!.]*/")) if unpacked else ():
        skipped.append({"folder": str(path.relative_to(root)), "reason": "beside packed records, which alone are read"})
    trials, tunings = read_searches(root, skipped)
    runs = _runs_table(rows)
    runs["current"] = current_of(runs, tunings)
    curves = _curves_table([row["run"] for row in rows], tables)
    skipped = pd.DataFrame(skipped, columns=["folder", "reason"])
    return Records(root, folder, unpacked, runs, curves, trials, tunings, skipped, warnings_of(runs))


def _declared(profile: dict) -> dict:
    """The project's file of that profile; of one that has none (made by hand, or since removed) what the run says."""
    path = PROFILES / f"{profile.get('name')}.yaml"
    return (yaml.safe_load(path.read_text()) or profile) if path.is_file() else profile


def _runs_folder(root: Path) -> Path:
    return root / "runs" if (root / "runs").is_dir() else root


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
