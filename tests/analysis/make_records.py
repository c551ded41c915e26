"""Synthetic records for the tests of analysis: the format of real ones, planted numbers, labelled as synthetic.

`python -m tests.analysis.make_records` (or running this file) rewrites the committed set in `records/`.
No user ever sees these: they are read by tests alone.
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

HERE = Path(__file__).parent
TASKS = {
    "autoencoder_curves_small": ("autoencoder", "error", 120.0),
    "cnn_digits": ("cnn", "accuracy", 2.3),
    "gcn_sbm": ("gcn", "accuracy", 1.6),
}
KINDS = {"lw": "layerwise", "sg": "first_order", "ad": "first_order"}
LABELS = {"lw_sgdm": "LW-SGDm", "lw_adamw": "LW-AdamW", "sgdm": "SGD-m", "adamw": "AdamW", "sgd": "SGD", "adam": "Adam"}


@dataclass(frozen=True)
class Planted:
    """What one synthetic run is made to show."""

    final: float = 0.4  # of the first loss
    rate: float = 4.0  # decays over the run
    seconds: float = 0.01  # per step
    memory: float = 1.0  # of the base's bytes
    diverges: bool = False
    contended: bool = False


METHODS = {
    "lw_sgdm": Planted(final=0.30, seconds=0.018, memory=1.1),
    "lw_adamw": Planted(final=0.28, seconds=0.019, memory=1.2),
    "sgdm": Planted(final=0.40),
    "adamw": Planted(final=0.32, seconds=0.011, memory=1.1),
}


def write_run(
    root: Path, task: str, optimizer: str, seed: int, planted: Planted, *, rows: int = 12, holdout: bool = False,
    values: dict | None = None, tuning: dict | None = None, profile: dict | None = None, provenance: dict | None = None,
    status: str | None = None, family: str | None = None,
) -> str:  # fmt: skip
    """Write one record; returns its folder relative to `root`."""
    known, metric, start = TASKS.get(task, ("autoencoder", "error", 100.0))
    family = family or known
    rng = np.random.default_rng(zlib.crc32(f"{task}/{optimizer}/{seed}/{values}/{holdout}".encode()))
    lw = optimizer.startswith("lw_")
    epoch = np.arange(rows, dtype=float)
    step = (epoch * 10).astype(int)
    shape = np.exp(-planted.rate * epoch / max(rows - 1, 1))
    shape = (shape - shape[-1]) / (1 - shape[-1] if rows > 1 else 1)
    noise = 1 + 0.01 * rng.standard_normal(rows) * (epoch > 0)
    train = start * (planted.final + (1 - planted.final) * shape) * noise
    test = train * 1.05
    score = np.clip(1 - train / start * 0.6, 0, 1) if metric == "accuracy" else test / 10
    table = {
        "step": step, "epoch": epoch, "train_seconds": step * planted.seconds * (1 + 0.02 * rng.random()),
        "gradient_equivalents": step * (2.0 if lw else 1.0), "train_loss": train,
        "val_loss": test * 1.01 if holdout else np.full(rows, np.nan), "test_loss": test,
        f"val_{metric}": score * 0.99 if holdout else np.full(rows, np.nan), f"test_{metric}": score,
    }  # fmt: skip
    keep = rows // 3 if planted.diverges else rows
    optimizer_config = {
        "_target_": f"synthetic.{optimizer}", "lr": (values or {}).get("lr", 0.1), "momentum": 0.9,
        "about": {"name": optimizer, "label": LABELS.get(optimizer, optimizer), "version": 1,
                  "kind": KINDS.get(optimizer[:2], "second_order")},
        "search": None if lw or not (holdout or tuning) else {"lr": {family: [1e-3, 1.0], "source": "synthetic"}},
    }  # fmt: skip
    config = {
        "synthetic": True, "seed": seed, "holdout": holdout,
        "task": {"name": task, "family": family, "batch_size": 64, "weight_decay": 0.0, "target": None},
        "optimizer": optimizer_config, "profile": profile or {"name": "test", "tasks": sorted(TASKS), "seeds": 3},
    }  # fmt: skip
    text = yaml.dump(config, sort_keys=False, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    name = f"{task}/{optimizer}/{zlib.crc32((text + json.dumps(provenance)).encode()):012x}"
    folder = root / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)
    lines = [",".join(table)]
    for i in range(keep):
        lines.append(",".join("" if np.isnan(column[i]) else f"{column[i]:.8g}" for column in table.values()))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if lw:
        (folder / "layers.csv").write_text(_layers(step[:keep], epoch[:keep], rng))
    last = {key: float(f"{column[keep - 1]:.8g}") for key, column in table.items() if not np.isnan(column[keep - 1])}
    measured = {key: last[key] for key in last if key.startswith(("train_loss", "val", "test"))}
    summary = {
        "record_version": 1, "status": status or ("diverged" if planted.diverges else "finished"), "task": task,
        "family": family, "optimizer": optimizer, "label": LABELS.get(optimizer, optimizer),
        "kind": optimizer_config["about"]["kind"], "seed": seed, "holdout": holdout, "final": measured,
        "best": measured, "steps": int(step[keep - 1]), "epochs": float(epoch[keep - 1]),
        "train_seconds": last["train_seconds"], "seconds_per_step": planted.seconds,
        "peak_memory_bytes": int(1e8 * planted.memory), "gradient_equivalents": last["gradient_equivalents"],
        "contended": planted.contended, "diverged_at": int(step[keep]) if planted.diverges else None,
        "surrogate": None, "message": "synthetic record for tests", "tuning": tuning,
        "provenance": provenance or {
            "commit": "0" * 40, "dirty": False, "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "device": "synthetic", "driver": None, "threads": 1, "created": "2000-01-01T00:00:00+00:00"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return name


def _layers(step: np.ndarray, epoch: np.ndarray, rng: np.random.Generator) -> str:
    lines = ["step,epoch,layer,quantity,value"]
    for i, layer in enumerate(("encoder.0", "encoder.2", "decoder.0")):
        rise = np.minimum(1, (step + 1) / 20)
        values = 0.1 * (i + 1) * rise * np.exp(-step / 60) * np.exp(0.02 * rng.standard_normal(len(step)))
        lines += [f"{s},{e:g},{layer},step_size,{v:.6g}" for s, e, v in zip(step, epoch, values, strict=True)]
        lines += [f"{s},{e:g},{layer},curvature,{1 / v:.6g}" for s, e, v in zip(step, epoch, values, strict=True)]
    return "\n".join(lines) + "\n"


def write_search(root: Path, task: str, optimizer: str, planted: Planted, trials: int = 4, **options) -> dict:
    """Write a search's trials and its JSON; returns the `tuning` entry of final runs. The largest rate diverges."""
    _, metric, _ = TASKS.get(task, ("autoencoder", "error", 100.0))
    metric, mode = ("val_accuracy", "max") if metric == "accuracy" else ("val_loss", "min")
    entries = []
    for rate in np.geomspace(1e-3, 1.0, trials):
        final = planted.final + 0.12 * (np.log10(rate) + 1) ** 2
        trial = Planted(min(final, 1.0), planted.rate, planted.seconds, planted.memory, diverges=rate > 0.9)
        values = {"lr": float(f"{rate:.4g}")}
        name = write_run(root, task, optimizer, 0, trial, holdout=True, values=values, **options)
        summary = json.loads((root / "runs" / name / "summary.json").read_text())
        score = None if trial.diverges else summary["final"][metric]
        folder = f"somewhere/else/runs/{name}"
        entries.append({"values": values, "folder": folder, "status": summary["status"], "score": score})
    finished = [entry for entry in entries if entry["score"] is not None]
    best = (max if mode == "max" else min)(finished, key=lambda entry: entry["score"])
    on_edge = best["values"]["lr"] == 1e-3
    search = {
        "task": task, "optimizer": optimizer, "trials": entries, "selected": best["values"], "score": best["score"],
        "on_edge": on_edge, "metric": metric, "mode": mode,
    }  # fmt: skip
    path = root / "tuning" / task / f"{optimizer}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(search, indent=1) + "\n")
    return {"trials": trials, "selected": best["values"], "on_edge": on_edge}


def write_records(
    root: Path, tasks=tuple(TASKS), methods: dict[str, Planted] | None = None, seeds: int = 3, rows: int = 12,
    trials: int = 4,
) -> Path:  # fmt: skip
    """Write a whole synthetic profile: searches of the tuned methods, then every seed of every method on every task."""
    profile = {"name": "test", "tasks": list(tasks), "seeds": seeds}
    for task in tasks:
        for optimizer, planted in (methods or METHODS).items():
            tuning = None
            if trials and not optimizer.startswith("lw_"):
                tuning = write_search(root, task, optimizer, planted, trials, rows=rows, profile=profile)
            values = tuning["selected"] if tuning else None
            for seed in range(seeds):
                options = {"rows": rows, "profile": profile, "tuning": tuning, "values": values}
                write_run(root, task, optimizer, seed, planted, **options)
    return root


def write_committed(root: Path) -> Path:
    """The committed set: two tasks, four methods, two seeds, four trials a search."""
    return write_records(root, tasks=("autoencoder_curves_small", "gcn_sbm"), seeds=2, rows=8)


if __name__ == "__main__":
    shutil.rmtree(HERE / "records", ignore_errors=True)
    write_committed(HERE / "records")
