"""One run on several processes, as torchrun starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runners.config import CONFIGS, ConfigError, resolve
from runners.record import read_summary, read_table
from tests.data import folders

RUN = ("task=autoencoder_curves_small", "budget.epochs=2")
PLACE = ("device=cpu", "threads=1", "tracker=none", "progress=false")


def torchrun(root, ranks, *arguments):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0", "--standalone"]
    command = [sys.executable, *launch, "-m", "runners.train", *PLACE, f"results.root={root}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def made(process):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return Path(out.splitlines()[-1])


def rows(folder):
    return [{k: v for k, v in row.items() if k != "train_seconds"} for row in read_table(folder / "metrics.csv")]


def assert_agree(shared, alone):
    """Two records in double precision, to what two epochs make of other sums."""
    for ours, theirs in zip(rows(shared), rows(alone), strict=True):
        assert (ours["step"], ours["gradient_equivalents"]) == (theirs["step"], theirs["gradient_equivalents"])
        for loss in ("train_loss", "test_loss"):
            assert float(ours[loss]) == pytest.approx(float(theirs[loss]), rel=1e-6)


@pytest.mark.parametrize(("task", "optimizer"), [("autoencoder_curves_small", "adamw"), ("cnn_digits", "lw_sgdm")])
def test_two_ranks_make_one_record_that_agrees_with_one_process(train, tmp_path, task, optimizer):
    run = (f"task={task}", f"optimizer={optimizer}", "budget.epochs=2", "task.dtype=float64")
    shared = made(torchrun(tmp_path / "shared", 2, *run))
    assert [path.name for path in (tmp_path / "shared").glob("*/*/*")] == [shared.name]
    assert read_summary(shared)["status"] == "finished"
    alone = train(*run)
    assert alone.name != shared.name, "another number of ranks is another run"
    assert_agree(shared, alone)


def test_two_ranks_stream_a_part_of_each_batch(train, tmp_path):
    folders.write(tmp_path)
    run = (*folders.TASK, f"data.root={tmp_path}", "optimizer=lw_sgdm", "budget.epochs=2", "task.dtype=float64")
    assert_agree(made(torchrun(tmp_path / "shared", 2, *run)), train(*run))


def test_a_signal_stops_all_ranks_and_the_run_goes_on(tmp_path):
    whole = made(torchrun(tmp_path / "whole", 2, *RUN, "optimizer=lw_adamw", "budget.epochs=6"))
    process = torchrun(tmp_path / "parts", 2, *RUN, "optimizer=lw_adamw", "budget.epochs=6")
    while not list(tmp_path.glob("parts/*/*/*/config.yaml")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    parts = made(torchrun(tmp_path / "parts", 2, *RUN, "optimizer=lw_adamw", "budget.epochs=6"))
    assert rows(whole) == rows(parts)


@pytest.mark.parametrize(("task", "size"), [("gcn_sbm", "full"), ("cnn_digits", 64)])
def test_batches_that_cannot_be_shared_are_refused(compose, monkeypatch, task, size):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=f"task.batch_size is {size}, of which 3 ranks cannot have equal parts"):
        resolve(compose(f"task={task}", "budget.epochs=1"))
