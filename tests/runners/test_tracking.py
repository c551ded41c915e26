import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from wandb_server import KEY, Server

from runners import tracking
from runners.record import read_summary, read_table
from runners.tracking import is_uploaded, logs, mirror

RUN = ("task=cnn_digits", "optimizer=sgdm", "budget.epochs=1")


@pytest.fixture
def offline(tmp_path):
    return OmegaConf.create({"mode": "offline", "project": "p", "entity": None, "dir": str(tmp_path)})


@pytest.fixture
def online(offline):
    return OmegaConf.merge(offline, {"mode": "online"})


@pytest.fixture
def server(monkeypatch):
    """A server that this process and its children are logged in to."""
    started = Server()
    for name, value in started.environment.items():
        monkeypatch.setenv(name, value)
    yield started
    started.close()


def copies(folder, number):
    """Records that differ in their hash alone: a training run each would tell no more about the mirror."""
    made = []
    for i in range(number):
        copy = folder.with_name(f"{i:012x}")
        copy.mkdir()
        for name in ("config.yaml", "metrics.csv", "summary.json"):
            (copy / name).write_bytes((folder / name).read_bytes())
        made.append(copy)
    return made


def test_a_record_is_mirrored_once_whole_and_without_names(train, offline, tmp_path):
    folder = train(*RUN)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert mirror([folder], offline) == 1
    assert mirror([folder], offline) == 0
    (log,) = logs(tmp_path)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in (tmp_path / "wandb").iterdir()] == [log.name]
    (content,) = [path.read_bytes() for path in log.glob("*.wandb")]
    for expected in ("by_seconds/train_loss", "by_work/train_loss", "test_accuracy", "cnn_digits", "quick", "final"):
        assert expected.encode() in content
    if len(socket.gethostname()) > 4:  # shorter names occur by chance
        assert socket.gethostname().encode() not in content
    assert str(tmp_path).encode() not in content
    shown = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--summary", log],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "finished" in shown.stdout
    assert "final.test_accuracy" in shown.stdout


def test_unfinished_records_and_tracker_none_mirror_nothing(train, offline, tmp_path):
    folder = train(*RUN)
    assert mirror([folder], OmegaConf.create({"mode": None})) == 0
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    assert mirror([folder, tmp_path / "nothing"], offline) == 0
    assert not (tmp_path / "wandb").exists()


def test_a_failure_of_the_tracker_is_a_warning_and_leaves_no_half_log(train, offline, tmp_path, monkeypatch, capsys):
    import wandb

    def full(*_, **__):
        raise OSError("no space\nleft")

    folder = train(*RUN)
    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "log", full)
        assert mirror([folder], offline) == 0
    said = capsys.readouterr().err
    assert "warning: 1 runs not mirrored to W&B, first cnn_digits/" in said
    assert "(no space left); type make wandb-sync" in said
    assert not list((tmp_path / "wandb").iterdir())
    assert mirror([folder], offline) == 1


def test_a_damaged_record_is_not_in_the_others_way(train, offline, tmp_path, capsys):
    whole, damaged = copies(train(*RUN), 2)
    (damaged / "metrics.csv").write_text("step,epoch\n0,zero\n")
    assert mirror([damaged, whole], offline) == 1
    assert f"first cnn_digits/sgdm/{damaged.name}" in capsys.readouterr().err
    assert [log.name.rpartition("-")[2] for log in tracking.logs(tmp_path)] == [whole.name]


def test_online_the_server_has_config_history_and_summary(train, online, server, tmp_path):
    folder = train("task=gcn_sbm", "optimizer=lw_sgdm", "budget.epochs=30")
    assert mirror([folder], online) == 1
    run = server.runs[folder.name]
    assert run.fields["groupName"] == "gcn_sbm lw_sgdm" and run.fields["jobType"] == "final" and run.complete
    assert set(run.fields["tags"]) == {"gcn_sbm", "lw_sgdm", "quick"} and run.fields["project"] == "p"
    assert run.config["optimizer"]["about"]["label"] == "LW-SGDm" and "commit" in run.config["provenance"]
    rows = read_table(folder / "metrics.csv")
    assert [line["_step"] for line in run.history] == [int(row["step"]) for row in rows]
    for line, row in zip(run.history, rows, strict=True):
        for name in ("train_loss", "by_seconds/train_loss", "by_work/train_loss"):
            assert line[name] == float(row["train_loss"])
        assert line["gradient_equivalents"] == float(row["gradient_equivalents"])
    assert any(name.startswith("step_size/") for name in run.history[-1])
    summary = read_summary(folder)
    assert run.summary["status"] == "finished" and run.summary["final"] == summary["final"]
    assert run.summary["seconds_per_step"] == summary["seconds_per_step"]
    sent = json.dumps([run.fields, run.config, run.summary])
    assert str(tmp_path) not in sent and sys.prefix not in sent and socket.gethostname() not in run.fields.values()


