"""Batches in parts, and clipped gradients."""

import pytest
import torch
from torch import nn

from models.likelihoods import Categorical, Gaussian
from optimizers import LWAdamW, LWSGDm, Objective
from optimizers.accumulation import accumulate
from optimizers.adahessian import AdaHessian
from optimizers.curvature import ExactGaussNewton
from optimizers.kfac import KFAC
from tests.optimizers.cases import small_batch, small_network, small_objective

BOTH = pytest.mark.parametrize("method", [LWSGDm, LWAdamW])


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def halves(objective, x, y):
    return accumulate(objective(*part) for part in zip(x.chunk(2), y.chunk(2), strict=True))


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6])
def test_gradient_of_parts_is_that_of_the_batch(max_norm):
    model = perceptron()
    x, y = small_batch(torch.float64)
    objective = Objective(model, Categorical(), max_norm=max_norm)
    whole = objective(x, y)
    loss, expected = whole(), gradients(model)
    if max_norm == 0.1:
        assert torch.stack([g.square().sum() for g in expected]).sum().sqrt() == pytest.approx(0.1, rel=1e-5)
    parts = halves(objective, x, y)
    for fill in (parts, lambda: parts.fill_gradients(parts.trace())):
        torch.testing.assert_close(fill(), loss)
        torch.testing.assert_close(gradients(model), expected)
    torch.testing.assert_close(parts.evaluate(), whole.evaluate())


@BOTH
def test_a_step_of_no_length_sees_no_curvature(method):
    """Every part is evaluated again under the masks that it had: a loss that did not move is equal to the last bit."""
    model = nn.Sequential(perceptron(), nn.Dropout(0.5))
    x, y = small_batch(torch.float64)
    still = type("Still", (method,), {"_step_sizes": lambda self, search: torch.zeros(2, dtype=torch.float64)})
    optimizer = still(model.parameters())
    optimizer.step(halves(Objective(model, Categorical(), population=100), x, y))
    assert optimizer._search["along_step"].tolist() == [0, 0]


@BOTH
def test_parts_that_are_alike_are_one_batch(method):
    """Without noise and label draws: the last part's curvature is then the batch's."""
    finals = []
    for split in (1, 2):
        model = perceptron()
        x, y = small_batch(torch.float64)
        objective = Objective(model, Categorical(), population=2 * len(y))
        optimizer = method(model.parameters(), curvature=ExactGaussNewton())
        for _ in range(10):
            optimizer.step(
                accumulate([objective(x, y)] * 2) if split == 2 else objective(x.repeat(2, 1, 1, 1), y.repeat(2))
            )
        finals.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-7, atol=1e-9)


def mean_noise(minibatch, draws=200):
    """E‖e‖²."""
    squares = []
    for _ in range(draws):
        trace = minibatch.trace()
        minibatch.fill_gradients(trace, retain_graph=True)
        minibatch.noise(trace, lambda p, e: squares.append(e.square().sum()))
    return float(sum(squares)) / draws


def test_noise_is_that_of_the_mean_over_parts_and_clipped_with_the_gradient():
    model = perceptron()
    x, y = small_batch(torch.float64)
    objective = Objective(model, Categorical(), torch.Generator().manual_seed(0))
    free = mean_noise(objective(x, y))
    assert mean_noise(halves(objective, x, y)) == pytest.approx(free, rel=0.15)
    norm = torch.cat([g.flatten() for g in gradients(model)]).norm()
    objective.max_norm = 0.5 * norm
    for minibatch in (objective(x, y), halves(objective, x, y)):
        assert mean_noise(minibatch) == pytest.approx(0.25 * free, rel=0.15)


