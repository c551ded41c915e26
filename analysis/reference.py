"""Keep a results folder's records with the project: `make reference PROFILE=cpu`.

Writes `results/reference/<profile>/`: packed records, searches, studies and benchmarks without checkpoints, and the
report made from them. Nothing reads it but `make report`, which rebuilds the report from it where there are no results
of one's own: a reproduction starts from nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from analysis.packed import SUFFIX, pack
from analysis.report import build, replace_folder

RECORD = ("summary.json", "config.yaml", "metrics.csv", "layers.csv")
KEPT = (*(f"runs/*/*/*/{name}" for name in RECORD), "tuning/*/*.json", "study/*.csv")
BESIDE = ("bench/*/*.csv", "ablation/*/ablation.csv")


def keep(source: Path, target: Path) -> Path:
    """Replace `target` by the finished and diverged runs under `source`, with a report; returns its `index.html`.

    `target` is put in place whole. Benchmarks and ablations, which belong to no profile, go to `bench/` and `ablation/`
    beside it.

    Args:
        source: a results folder, such as `results/cpu`.
        target: where its records go, such as `results/reference/cpu`.

    Raises:
        FileNotFoundError: `source` has no runs to keep.
        ValueError: `source` itself is packed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        for path in sorted(path for pattern in KEPT for path in source.glob(pattern)):
            if path.name not in RECORD or (_is_settled(path.parent) and _is_read(path)):
                _copy(path, fresh / path.relative_to(source))
        if not (fresh / "runs").exists():
            if any(source.glob(f"runs/*{SUFFIX}")):
                raise ValueError(f"the runs in {source} are packed already: unpack them (tar xf), or name their source")
            raise FileNotFoundError(f"no finished runs in {source}; type make reproduce-paper PROFILE={source.name}")
        for task in sorted((fresh / "runs").iterdir()):
            pack(task, task.with_name(task.name + SUFFIX))
            shutil.rmtree(task)
        for path in (path for pattern in BESIDE for path in source.parent.glob(pattern)):
            _copy(path, target.parent / path.relative_to(source.parent))
        replace_folder(target, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return build(target)


def _is_settled(run: Path) -> bool:
    """Whether a run's record is final."""
    summary = run / "summary.json"
    try:
        return json.loads(summary.read_text())["status"] in ("finished", "diverged")
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{summary} is damaged; remove that run and make it again") from error


def _is_read(path: Path) -> bool:
    """Whether a report reads the file: of layers it draws step sizes, not how often a damping was raised."""
    return path.name != "layers.csv" or ",step_size," in path.read_text()


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.reference", description="Keep a results folder's records with the project."
    )
    parser.add_argument("source", type=Path, help="a results folder, such as results/cpu")
    parser.add_argument("target", type=Path, help="where they go, such as results/reference/cpu")
    arguments = parser.parse_args()
    try:
        print(keep(arguments.source, arguments.target))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