@pytest.fixture
def impatient(monkeypatch):
    """One retry, half a second later."""
    monkeypatch.setattr(tracking, "PATIENCE", {n: "1" if n.endswith("MAX") else "0.5" for n in tracking.PATIENCE})


@pytest.mark.usefixtures("impatient")
def test_a_server_that_dies_costs_no_run_and_a_later_upload_sends_each_once(train, online, server, tmp_path, capsys):
    folders = copies(train(*RUN), 3)
    server.requests = 2  # then every connection is dropped
    assert mirror(folders, online) == 3
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "of 3 runs not uploaded" in warning and "make wandb-sync" in warning
    assert len(logs(tmp_path)) == 3 and not all(is_uploaded(log) for log in logs(tmp_path))
    server.requests = None
    tracking.upload(logs(tmp_path))
    assert all(is_uploaded(log) for log in logs(tmp_path))
    rows = len(read_table(folders[0] / "metrics.csv"))
    assert {name: len(run.history) for name, run in server.runs.items()} == {f.name: rows for f in folders}
    server.runs.clear()
    tracking.upload(logs(tmp_path))
    assert not server.runs  # what is there is not sent again


@pytest.mark.usefixtures("impatient")
def test_without_a_server_or_a_login_the_error_is_one_line(train, offline, tmp_path, monkeypatch):
    mirror([train(*RUN)], offline)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(tracking.ConfigError, match=r"1 of 1 runs not uploaded \(.*[Ll]og"):
        tracking.upload(logs(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(tracking.ConfigError, match=r"1 of 1 runs not uploaded \(.*connection refused"):
        tracking.upload(logs(tmp_path))


def test_a_sweep_of_three_by_three_shows_nine_grouped_runs(server, tmp_path):
    sweep = [
        "task=gcn_sbm", "optimizer=sgdm", "optimizer.lr=0.1,0.3,1", "seed=0,1,2", "budget.epochs=30", "device=cpu",
        "progress=false", "tracker.project=sweep", f"results.root={tmp_path / 'results'}",
        f"tracker.dir={tmp_path}",
    ]  # fmt: skip
    python = [sys.executable, "-m"]
    done = subprocess.run([*python, "runners.train", "-m", *sweep], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(logs(tmp_path)) == 9 and not server.runs
    place = [f"tracker.dir={tmp_path}", f"results.root={tmp_path / 'none'}"]
    for said in ("9 runs uploaded, 0 had been before", "0 runs uploaded, 9 had been before"):
        done = subprocess.run([*python, "runners.tracking", *place], capture_output=True, text=True, timeout=300)
        assert done.stdout.strip().endswith(said), done.stderr
    groups = [run.fields["groupName"] for run in server.runs.values()]
    assert {group: groups.count(group) for group in groups} == {
        f"gcn_sbm sgdm lr={rate}": 3 for rate in ("0.1", "0.3", "1")
    }
    for record in tmp_path.glob("results/gcn_sbm/sgdm/*"):
        steps = [int(row["step"]) for row in read_table(record / "metrics.csv")]
        assert [line["_step"] for line in server.runs[record.name].history] == steps and len(steps) == 4


def test_sync_mirrors_the_records_of_a_profile_first(train, compose, server, tmp_path, capsys):
    folder = train("results.root=" + str(tmp_path / "results" / "quick" / "runs"), *RUN)
    tracking.sync(compose("tracker=wandb_offline", f"tracker.dir={tmp_path}"))
    assert capsys.readouterr().out == "1 runs uploaded, 0 had been before\n" and set(server.runs) == {folder.name}
    with pytest.raises(tracking.ConfigError, match="tracker=none mirrors nothing"):
        tracking.sync(compose())


def test_the_client_of_these_tests_is_not_the_users(server):
    assert os.environ["WANDB_BASE_URL"].startswith("http://127.0.0.1:")
