"""Captured steps, on a tape in place of a CUDA graph, are those that are launched; on a GPU: tests/test_cuda.py."""

import pytest
import torch
from torch import nn

from models.likelihoods import Categorical
from optimizers import Objective, cuda_graphs
from optimizers.cuda_graphs import CapturedSteps
from tests.optimizers import cases, tape

STEPS = 150


def training(problem, name, captured, population, **settings):
    """Losses, weights and work of a training whose learning rate is halved on the way, and what took its steps."""
    model, batch = problem()
    objective = Objective(model, Categorical(), torch.Generator().manual_seed(4), population)
    optimizer = cases.build(name, model.parameters(), **settings)
    launched = lambda *batch: optimizer.step(objective(*batch))  # noqa: E731
    take = CapturedSteps(objective, optimizer) if captured else launched
    losses = []
    for number in range(STEPS):
        if number == STEPS - 30:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        losses.append(take(*batch(number)))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.stack(losses), weights, objective.gradient_equivalents, take


def images():
    """A convolutional net with BatchNorm, and other images in every step."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(400, 1, 8, 8, generator=generator)
    y = x.flatten(1)[:, :3].argmax(1)

    def batch(number):
        part = torch.arange(24 * number, 24 * number + 96) % 400
        return x[part], y[part]

    return cases.small_network(), batch


def rows():
    """A net of normalised rows without a batch's statistics, weight-tied by a second call, on one whole batch."""
    torch.manual_seed(5)
    twice = nn.Linear(6, 6)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(6))
    return nn.Sequential(twice, nn.Tanh(), nn.LayerNorm(6), twice, nn.Linear(6, 3)), lambda number: (x, x.argmax(1) % 3)


@pytest.mark.parametrize("name", ["sgd", "sgdm", "layer_specific", "lw_sgdm", "lw_adamw"])
@pytest.mark.parametrize(("problem", "population"), [(images, 400), (rows, 40)])
def test_captured_steps_are_those_that_are_launched(problem, population, name, monkeypatch):
    """Adam keeps its count on the device there, which torch has it do on no CPU."""
    tape.install(monkeypatch, cuda_graphs)
    losses, weights, work, _ = training(problem, name, False, population)
    again = training(problem, name, True, population)
    assert again[2] == pytest.approx(work)
    torch.testing.assert_close(again[0], losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[1], weights, rtol=1e-3, atol=1e-4)
    replayed = again[3]._captured.values()
    assert 1 <= len(replayed) <= 4
    assert all(capture._graph.taken for capture in replayed)


@pytest.mark.parametrize("name", ["lw_sgdm", "lw_adamw"])
@pytest.mark.parametrize("settings", [{"every": 10}, {"settling": 5, "correct_every": 1}, {"weight_decay": 1e-3}])
def test_whatever_is_measured_and_when(name, settings, monkeypatch):
    tape.install(monkeypatch, cuda_graphs)
    losses, weights, work, _ = training(images, name, False, 400, **settings)
    again = training(images, name, True, 400, **settings)
    assert again[2] == pytest.approx(work)
    torch.testing.assert_close(again[0], losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[1], weights, rtol=1e-3, atol=1e-4)


def test_the_last_batch_of_an_epoch_may_be_smaller(monkeypatch):
    tape.install(monkeypatch, cuda_graphs)
    model, batch = images()
    objective = cases.small_objective(model, 400)
    take = CapturedSteps(objective, cases.build("lw_sgdm", model.parameters()))
    for number in range(60):
        x, y = batch(number)
        size = 40 if number % 3 == 2 else 96
        loss = objective(x[:size], y[:size]).evaluate()
        torch.testing.assert_close(take(x[:size], y[:size]), loss, rtol=1e-3, atol=1e-4)


def steps(name):
    model = cases.small_network()
    return CapturedSteps(cases.small_objective(model), cases.build(name, model.parameters()))


def test_an_optimizer_in_whose_steps_the_host_takes_part_is_refused():
    with pytest.raises(TypeError, match=r"KFAC's steps cannot be captured .* LWSGDm, LWAdamW, SGD, Adam"):
        steps("kfac")


def test_parameters_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="the parameters are on cpu"):
        steps("lw_sgdm")


def test_modules_that_change_their_mode_are_captured_in_turn(monkeypatch):
    tape.install(monkeypatch, cuda_graphs)
    model, batch = images()
    take = CapturedSteps(cases.small_objective(model, 400), cases.build("lw_adamw", model.parameters()))
    for number in range(40):
        if number == 20:
            model[1].eval()
            before = model[1].running_mean.clone()
        take(*batch(number))
    assert torch.equal(model[1].running_mean, before)


def test_rates_are_told_whatever_the_size_of_the_last_batch(monkeypatch):
    tape.install(monkeypatch, cuda_graphs)
    model, batch = images()
    optimizer = cases.build("layer_specific", model.parameters())
    take, told = CapturedSteps(cases.small_objective(model, 400), optimizer), []
    for number in range(12):
        x, y = batch(number)
        size = 40 if number % 3 == 2 else 96
        take(x[:size], y[:size])
        told.append(optimizer.diagnostics()["0"]["step_size"].item())
    assert len(set(told)) > 3


def test_a_step_in_which_the_host_takes_part_ends_the_capture(monkeypatch):
    tape.install(monkeypatch, cuda_graphs)
    model, batch = images()
    model.append(nn.Module())
    model[-1].forward = lambda x: x * x.mean().item()
    take = CapturedSteps(cases.small_objective(model, 400), cases.build("sgd", model.parameters()))
    take(*batch(0)), take(*batch(1))
    with pytest.raises(RuntimeError, match="cannot be captured: the host takes part"):
        take(*batch(2))