@BOTH
def test_layerwise_methods_learn_on_clipped_batches_in_parts(method):
    model = small_network()
    objective = Objective(model, Categorical(), torch.Generator().manual_seed(0), max_norm=1.0)
    optimizer = method(model.parameters())
    losses = [optimizer.step(halves(objective, *small_batch())) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_what_cannot_be_accumulated_or_clipped_is_refused():
    model = small_network()
    objective = small_objective(model)
    x, y = small_batch()
    with pytest.raises(ValueError, match=r"parts of one size, not of \[2, 3\]"):
        accumulate([objective(x[:2], y[:2]), objective(x[:3], y[:3])])
    with pytest.raises(ValueError, match="max_norm=-1 is impossible: it must be positive"):
        Objective(model, Categorical(), max_norm=-1)
    with pytest.raises(ValueError, match="not of none"):
        accumulate([])
    with pytest.raises(NotImplementedError, match="graphs"):
        accumulate([objective(x, y, torch.arange(len(y)))])
    with pytest.raises(NotImplementedError, match="KFAC measures its layers on the whole batch at once"):
        KFAC(model.parameters(), lr=0.1, damping=0.1).step(halves(objective, x, y))


def test_without_noise_in_the_direction_clipping_changes_no_layerwise_step():
    """The step sizes grow by what the direction shrinks: slope and curvature are the loss's own."""
    steps = []
    for max_norm in (None, 0.05):
        model = perceptron()
        objective = Objective(model, Categorical(), torch.Generator().manual_seed(0), max_norm=max_norm)
        optimizer = LWSGDm(model.parameters(), momentum=0.0)
        for _ in range(20):
            optimizer.step(objective(*small_batch(torch.float64)))
        steps.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_adahessian_averages_the_gradient_of_all_parts_clipped(max_norm):
    averages = []
    for in_parts in (False, True):
        model = perceptron()
        objective, (x, y) = Objective(model, Categorical(), max_norm=max_norm), small_batch(torch.float64)
        optimizer = AdaHessian(model.parameters(), betas=(0.5, 0.9), weight_decay=0.0, eps=1.0)
        optimizer.step(halves(objective, x, y) if in_parts else objective(x, y))
        averages.append([optimizer.state[p]["exp_avg"] for p in model.parameters()])
    torch.testing.assert_close(*averages, rtol=1e-9, atol=1e-12)
    norm = torch.cat([a.flatten() for a in averages[0]]).norm() / 0.5
    assert norm == pytest.approx(max_norm, rel=1e-4) if max_norm else norm > 0.1


def test_work_in_parts_is_that_of_the_batch():
    model = small_network()
    x, y = small_batch()
    objectives = [small_objective(model, population=1000) for _ in range(2)]
    objectives[0](x, y)()
    accumulate(objectives[1](*part) for part in zip(x.chunk(4), y.chunk(4), strict=True))()
    assert objectives[0].gradient_equivalents == objectives[1].gradient_equivalents == 1


class Sums(nn.Module):
    """Two parameters whose gradients are one tensor, and one whose gradient is one number many times."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.b, self.c = nn.Linear(5, 3), *(nn.Parameter(torch.zeros(3)) for _ in range(3))

    def forward(self, x):
        return self.w(x) + (self.a + self.b) + self.c.sum()


@pytest.mark.parametrize("settings", [{}, {"max_norm": 0.1}])
def test_gradients_that_share_memory_are_clipped_and_averaged_once(settings):
    torch.manual_seed(0)
    model, x, y = Sums(), torch.randn(8, 5), torch.randn(8, 3)
    objective = Objective(model, Gaussian(), **settings)
    loss = Gaussian().nll(model(x), y).mean()
    true = dict(zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    norm = torch.stack([g.square().sum() for g in true.values()]).sum().sqrt()
    scale = min(settings.get("max_norm", float("inf")) / norm, 1)
    for minibatch in (objective(x, y), accumulate([objective(x[:4], y[:4]), objective(x[4:], y[4:])])):
        minibatch.fill_gradients(minibatch.trace())
        for p, g in true.items():
            torch.testing.assert_close(p.grad, scale * g)
