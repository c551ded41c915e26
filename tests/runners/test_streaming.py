"""Runs on images that are decoded as they are needed: as any other run, whoever decodes."""

import multiprocessing
import os
import signal

import pytest
import torch
from hydra.errors import InstantiationException

from data import imagenet
from runners import trainer
from runners.command import describe
from runners.config import ConfigError, resolve
from runners.record import read_summary, read_table
from runners.signals import Interrupted
from tests.data import folders
from tests.runners.test_trainer import at_step, elsewhere, rows


@pytest.fixture
def task(tmp_path):
    folders.write(tmp_path)
    return (*folders.TASK, f"data.root={tmp_path}", "budget.epochs=3")


@pytest.mark.parametrize("optimizer", ["sgdm", "lw_sgdm"])
def test_a_run_learns_and_its_rows_do_not_depend_on_the_number_of_workers(
    train, task, tmp_path, monkeypatch, optimizer
):
    folder = train(*task, f"optimizer={optimizer}", "budget.epochs=6")
    table = read_table(folder / "metrics.csv")
    assert [row["step"] for row in table] == [str(4 * epoch) for epoch in range(7)]
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    assert read_summary(folder)["status"] == "finished"
    monkeypatch.setattr(imagenet, "_workers", lambda: 2)
    assert rows(train(*task, f"optimizer={optimizer}", "budget.epochs=6", elsewhere(tmp_path))) == rows(folder)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_goes_on_within_an_epoch_to_the_same_bits(train, task, tmp_path, monkeypatch, workers):
    whole = train(*task, "optimizer=lw_adamw", elsewhere(tmp_path))
    monkeypatch.setattr(imagenet, "_workers", lambda: workers)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(*task, "optimizer=lw_adamw")
    folder = train(*task, "optimizer=lw_adamw")
    assert rows(folder) == rows(whole)
    weights, expected = (torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (folder, whole))
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_tuning_holds_images_out(train, task):
    table = read_table(train(*task, "optimizer=sgdm", "holdout=true") / "metrics.csv")
    assert all(row["val_accuracy"] for row in table)
    assert table[-1]["step"] == str(3 * (32 // 8))


def test_an_image_that_cannot_be_decoded_ends_the_run_and_is_named(train, task, tmp_path):
    bad = tmp_path / "imagenet/train/dog/dog_01.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(trainer.RunFailed, match=r"dog_01\.JPEG cannot be decoded"):
        train(*task, "optimizer=sgdm", "task.data.evaluated=1", "task.batch_size=6")


def test_without_a_budget_or_images_one_line_says_what_to_type(compose, tmp_path):
    with pytest.raises(ConfigError, match=r"no budget: .*; type budget\.epochs=N"):
        resolve(compose("task=cnn_imagenet_resnet50"))
    with pytest.raises(InstantiationException) as error:
        trainer.run(resolve(compose("task=cnn_imagenet_resnet50", f"data.root={tmp_path}", "budget.epochs=90")))
    assert describe(error.value).startswith(f"ImageNet: no images in {tmp_path}/imagenet/train")
