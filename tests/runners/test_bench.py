import os
import subprocess
import sys

import pandas as pd
import pytest

from runners.bench import Contender, draw, earlier, stand_in
from runners.config import CONFIGS, ConfigError


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The files of a short benchmark of an embedded workload, with a method that cannot be built."""
    root = tmp_path_factory.mktemp("bench")
    command = [
        sys.executable, "-m", "runners.bench", f"results.root={root}", "seconds=25", "threads=1", "device=cpu",
        "workloads=[cnn_digits]", 'optimizers=[adamw,lw_sgdm,"lw_sgdm every=10","sgd lr=-1"]',
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=CONFIGS.parent, env=environment, check=True, capture_output=True)
    folder = root / "bench" / "cpu"
    assert {path.name for path in folder.iterdir()} == {"bench.csv", "context.csv", "bench.pdf", "bench.png"}
    return pd.read_csv(folder / "bench.csv").set_index("optimizer"), pd.read_csv(folder / "context.csv")


def test_one_row_per_optimizer_relative_to_sgdm(tables):
    table, _ = tables
    assert list(table.index) == ["sgdm", "adamw", "lw_sgdm", "lw_sgdm every=10", "sgd lr=-1"]
    measured = table[table.refused.isna()]
    assert (measured[["seconds", "samples_per_second", "memory_bytes", "time_ratio", "memory_ratio"]] > 0).all(None)
    assert table.loc["sgdm", ["time_ratio", "memory_ratio", "gradient_equivalents"]].tolist() == [1, 1, 1]


def test_rare_work_is_spread_over_its_period(tables):
    table, _ = tables
    # of half of the batch, for there are to be 32: a forward pass, and four times of five a backward pass of
    # activations and tangents, the fifth time two thirds of a gradient for the noise; once in five the loss after it
    measured = 32 / 64 * (1 / 3 + 2 / 3) + 1 / 5 * 1 / 3
    assert table.loc["lw_sgdm", "gradient_equivalents"] == pytest.approx(1 + measured, rel=1e-5)
    assert table.loc["lw_sgdm every=10", "gradient_equivalents"] == pytest.approx(1 + measured / 10, rel=1e-5)


def test_who_refuses_a_workload_is_there_with_the_reason(tables):
    table, _ = tables
    assert table.refused.notna().tolist() == [False, False, False, False, True]
    assert "Invalid learning rate: -1" in table.loc["sgd lr=-1", "refused"]


def test_a_method_that_would_leave_the_others_no_time_is_left_out(compose):
    cfg = compose("task=cnn_digits", "optimizer=sgdm", "device=cpu", "threads=1", "tracker=none", "progress=false")
    with pytest.raises(TimeoutError, match=r"two steps take .* s, too long for the others; give more by seconds=N"):
        Contender("sgdm", cfg, {}, None, patience=1e-6)


def test_context_is_one_row(tables):
    _, context = tables
    assert len(context) == 1
    assert {"device", "threads", "torch", "python", "dtype"} <= set(context.columns)
    assert context.workloads.tolist() == ["cnn_digits"]


def test_an_unknown_optimizer_is_told_in_one_line(tmp_path):
    command = [sys.executable, "-m", "runners.bench", f"results.root={tmp_path}", "optimizers=[nonsense]"]
    done = subprocess.run([*command, "workloads=[cnn_digits]"], cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: unknown optimizer nonsense; choose one of" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("task", ["autoencoder_mnist", "cnn_cifar10_resnet32", "cnn_cifar100_vgg16", "gcn_cora"])
def test_stand_ins_have_the_real_shapes(compose, task):
    cfg = compose(f"task={task}").task
    shapes = {"autoencoder": (784,), "cnn": (3, 32, 32), "gcn": (1433,)}
    split = stand_in(cfg).train
    assert split.inputs[0].shape[1:] == shapes[cfg.family]
    if cfg.family == "gcn":
        assert split.inputs[1].shape == (2708, 2708)
        assert split.inputs[0].values().numel() == 2708 * 18
        assert len(split) == len(split.rows) == 140
    else:
        assert len(split) == 2 * cfg.batch_size


def test_tasks_whose_data_are_in_the_package_need_no_stand_in(compose):
    assert stand_in(compose("task=gcn_sbm").task) is None


def test_kinds_of_steps_are_weighted_by_how_often_they_are():
    contender = object.__new__(Contender)
    contender.intervals, contender.period = [(2, 0), (4, 0)], 4
    costs = pd.Series([9.0, 1.0, 3.0, 1.0, 7.0, 1.0])
    assert contender.mean(costs) == (7 + 1 + 3 + 1) / 4
    assert contender.mean(costs[:4]) == (9 + 1 + 3 + 1) / 4  # no later step of the rarest kind: the first


def test_a_method_whose_rare_work_comes_late_goes_on_until_it_was_seen():
    contender = object.__new__(Contender)
    contender.intervals, contender.period, contender.name = [(4, 0)], 4, "gen_sgdm every=4"
    owed = []
    for steps in range(1, 7):
        contender.samples = [{}] * steps
        owed.append(contender.is_owed_steps())
    assert owed == [True, True, True, True, False, False]  # the first step is not counted, the fifth is like it
    contender.name, contender.samples = "lw_sgdm every=4", [{}]
    assert not contender.is_owed_steps()


def test_other_workloads_of_an_earlier_benchmark_stay(tmp_path):
    pd.DataFrame({"workload": ["a", "a", "b", "c"], "seconds": 1.0}).to_csv(tmp_path / "bench.csv")
    pd.DataFrame({"torch": ["1", "2"], "workloads": ["a b", "c"]}).to_csv(tmp_path / "context.csv")
    table, context = earlier(tmp_path, ["a"])
    assert table.workload.tolist() == ["b", "c"]
    assert context.workloads.tolist() == ["b", "c"]
    table, context = earlier(tmp_path, ["b", "a", "d"])
    assert (table.workload.tolist(), context.torch.tolist()) == (["c"], [2])
    assert all(part.empty for part in earlier(tmp_path / "none", ["a"]))
    (tmp_path / "bench.csv").write_text("")
    with pytest.raises(ConfigError, match=r"earlier benchmark that cannot be read, .*: move it away"):
        earlier(tmp_path, ["a"])


@pytest.mark.parametrize("methods", [["sgdm"], ["sgdm", "lw_sgdm every=10"]])
def test_a_benchmark_of_one_method_is_drawn_too(tmp_path, methods):
    table = pd.DataFrame({"workload": "gcn_sbm", "optimizer": methods, "time_ratio": 1.2, "memory_ratio": 1.0})
    draw(table, tmp_path, "one thread")
    assert (tmp_path / "bench.png").stat().st_size > 1000
