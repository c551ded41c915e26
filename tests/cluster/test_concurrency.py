"""Many processes over one results root: every run is made once, nothing is corrupted."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from runners import trainer
from runners.config import resolve
from runners.record import read_summary
from tests.cluster.survival import look

RUN = ("task=cnn_digits", "optimizer=sgdm")
FORK = multiprocessing.get_context("fork")  # nothing is imported ten times


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made()`: how often each run was begun, by folder; across processes."""
    notes = tmp_path / "notes"
    notes.mkdir()
    run = trainer.Trainer.run

    def noting(self, signals):
        (notes / f"{self.folder.name}-{os.getpid()}").touch()
        run(self, signals)

    monkeypatch.setattr(trainer.Trainer, "run", noting)
    return lambda: Counter(path.name.partition("-")[0] for path in notes.iterdir())


def together(configs_of_each):
    """Processes that each make a list of runs, one after another."""

    def work(configs):
        for config in configs:
            trainer.run(config)

    processes = [FORK.Process(target=work, args=(configs,)) for configs in configs_of_each]
    for process in processes:
        process.start()
    return processes


def test_ten_processes_on_one_run_make_it_once(compose, made, tmp_path):
    config = resolve(compose(*RUN, "budget.epochs=3"))
    processes = together([[config]] * 10)
    while any(process.is_alive() for process in processes):
        look(tmp_path / "results")
        time.sleep(0.02)
    assert [process.exitcode for process in processes] == [0] * 10
    assert list(made().values()) == [1]
    (folder,) = Path(config.results.root).glob("*/*/*")
    assert read_summary(folder)["status"] == "finished"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_two_sweeps_over_one_root_make_every_run_once(compose, made, tmp_path):
    configs = [resolve(compose(*RUN, "budget.epochs=2", f"seed={seed}")) for seed in range(4)]
    processes = together([configs, configs[::-1]])
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert list(made().values()) == [1] * 4
    look(tmp_path / "results")


def test_of_many_that_wait_one_takes_a_killed_owners_place(compose, made, tmp_path):
    config = resolve(compose(*RUN, "budget.epochs=30"))
    processes = together([[config]] * 4)
    while not list(tmp_path.glob("results/*/*/*/config.yaml")):
        time.sleep(0.01)
    (note,) = (tmp_path / "notes").iterdir()
    owner = next(process for process in processes if process.pid == int(note.name.partition("-")[2]))
    os.kill(owner.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    assert Counter(process.exitcode for process in processes) == {0: 3, -signal.SIGKILL: 1}
    assert list(made().values()) == [2]
    (folder,) = tmp_path.glob("results/*/*/*")
    assert read_summary(folder)["status"] == "finished"


def test_workers_end_with_the_sweep_that_started_them(tmp_path):
    sweep = (sys.executable, "-m", "runners.train", "-m", *RUN, "seed=0,1", "budget.epochs=1000", "launcher=joblib")
    settings = ("hydra.launcher.n_jobs=2", "device=cpu", "tracker=none", f"results.root={tmp_path}")
    process = subprocess.Popen((*sweep, *settings), start_new_session=True, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.rglob("config.yaml"))) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert len(members(process.pid)) > 2  # the workers, and what watches over them
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < until:
        time.sleep(0.2)
    assert not members(process.pid)


def members(session):
    """The processes of a session."""
    found = subprocess.run(["ps", "-o", "pid=", "--sid", str(session)], capture_output=True, text=True)
    return found.stdout.split()
