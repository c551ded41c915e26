import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from runners import trainer
from runners.config import ConfigError
from runners.record import read_summary, read_table
from runners.signals import Interrupted

DIGITS = ("task=cnn_digits", "optimizer=sgdm", "budget.epochs=2")
GRAPH = ("task=gcn_sbm", "optimizer=adam", "budget.epochs=20")
STEPS = 22  # of an epoch of cnn_digits: 1,437 training examples, 64 a batch, the last short batch left out
TIMES = ("train_seconds",)


def rows(folder):
    """The table of metrics, less what differs between two runs of the same thing."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_table(folder / "metrics.csv")]


def elsewhere(tmp_path):
    return f"results.root={tmp_path}/elsewhere"


def at_step(monkeypatch, step, act):
    """Call `act` before the given step of the next runs."""
    take = trainer.Trainer._next_batch

    def next_batch(self):
        if self.step == step - 1:
            act()
        return take(self)

    monkeypatch.setattr(trainer.Trainer, "_next_batch", next_batch)


def test_a_finished_run_has_a_whole_record(train):
    folder = train(*DIGITS)
    table = read_table(folder / "metrics.csv")
    assert ",".join(table[0]) == (
        "step,epoch,train_seconds,gradient_equivalents,train_loss,val_loss,test_loss,val_accuracy,test_accuracy"
    )
    assert [(row["step"], row["epoch"]) for row in table] == [("0", "0.0"), ("22", "1.0"), ("44", "2.0")]
    assert {row["val_loss"] for row in table} == {""}  # a final run holds nothing out
    assert float(table[0]["train_loss"]) > 2 > float(table[2]["train_loss"])
    seconds = [float(row["train_seconds"]) for row in table]
    assert seconds[0] == 0 < seconds[1] < seconds[2]
    summary = read_summary(folder)
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["epochs"], summary["gradient_equivalents"]) == (44, 2.0, 44.0)
    assert summary["final"]["test_accuracy"] == float(table[2]["test_accuracy"]) > 0.8
    assert summary["peak_memory_bytes"] > 3 * 4 * 5000  # parameters, gradients and momentum are the least
    assert set(torch.load(folder / "checkpoint.pt", weights_only=True)) == {"model"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["budget"]["epochs"] == 2
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.yaml", "metrics.csv", "summary.json"]


def test_records_name_no_person_and_no_machine(train, tmp_path):
    folder = train(*DIGITS)
    text = "".join((folder / name).read_text() for name in ("config.yaml", "summary.json", "metrics.csv"))
    assert str(tmp_path) not in text
    assert os.path.expanduser("~") not in text
    assert set(json.loads((folder / "summary.json").read_text())["provenance"]) == {
        "commit", "dirty", "versions", "device", "driver", "threads", "created",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_bits_and_another_does_not(train, tmp_path):
    first = train(*DIGITS)
    assert rows(train(*DIGITS, elsewhere(tmp_path))) == rows(first)
    assert rows(train(*DIGITS, "seed=1"))[0] != rows(first)[0]


def test_a_finished_run_is_not_made_again(train, monkeypatch):
    folder = train(*DIGITS)
    monkeypatch.setattr(trainer, "Trainer", None)
    assert train(*DIGITS) == folder


@pytest.mark.parametrize(
    ("budget", "evaluations"),
    [("budget.steps=30", [0, STEPS, 30]), (f"budget.steps={STEPS}", [0, STEPS]), ("budget.steps=5", [0, 5])],
)
def test_budget_in_steps(train, budget, evaluations):
    folder = train("task=cnn_digits", "optimizer=sgdm", budget)
    assert [int(row["step"]) for row in rows(folder)] == evaluations


def test_budget_in_seconds(train):
    summary = read_summary(train("task=cnn_digits", "optimizer=sgdm", "budget.seconds=0.2"))
    assert 0.2 <= summary["train_seconds"] < 0.6
    assert summary["steps"] > 0


@pytest.mark.parametrize("optimizer", ["sgdm", "adamw", "lw_sgdm", "lw_adamw"])
@pytest.mark.parametrize("stop", [1, STEPS, STEPS + 7])
@pytest.mark.parametrize("signum", [signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bits(train, tmp_path, monkeypatch, optimizer, stop, signum):
    run = ("task=cnn_digits", f"optimizer={optimizer}", "budget.epochs=2", "schedule=step", "schedule.step_size=1")
    whole = train(*run, elsewhere(tmp_path))
    with monkeypatch.context() as patch:
        at_step(patch, stop, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(Interrupted, match="goes on from"):
            train(*run)
    folder = whole.parents[3] / "results" / whole.relative_to(whole.parents[2])
    assert read_summary(folder)["status"] == "interrupted"
    assert read_summary(folder)["steps"] == stop
    assert train(*run) == folder
    assert read_summary(folder)["status"] == "finished"
    assert rows(folder) == rows(whole)
    weights, expected = (torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (folder, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1])
def test_dropout_goes_on_to_the_same_bits(train, tmp_path, monkeypatch, signum):
    whole = train(*GRAPH, elsewhere(tmp_path))
    with monkeypatch.context() as patch:
        at_step(patch, 13, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(Interrupted):
            train(*GRAPH)
    assert rows(train(*GRAPH)) == rows(whole)


def test_a_killed_run_goes_on_from_its_last_evaluation(train, tmp_path):
    kill = """
