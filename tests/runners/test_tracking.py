import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runners.tracking import mirror

RUN = ("task=cnn_digits", "optimizer=sgdm", "budget.epochs=1")


@pytest.fixture
def offline(tmp_path):
    return OmegaConf.create({"mode": "offline", "project": "p", "entity": None, "dir": str(tmp_path)})


def mirrored(tmp_path):
    return sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_record_is_mirrored_once_whole_and_without_names(train, offline, tmp_path):
    folder = train(*RUN)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert mirror([folder], offline) == 1
    assert mirror([folder], offline) == 0
    (log,) = mirrored(tmp_path)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    content = log.read_bytes()
    for expected in ("by_seconds/train_loss", "by_work/train_loss", "test_accuracy", "cnn_digits", "quick", "final"):
        assert expected.encode() in content
    if len(socket.gethostname()) > 4:  # shorter names occur by chance
        assert socket.gethostname().encode() not in content
    assert str(tmp_path).encode() not in content
    shown = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--summary", log.parent],
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


def test_a_failure_of_the_tracker_is_a_warning(train, offline, monkeypatch, capsys):
    import wandb

    def unreachable(**_):
        raise ConnectionError("no\nserver")

    folder = train(*RUN)
    monkeypatch.setattr(wandb, "init", unreachable)
    assert mirror([folder], offline) == 0
    assert "warning: not mirrored to W&B (ConnectionError: no server); try again later" in capsys.readouterr().err
