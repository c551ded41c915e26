"""Kill, restart, compare: `python -m tests.cluster.survival --kills 60` tries many kills and prints what survived.

A command is started, stopped at a random moment (SIGKILL, SIGTERM, SIGINT, or a disk that is suddenly full), and
started again, until it has had its share of kills and may finish. It survived if then every row, every final number
and every weight equals those of an uninterrupted call, bit for bit; if at no time a reader met a file that was half
written; and if no finished record was written again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from runners.record import DONE, read_summary, read_table
from tests.data import folders

ROOT = Path(__file__).parents[2]
WAYS = ("SIGKILL", "SIGTERM", "SIGINT", "full disk")
DISK = 64 << 20  # bytes of the disk that is filled

# `runners.<module>` with checkpoints every so many seconds, so that runs of seconds have several.
WITH_CHECKPOINTS = """
import sys
from runners import trainer
trainer.CHECKPOINT_EVERY = float(sys.argv.pop(1))
module = sys.argv.pop(1)
import importlib
from runners.command import command
command(getattr(importlib.import_module(f"runners.{module}"), module))()
"""

SMALL = ("device=cpu", "threads=1", "tracker=none", "progress=false")
REPRODUCE = (
    "reproduce", "profile.tasks=[gcn_sbm]", "profile.optimizers=[adamw,lw_sgdm]", "profile.seeds=2",
    "profile.trials=2", "profile.study=[]", "budget.epochs=60",
)  # fmt: skip
SCENARIOS = {
    "run": ("train", "task=cnn_digits", "optimizer=lw_adamw", "budget.epochs=25", "schedule=step"),
    "run with dropout": ("train", "task=gcn_sbm", "optimizer=lw_sgdm", "budget.epochs=300"),
    "streaming run": ("train", *folders.TASK, "data.root=images", "optimizer=lw_sgdm", "budget.epochs=40"),
    "run with factors": ("train", "task=autoencoder_curves_small", "optimizer=kfac", "budget.epochs=12"),
    "sweep": ("train", "task=cnn_digits", "optimizer=sgdm,lw_sgdm", "seed=0,1", "budget.epochs=6", "-m"),
    "tuning": ("tune", "task=cnn_digits", "optimizer=sgdm", "profile.trials=4", "budget.epochs=6"),
    "reproduction": REPRODUCE,
    "analysis": REPRODUCE,  # of records that are there already
}


@dataclass
class Tally:
    """What came of the kills."""

    tried: Counter = field(default_factory=Counter)
    survived: Counter = field(default_factory=Counter)
    replays: list[float] = field(default_factory=list)  # seconds from the last checkpoint to a SIGKILL


class Torn(AssertionError):
    """A file that is only half there."""


def start(root: Path, scenario: str, every: float) -> subprocess.Popen:
    module, *arguments = SCENARIOS[scenario]
    if "data.root=images" in arguments and not (root.parent / "images").exists():
        folders.write(root.parent / "images")
    command = [sys.executable, "-c", WITH_CHECKPOINTS, str(every), module, *SMALL, f"results.root={root}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=root.parent, env=environment, start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def outcome(root: Path) -> dict:
    """All that two calls must agree on, by record; times are left out."""
    records = {}
    for path in sorted(root.rglob("summary.json")):
        folder, summary = path.parent, read_summary(path.parent)
        rows = [{k: v for k, v in row.items() if k != "train_seconds"} for row in read_table(folder / "metrics.csv")]
        keys = ("status", "final", "best", "steps", "epochs", "gradient_equivalents", "diverged_at", "tuning")
        weights = folder / "checkpoint.pt"
        records[str(folder.relative_to(root))] = {
            "rows": rows,
            "layers": read_table(folder / "layers.csv"),
            "weights": _weights(weights) if weights.exists() else None,
            **{key: summary[key] for key in keys},
        }
    searches = {str(p.relative_to(root)): json.loads(p.read_text()) for p in sorted(root.rglob("tuning/*/*.json"))}
    return {"records": records, "searches": searches}


def analysed(root: Path) -> dict[str, bytes]:
    """The tables and verdicts of the report, which the same records determine."""
    report = next(root.rglob("report"))
    return {
        str(p.relative_to(report)): p.read_bytes()
        for p in sorted(report.rglob("*"))
        if p.suffix in (".csv", ".json", ".md")
    }


def _weights(path: Path) -> str:
    state = torch.load(path, weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return digest.hexdigest()


def look(root: Path) -> None:
    """Read every file that is to be seen under a root.

    Raises:
        Torn: one of them is not whole.
    """
    for path in root.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # replaced by a newer one, or removed, since it was listed
            continue
        if not _is_whole(path, content):
            raise Torn(f"{path} is half written: {content[-80:]!r}")


def _is_whole(path: Path, content: bytes) -> bool:
    try:
        if path.suffix == ".json":
            return isinstance(json.loads(content), dict | list)
        if path.suffix == ".csv":
            return content.endswith(b"\n") and len({len(row) for row in csv.reader(content.decode().splitlines())}) == 1
        if path.suffix == ".yaml":
            return "seed" in yaml.safe_load(content)
        if path.name.startswith("checkpoint-"):
            return hashlib.sha256(content).hexdigest().startswith(path.stem.split("-")[2])
        if path.suffix in (".html", ".md", ".tex", ".txt", ".png", ".pdf", ".css", ".js"):
            return bool(content)
        return True
    except (ValueError, TypeError):
        return False


def kill(process: subprocess.Popen, root: Path, way: str, begun: Path | None) -> float | None:
    """Stop a process that way; None if it had ended already, else the seconds of work that a SIGKILL has undone."""
    if process.poll() is not None:
        return None
    checkpoints = [path.stat().st_mtime for path in root.rglob("checkpoint-*") if not path.name.startswith(".")]
    since = max([*checkpoints, begun.stat().st_mtime if begun and begun.exists() else 0])
    if way == "full disk":
        fill(root.parent / "ballast")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)  # it ends by itself at its next write; if it is past its last one, well
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    else:
        process.send_signal(getattr(signal, way))
    process.wait(timeout=120)
    return time.time() - since if since and way == "SIGKILL" else 0.0


def fill(ballast: Path) -> None:
    """Leave no free byte on the disk."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass


