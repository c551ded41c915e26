"""The commands as a user types them, each in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from runners.record import read_summary, read_table

SHORT = ("task=cnn_digits", "optimizer=sgdm", "budget.steps=3", "tracker=none")


@pytest.fixture
def call(tmp_path):
    def call(module, *arguments, rc=0):
        place = [] if "--help" in arguments else ["results.root=results", "device=cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-m", module, *place, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == rc, done.stderr
        return done

    return call


def test_help_is_fast_and_lists_the_choices(call):
    began = time.perf_counter()
    text = call("runners.train", "--help").stdout
    assert time.perf_counter() - began < 5  # about one second on an idle machine
    for name in ("autoencoder_mnist", "gcn_sbm", "sgdm", "wandb_offline", "joblib"):
        assert name in text


@pytest.mark.parametrize(
    ("argument", "pattern"),
    [
        ("task=nothing", r"error: unknown task nothing; choose one of autoencoder_curves, .*gcn_sbm"),
        ("optimizer=nothing", r"error: unknown optimizer nothing; choose one of adahessian, adam, .*sgdm"),
        ("optimizer.rate=1", r"error: unknown field optimizer.rate; there are .*lr, momentum"),
        ("optimiser=sgd", r"error: unknown field optimiser; there are budget, .*optimizer"),
        ("budget.epochs=1", r"error: budget is given twice"),
        ("task.batch_size=5000", r"error: task.batch_size is 5000 but there are 1437 training examples"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, argument, pattern):
    error = call("runners.train", *SHORT, argument, rc=1).stderr
    assert re.match(pattern, error)
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("results/*"))


def test_train_prints_the_folder_last_and_leaves_nothing_else(call, tmp_path):
    done = call("runners.train", *SHORT)
    folder = tmp_path / done.stdout.splitlines()[-1]
    assert read_summary(folder)["status"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert call("runners.train", *SHORT).stdout == done.stdout


def test_two_processes_with_the_same_run_make_it_once(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "runners.train", *SHORT, "budget.steps=20", "results.root=results"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=300)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1
    assert len(list(tmp_path.glob("results/*/*/*"))) == 1


def test_a_sweep_goes_on_after_a_failure_and_runs_side_by_side(call, tmp_path):
    sweep = (*SHORT, "seed=0,1", "task.batch_size=64,5000", "launcher=joblib", "hydra.launcher.n_jobs=2", "-m")
    bars, _, told = call("runners.train", *sweep, rc=1).stderr.partition("error: ")
    first, *failures = told.splitlines()
    assert "Traceback" not in bars
    assert first == "2 of 4 jobs failed; to try them again:"
    assert [line.partition(" but")[0] for line in failures[::2]] == ["task.batch_size is 5000"] * 2
    for seed, command in enumerate(failures[1::2]):
        assert command.startswith("    python -m runners.train results.root=results ")
        assert {f"seed={seed}", "task.batch_size=5000"} <= set(command.split())
    summaries = [read_summary(path) for path in tmp_path.glob("results/cnn_digits/sgdm/*")]
    assert sorted(summary["seed"] for summary in summaries) == [0, 1]
    assert all(summary["contended"] for summary in summaries)


def test_reproduce_makes_everything_once(call, tmp_path):
    short = ("profile.tasks=[cnn_digits]", "profile.optimizers=[sgdm]", "profile.seeds=2", "profile.trials=2")
    short = (*short, "budget.epochs=1", "profile.study=[]", "tracker.dir=.")
    plan = call("runners.reproduce", *short, "dry_run=true").stdout.splitlines()
    assert len(plan) == 5
    assert plan[-1].startswith("4 runs, 4 to be made")
    assert not (tmp_path / "results" / "quick").exists()

    done = call("runners.reproduce", *short)
    report = tmp_path / done.stdout.splitlines()[-1].removeprefix("report: ")
    assert report.name == "index.html"
    assert report.exists()
    runs = sorted(tmp_path.glob("results/quick/runs/cnn_digits/sgdm/*"))
    summaries = [read_summary(run) for run in runs]
    assert sorted((s["holdout"], s["seed"]) for s in summaries) == [(False, 0), (False, 1), (True, 0), (True, 0)]
    beside = [OmegaConf.load(run / "config.yaml").launcher.contended for run in runs]
    assert beside == [s["holdout"] for s in summaries]  # trials side by side, timed runs one by one
    search = json.loads((tmp_path / "results/quick/tuning/cnn_digits/sgdm.json").read_text())
    assert len(search["trials"]) == 2
    assert search["selected"] in [trial["values"] for trial in search["trials"]]
    finals = [s for s in summaries if not s["holdout"]]
    assert all(s["tuning"] == {"trials": 2, "selected": search["selected"], "on_edge": True} for s in finals)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2

    made = {path: path.stat().st_mtime_ns for run in runs for path in run.iterdir()} | {
        report: report.stat().st_mtime_ns
    }
    call("runners.reproduce", *short)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def test_reproduce_names_what_failed_and_how_to_try_again(call, tmp_path):
    short = ("profile.tasks=[cnn_digits]", "profile.optimizers=[sgdm,sgd]", "profile.seeds=1", "profile.trials=1")
    short = (
        *short,
        "budget.epochs=1",
        "profile.study=[]",
        "tracker=none",
        "task.batch_size=1400",
    )  # too large for a trial's training set
    error = call("runners.reproduce", *short, rc=1).stderr
    assert "error: 4 failed; the same command tries them again" in error
    assert "sgdm on cnn_digits: 1 of 1 trials have no result, so its final runs wait for them" in error
    assert "python -m runners.train" in error


def test_final_runs_wait_for_trials_and_a_plan_knows_what_they_selected(call, tmp_path):
    root = tmp_path / "it's a, b (2)"
    short = ["profile.tasks=[cnn_digits]", "profile.optimizers=[sgd]", "profile.seeds=1", "profile.trials=2"]
    short += [
        "budget.epochs=1",
        "profile.study=[]",
        "tracker=none",
        "results.root='" + str(root).replace("'", "\\'") + "'",
    ]
    call("runners.reproduce", *short)
    assert call("runners.reproduce", *short, "dry_run=true").stdout.splitlines()[-1].startswith("3 runs, 0 to be made")
    records = {read_summary(path.parent)["holdout"]: path.parent for path in root.glob("quick/runs/*/*/*/summary.json")}
    for folder in records.values():  # the final run and a trial are gone, and that trial cannot be made again
        shutil.rmtree(folder)
    records[True].write_text("in the way")
    error = call("runners.reproduce", *short, rc=1).stderr
    assert "sgd on cnn_digits: 1 of 2 trials have no result" in error
    assert len(list(root.glob("quick/runs/*/*/*/summary.json"))) == 1


def test_jobs_of_a_cluster_may_have_a_gpu_that_this_machine_has_not(call):
    short = ("profile.tasks=[cnn_digits]", "profile.optimizers=[lw_sgdm]", "launcher=ray", "dry_run=true")
    assert "3 runs" in call("runners.reproduce", *short, "device=cuda").stdout
    said = call("runners.reproduce", *short, "device=auto").stderr
    if not torch.cuda.is_available():
        assert "warning: device=auto is cpu on this machine, and so for every job" in said


def test_tune_selects_and_keeps_the_search(call, tmp_path):
    done = call("runners.tune", "task=cnn_digits", "optimizer=sgdm", "profile.trials=2", "budget.epochs=1")
    path = tmp_path / done.stdout.splitlines()[-1]
    assert path.exists()
    assert "selected {'lr': " in done.stdout
    trial = json.loads(path.read_text())["trials"][0]
    assert read_table(tmp_path / "results/quick/runs" / trial["folder"] / "metrics.csv")[-1]["val_accuracy"]
