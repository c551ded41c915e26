"""Optimizers of maintained packages: configuration alone, driven by the same closure as ours."""

import pytest
import torch

from tests.optimizers import cases

PEERS = ["soap", "shampoo_grafted", "prodigy", "dadaptation", "schedulefree", "muon", "lars", "lamb"]
PACKAGES = {"prodigy": "prodigyopt", "dadaptation": "dadaptation", "schedulefree": "schedulefree"}


@pytest.mark.parametrize("name", PEERS)
def test_steps_and_learns(name):
    pytest.importorskip(PACKAGES.get(name, "pytorch_optimizer"))
    model = cases.small_network()
    objective = cases.small_objective(model)
    groups = [{"params": [p], "weight_decay": 0.0} for p in model.parameters()]
    optimizer = cases.build(name, groups)
    getattr(optimizer, "train", lambda: None)()
    losses = torch.stack([optimizer.step(objective(*cases.small_batch())) for _ in range(100)])
    getattr(optimizer, "eval", lambda: None)()
    assert losses[-10:].mean() < 0.7 * losses[0]
    assert objective.gradient_equivalents == pytest.approx(100)


def test_muon_takes_matrices_and_adamw_the_rest():
    model = cases.small_network()
    optimizer = cases.build("muon", model.parameters())
    by_rule = {group["use_muon"]: {p.dim() for p in group["params"]} for group in optimizer.param_groups}
    assert by_rule == {True: {2, 4}, False: {1}}
