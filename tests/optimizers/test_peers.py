"""Optimizers of maintained packages: configuration alone, driven by the same closure as ours."""

import pytest
import torch
from torch import nn

from models.likelihoods import Gaussian
from optimizers import Objective
from tests.optimizers import cases

PEERS = [
    "soap",
    "shampoo_grafted",
    "prodigy",
    "dadaptation",
    "schedulefree",
    "muon",
    "lars",
    "lamb",
    "adahessian",
    "dog",
]
PACKAGES = {"prodigy": "prodigyopt", "dadaptation": "dadaptation", "schedulefree": "schedulefree", "dog": "dog"}
WORK = {"adahessian": 3}  # gradient-equivalents a step, where it is not 1


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
    assert objective.gradient_equivalents == pytest.approx(100 * WORK.get(name, 1))


def test_muon_takes_matrices_and_adamw_the_rest():
    model = cases.small_network()
    optimizer = cases.build("muon", model.parameters())
    by_rule = {group["use_muon"]: {p.dim() for p in group["params"]} for group in optimizer.param_groups}
    assert by_rule == {True: {2, 4}, False: {1}}


def test_adahessian_estimates_a_diagonal_hessian_exactly():
    """``Σ_i h_i θ_i² / 2``: random signs give the diagonal without noise, so the first step is ``lr · g / h``."""
    curvatures = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    before = model.weight.detach().clone()
    x = (3 * curvatures).sqrt().diag()  # mean over three examples
    optimizer = cases.build("adahessian", model.parameters(), lr=0.1, weight_decay=0.0)
    loss = optimizer.step(Objective(model, Gaussian())(x, torch.zeros(3, 1, dtype=torch.float64)))
    torch.testing.assert_close(loss, (curvatures * before.square()).sum() / 2)
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * before)
    assert model.weight.grad.grad_fn is None


def test_adahessian_estimates_every_update_period():
    model = cases.small_network()
    objective = cases.small_objective(model)
    optimizer = cases.build("adahessian", model.parameters(), update_period=3)
    for _ in range(6):
        optimizer.step(objective(*cases.small_batch()))
    assert objective.gradient_equivalents == pytest.approx(2 * 3 + 4 * 1)