import os, signal, sys
from hydra import compose, initialize_config_dir
from runners import config, trainer
trainer.CHECKPOINT_EVERY = 0
take = trainer.Trainer._next_batch
def next_batch(self):
    if self.step == 30: os.kill(os.getpid(), signal.SIGKILL)
    return take(self)
trainer.Trainer._next_batch = next_batch
with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
    cfg = compose("config", sys.argv[1:])
trainer.run(config.resolve(cfg))
"""
    place = (f"results.root={tmp_path}/results", "device=cpu", "threads=1", "progress=false")
    done = subprocess.run([sys.executable, "-c", kill, *DIGITS, *place], timeout=120)
    assert done.returncode == -signal.SIGKILL
    whole = train(*DIGITS, elsewhere(tmp_path))
    folder = train(*DIGITS)
    assert rows(folder) == rows(whole)


@pytest.mark.parametrize("holdout", ["holdout=true", "holdout=false"])
def test_holdout_takes_a_tenth_of_the_training_set_for_validation(train, holdout):
    folder = train(*DIGITS, holdout)
    held_out = holdout.endswith("true")
    assert bool(rows(folder)[0]["val_loss"]) == held_out
    assert (folder / "checkpoint.pt").exists() != held_out  # trials keep no weights
    assert read_summary(folder)["steps"] == (40 if held_out else 44)


def test_graphs_validate_on_their_own_nodes_every_ten_epochs(train):
    table = rows(train(*GRAPH))
    assert [row["step"] for row in table] == ["0", "10", "20"]
    assert all(row["val_accuracy"] for row in table)


def test_a_diverging_run_ends_early_with_its_finite_rows(train):
    folder = train("task=autoencoder_curves_small", "optimizer=sgd", "optimizer.lr=1e20", "budget.epochs=3")
    summary = read_summary(folder)
    assert summary["status"] == "diverged"
    assert 1 <= summary["diverged_at"] <= 10  # within the first epoch
    assert [row["step"] for row in rows(folder)] == ["0"]
    assert summary["final"]["train_loss"] == float(rows(folder)[0]["train_loss"])


class BrokenSGD(torch.optim.SGD):
    """Fails at its third step."""

    __module__ = "torch.optim"  # where a config may name it

    def step(self, closure):
        loss = super().step(closure)
        state = self.state.setdefault("broken", {"steps": 0})
        state["steps"] += 1
        if state["steps"] == 3:
            raise RuntimeError("out of\n luck")
        return loss


def test_a_failing_run_is_recorded_and_tried_again(train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "BrokenSGD", BrokenSGD, raising=False)
    run = (*DIGITS, "optimizer=sgd", "optimizer._target_=torch.optim.BrokenSGD")
    with pytest.raises(trainer.RunFailed, match="RuntimeError: out of luck"):
        train(*run)
    (folder,) = (tmp_path / "results").glob("*/*/*")
    assert read_summary(folder)["status"] == "failed"
    assert read_summary(folder)["message"] == "RuntimeError: out of luck"
    assert "Traceback" in (folder / "error.txt").read_text()
    monkeypatch.setattr(torch.optim, "BrokenSGD", torch.optim.SGD)
    assert train(*run) == folder
    assert read_summary(folder)["status"] == "finished"


def test_a_method_that_raises_on_what_is_not_finite_has_diverged(train, monkeypatch):
    class Factorising(torch.optim.SGD):
        __module__ = "torch.optim"

        def step(self, closure):
            loss = super().step(closure)
            for group in self.param_groups:
                torch.linalg.cholesky(torch.eye(2) + 0 * group["params"][0].sum())
            return loss

    monkeypatch.setattr(torch.optim, "Factorising", Factorising, raising=False)
    folder = train(*DIGITS, "optimizer=sgd", "optimizer._target_=torch.optim.Factorising", "optimizer.lr=1e30")
    assert read_summary(folder)["status"] == "diverged"


def test_a_batch_larger_than_the_data_is_refused_before_training(train, tmp_path):
    with pytest.raises(ConfigError, match=r"task\.batch_size is 2000 but there are 1437 training examples"):
        train(*DIGITS, "task.batch_size=2000")
    assert not list((tmp_path / "results").rglob("*.*"))


def test_a_folder_that_cannot_be_written_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/results cannot be written .*; type results\.root=FOLDER"):
        train(*DIGITS, f"results.root={tmp_path}/file/results")


def test_a_schedule_changes_the_rate_between_epochs(train, monkeypatch):
    rates = []
    row = trainer.Trainer._row
    monkeypatch.setattr(
        trainer.Trainer, "_row", lambda self: rates.append(self.optimizer.param_groups[0]["lr"]) or row(self)
    )
    train(*DIGITS, "schedule=step", "schedule.step_size=1", "optimizer.lr=0.1")
    assert rates == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("task", "dtype", "kept", "inside"),
    [
        (DIGITS, "float64", torch.float64, torch.float64),
        (GRAPH, "float64", torch.float64, torch.float64),
        (DIGITS, "bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_precision_reaches_data_and_model(train, task, dtype, kept, inside, monkeypatch):
    seen = {}
    start = trainer.Trainer._start

    def look(self, state):
        convolution = next(module for name, module in self.model.named_modules() if name.endswith("conv1"))
        convolution.register_forward_hook(lambda module, inputs, output: seen.update(inside=output.dtype))
        outputs = self.objective(*next(iter(self.batches))).trace().outputs
        seen.update(parameters=next(self.model.parameters()).dtype, outputs=outputs.dtype)
        return start(self, state)

    monkeypatch.setattr(trainer.Trainer, "_start", look)
    folder = train(*task, "optimizer=lw_adamw", f"task.dtype={dtype}", "budget.epochs=2")
    assert seen == {"parameters": kept, "outputs": kept, "inside": inside}
    assert read_summary(folder)["status"] == "finished"


def test_a_penalty_is_the_objectives_and_on_the_first_layer_of_a_gcn(train, monkeypatch):
    penalties = []
    start = trainer.Trainer._start
    monkeypatch.setattr(
        trainer.Trainer, "_start", lambda self, state: penalties.append(self.objective.penalty) or start(self, state)
    )
    train(*GRAPH, "task.penalty=0.3", "budget.epochs=1")
    assert [(tuple(p.shape), weight) for p, weight in penalties[0].items()] == [((16,), 0.3), ((16, 500), 0.3)]


def test_layerwise_methods_record_their_step_sizes(train):
    folder = train(*DIGITS, "optimizer=lw_sgdm")
    table = read_table(folder / "layers.csv")
    assert list(table[0]) == ["step", "epoch", "layer", "quantity", "value"]
    sizes = [row for row in table if row["quantity"] == "step_size"]
    assert {row["step"] for row in sizes} == {"22", "44"}
    assert all(float(row["value"]) > 0 for row in sizes)
