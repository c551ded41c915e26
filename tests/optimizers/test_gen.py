"""GeN against closed forms: on a quadratic the parabola through three losses is exact."""

import copy

import pytest
import torch
from torch import nn

from models.likelihoods import Categorical
from optimizers import Objective
from optimizers.gen import GeNAdamW, GeNSGD
from tests.optimizers import cases


@pytest.mark.parametrize(
    ("lr", "factor"),
    [
        (0.6, 0.9 + 0.1 / 0.6),  # a unit Hessian's minimiser is at a rate of 1
        (0.01, 0.9 + 0.1 * 2),  # at most twice the rate ...
        (2.5, 0.9 + 0.1 * 0.5),  # ... and at least half of it
    ],
)
def test_takes_a_tenth_of_the_way_to_the_minimum_of_the_line(lr, factor):
    objective, x, y, model = cases.least_squares()
    optimizer = GeNSGD(model.parameters(), lr=lr, every=1)
    optimizer.step(objective(x, y))
    assert optimizer.param_groups[0]["lr"] == lr
    optimizer.step(objective(x, y))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(factor * lr)


def test_a_step_uphill_changes_no_rate():
    objective, x, y, model = cases.least_squares()
    optimizer = GeNSGD(model.parameters(), lr=0.1, every=1)
    optimizer.step(objective(x, y))
    optimizer.step(objective(x, 2 * x @ model.weight.detach().T - y))  # a batch whose gradient is the opposite
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_between_measurements_it_is_the_method_that_it_scales():
    (objective, x, y, model), (plain_objective, _, _, twin) = cases.least_squares(), cases.least_squares()
    optimizer = GeNAdamW(model.parameters(), lr=0.01, every=6, weight_decay=0.1)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)

    def step_both():
        optimizer.step(objective(x, y))
        plain.step(plain_objective(x, y))
        assert torch.equal(model.weight, twin.weight)

    for _ in range(6):
        step_both()
    plain.param_groups[0]["lr"] *= 1.1  # a short step: twice as long would be better, by a tenth of the way
    step_both()
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_the_three_losses_have_the_same_dropout_masks():
    model = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 3))
    minibatch = Objective(model, Categorical())(torch.randn(20, 6), torch.arange(20) % 3)
    optimizer = GeNSGD(model.parameters(), lr=0.0, every=1)
    optimizer.step(minibatch)
    with torch.no_grad():
        ahead, start, behind = optimizer._losses(minibatch)
    assert ahead == start == behind


@pytest.mark.parametrize("method", [GeNSGD, GeNAdamW])
def test_measures_after_every_step_where_that_is_asked_for(method):
    objective, x, y, model = cases.least_squares()
    optimizer = method(model.parameters(), lr=0.01, every=1)
    for _ in range(3):
        optimizer.step(objective(x, y))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 1.1**2)


def test_a_line_on_which_the_model_overflows_leaves_parameters_and_rate():
    objective, x, y, model = cases.least_squares()
    optimizer = GeNSGD(model.parameters(), lr=0.01, every=1)
    optimizer.step(objective(x, y))
    weight, minibatch = model.weight.detach().clone(), objective(x, y)

    def overflow():
        raise OverflowError

    minibatch.evaluate = overflow
    with torch.no_grad():
        optimizer._search(minibatch)
    assert torch.equal(model.weight, weight)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_closure_that_cannot_be_evaluated_again_is_refused():
    with pytest.raises(TypeError, match="objective = Objective"):
        GeNSGD(cases.small_network().parameters()).step(lambda: torch.tensor(1.0))


def test_counts_a_forward_pass_for_each_loss():
    model = cases.small_network()
    objective = cases.small_objective(model)
    optimizer = GeNSGD(model.parameters(), every=8)
    for _ in range(17):
        optimizer.step(objective(*cases.small_batch()))
    assert objective.gradient_equivalents == pytest.approx(17 + 2 * 3 / 3)


@pytest.mark.parametrize("setting", [{"every": 0}, {"every": 1.5}, {"averaging": 1.0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match="is impossible"):
        GeNSGD(cases.small_network().parameters(), **setting)


def test_a_copy_keeps_its_settings():
    *_, model = cases.least_squares()
    copied = copy.deepcopy(GeNSGD(model.parameters(), every=3, averaging=0.5))
    assert (copied.every, copied.averaging) == (3, 0.5)