@contextlib.contextmanager
def disk() -> Iterator[Path]:
    """A folder on a small disk of its own.

    Raises:
        PermissionError: one may not be mounted here.
    """
    folder = Path(tempfile.mkdtemp(prefix="survival-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            raise PermissionError("no small disk can be mounted here (that takes root)")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def uninterrupted(scenario: str, place: Path, every: float) -> tuple[dict, float]:
    """The outcome of a call that nothing stops, and its seconds from the first record's beginning on."""
    root = place / "results"
    process = start(root, scenario, every)
    begun = None
    while process.poll() is None:
        begun = begun or (time.monotonic() if next(root.rglob(".owner"), None) else None)
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{scenario} fails without any kill: {process.stderr.read()}")
    return outcome(root), time.monotonic() - begun


def survive(
    scenario: str, kills: int, ways: tuple[str, ...], place: Path, reference: tuple[dict, float],
    dice: random.Random, every: float, tally: Tally,
) -> None:  # fmt: skip
    """Start one scenario, kill it `kills` times, let it finish, and compare.

    Raises:
        AssertionError: it did not survive.
    """
    expected, seconds = reference
    root = place / "results"
    done: dict[Path, int] = {}
    killed = Counter()
    while killed.total() < kills:
        way = ways[killed.total() % len(ways)]
        process = start(root, scenario, every)
        began = time.time()
        anytime = dice.random() < 0.15  # else once it works
        begun = None
        while process.poll() is None and not anytime and not begun:
            begun = (
                next((p for p in root.rglob(".owner") if p.stat().st_mtime > began), None) if root.exists() else None
            )
            time.sleep(0.01)
        until = time.monotonic() + dice.uniform(0, 4.0 if anytime else seconds * 1.1 / kills)
        while time.monotonic() < until and process.poll() is None:
            look(root)
            time.sleep(0.02)
        undone = kill(process, root, way, begun)
        errors = process.stderr.read()
        (place / "ballast").unlink(missing_ok=True)
        look(root)
        _assert_untouched(done)
        done |= _finished(root)
        if undone is None:  # it was faster
            assert process.returncode == 0, errors
            break
        assert "Traceback" not in errors, errors
        killed[way] += 1
        tally.tried[way] += 1
        tally.replays += [undone] if undone else []
    process = start(root, scenario, every)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    look(root)
    _assert_untouched(done)
    assert outcome(root) == expected, f"{scenario}: another outcome than without kills"
    tally.survived += killed


def survive_analysis(
    kills: int, ways: tuple[str, ...], place: Path, dice: random.Random, every: float, tally: Tally
) -> None:
    """The same for the report on records that are there."""
    root = place / "results"
    process = start(root, "analysis", every)
    assert process.wait() == 0, process.stderr.read()
    expected, records = analysed(root), outcome(root)
    done = _finished(root)
    for i in range(kills):
        way = ways[i % len(ways)]
        shutil.rmtree(next(root.rglob("report")), ignore_errors=True)
        process = start(root, "analysis", every)
        time.sleep(dice.uniform(3.0, 14.0))
        undone = kill(process, root, way, None)
        errors = process.stderr.read()
        (place / "ballast").unlink(missing_ok=True)
        look(root)
        if undone is not None:
            tally.tried[way] += 1
            assert "Traceback" not in errors, errors
        process = start(root, "analysis", every)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
        assert analysed(root) == expected
        if undone is not None:
            tally.survived[way] += 1
    _assert_untouched(done)
    assert outcome(root) == records


def _finished(root: Path) -> dict[Path, int]:
    """The files of finished records, and when they were written."""
    folders = [path.parent for path in root.rglob("summary.json") if read_summary(path.parent).get("status") in DONE]
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in folder.iterdir()
        if not path.name.startswith((".", "checkpoint-"))
    }


def _assert_untouched(done: dict[Path, int]) -> None:
    again = [str(path) for path, written in done.items() if path.stat().st_mtime_ns != written]
    assert not again, f"finished work was done again: {again}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--every", type=float, default=0.3, help="seconds between checkpoints")
    options = parser.parse_args()
    dice, tally, failures = random.Random(options.seed), Tally(), []
    shares = {name: options.kills // len(SCENARIOS) for name in SCENARIOS}
    shares["run"] += options.kills - sum(shares.values())
    for scenario, kills in shares.items():
        with disk() as place, disk() as other:
            try:
                if scenario == "analysis":
                    survive_analysis(kills, WAYS, place, dice, options.every, tally)
                    continue
                reference = uninterrupted(scenario, other, options.every)
                rounds = 0
                while kills > 0 and rounds < 20:  # a call that finishes before its kills is begun anew
                    before = tally.tried.total()
                    ways = WAYS[rounds % len(WAYS) :] + WAYS[: rounds % len(WAYS)]
                    survive(scenario, min(kills, 4), ways, place, reference, dice, options.every, tally)
                    kills -= tally.tried.total() - before
                    rounds += 1
                    shutil.rmtree(place / "results")
            except AssertionError as error:
                failures.append(f"{scenario}: {error}")
        print(f"{scenario}: {tally.survived.total()} of {tally.tried.total()} so far", flush=True)
    for way in WAYS:
        print(f"{way}: survived {tally.survived[way]} of {tally.tried[way]}")
    print(f"all: survived {tally.survived.total()} of {tally.tried.total()}")
    if tally.replays:
        print(f"work undone by a SIGKILL: at most {max(tally.replays):.1f} s (checkpoints every {options.every} s)")
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
