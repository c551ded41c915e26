"""The task configs: complete, of one shape, and buildable."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

FOLDER = Path("configs/task")
KEYS = ["name", "version", "family", "data", "model", "likelihood", "batch_size", "drop_last", "weight_decay"]
KEYS += ["penalty", "select", "target", "evaluate_every", "dtype"]
EMBEDDED = ["autoencoder_curves_small", "cnn_digits", "gcn_sbm"]
every = pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.yaml")))


def load(name):
    return OmegaConf.load(FOLDER / f"{name}.yaml")


def targets(node):
    if not OmegaConf.is_config(node):
        return []
    found = [node["_target_"]] if "_target_" in node else []
    return found + [t for value in node.values() if OmegaConf.is_dict(value) for t in targets(value)]


@every
def test_every_task_has_the_same_fields(name):
    task = load(name)
    assert list(task) == KEYS
    assert task.name == name
    assert task.family == name.split("_")[0]
    assert all(t.split(".")[0] in ("data", "models") for t in targets(task))
    mode = "min" if task.family == "autoencoder" else "max"
    metric = instantiate(task.likelihood)
    assert task.select == {"metric": "val_loss" if mode == "min" else "val_accuracy", "mode": mode}
    assert metric.metric_mode == mode


@every
def test_every_number_has_a_source(name):
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
        field = OmegaConf.create(line.strip())
        for key, value in field.items():
            number = OmegaConf.is_list(value) or isinstance(value, int | float)
            assert not number or key == "version" or "#" in line, line


@every
def test_every_model_can_be_built(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in instantiate(load(name).model).parameters()) > 1000


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks_go_from_data_to_loss(name, cache):
    task = load(name)
    train = instantiate(task.data, root=cache, cache=cache).train
    outputs = instantiate(task.model)(*train.inputs)
    outputs = outputs if train.rows is None else outputs[train.rows]
    likelihood = instantiate(task.likelihood)
    loss = likelihood.nll(outputs, train.targets)
    assert loss.shape == (len(train),)
    assert loss.isfinite().all()
    assert likelihood.metric(outputs, train.targets).shape == (len(train),)
