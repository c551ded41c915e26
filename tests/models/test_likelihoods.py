import re

import pytest
import torch
import torch.nn.functional as F

from models.likelihoods import Bernoulli, Categorical, Gaussian, Scaled

M, C = 5, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def targets_of(likelihood):
    base = getattr(likelihood, "likelihood", likelihood)
    if isinstance(base, Categorical):
        return torch.randint(C, (M,), generator=seeded(1))
    return torch.rand(M, C, dtype=torch.float64, generator=seeded(1))


@pytest.fixture
def outputs():
    return 2 * torch.randn(M, C, dtype=torch.float64, generator=seeded(0))


every = pytest.mark.parametrize(
    "likelihood",
    [
        Bernoulli(),
        Categorical(),
        Gaussian(),
        Scaled(Bernoulli(), 3.0),
        Scaled(Categorical(), 0.5),
        Scaled(Gaussian(), 2.0),
    ],
    ids=lambda x: f"{type(x).__name__}-{type(getattr(x, 'likelihood', x)).__name__}",
)


def test_losses_against_torch(outputs):
    y = targets_of(Bernoulli())
    expected = F.binary_cross_entropy_with_logits(outputs, y, reduction="sum")
    torch.testing.assert_close(Bernoulli().nll(outputs, y).sum(), expected)
    torch.testing.assert_close(Gaussian().nll(outputs, y).sum(), F.mse_loss(outputs, y, reduction="sum") / 2)
    y = targets_of(Categorical())
    torch.testing.assert_close(Categorical().nll(outputs, y).mean(), F.cross_entropy(outputs, y))


@every
def test_losses_and_metrics_are_per_example(likelihood, outputs):
    y = targets_of(likelihood)
    assert likelihood.nll(outputs, y).shape == (M,)
    assert likelihood.metric(outputs, y).shape == (M,)


@every
def test_residual_is_the_gradient(likelihood, outputs):
    y = targets_of(likelihood)
    outputs.requires_grad_()
    (expected,) = torch.autograd.grad(likelihood.nll(outputs, y).sum(), outputs)
    torch.testing.assert_close(likelihood.residual(outputs, y), expected, rtol=1e-12, atol=1e-14)


@every
def test_hessian_product_is_the_second_derivative(likelihood, outputs):
    y = targets_of(likelihood)
    v = torch.randn(M, C, dtype=torch.float64, generator=seeded(2))
    _, expected = torch.autograd.functional.hvp(lambda z: likelihood.nll(z, y).sum(), outputs, v)
    torch.testing.assert_close(likelihood.hessian_product(outputs, v), expected, rtol=1e-12, atol=1e-14)


@every
def test_sampled_residuals_have_mean_zero_and_the_hessian_as_second_moment(likelihood, outputs):
    """Over 100,000 draws; the bounds are five standard errors of entries of order one."""
    draws = 100_000
    z = outputs[:1].expand(draws, C)
    residuals = likelihood.sampled_residual(z, seeded(3))
    hessian = likelihood.hessian_product(outputs[:1].expand(C, C), torch.eye(C, dtype=torch.float64))
    scale = getattr(likelihood, "factor", 1.0)
    torch.testing.assert_close(residuals.mean(0), torch.zeros(C, dtype=torch.float64), rtol=0, atol=0.016 * scale**0.5)
    torch.testing.assert_close(residuals.T @ residuals / draws, hessian, rtol=0, atol=0.025 * scale)


@every
def test_sampling_follows_its_generator_and_carries_no_graph(likelihood, outputs):
    outputs.requires_grad_()
    first, second = (likelihood.sampled_residual(outputs, seeded(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not torch.equal(first, likelihood.sampled_residual(outputs, seeded(5)))


def test_metrics(outputs):
    y = targets_of(Bernoulli())
    torch.testing.assert_close(Bernoulli().metric(outputs, y), (outputs.sigmoid() - y).pow(2).sum(1))
    torch.testing.assert_close(Gaussian().metric(outputs, y), (outputs - y).pow(2).sum(1))
    assert Categorical().metric(torch.eye(3), torch.tensor([0, 1, 0])).tolist() == [1.0, 1.0, 0.0]


def test_scaling_leaves_the_metric_alone(outputs):
    scaled, y = Scaled(Bernoulli(), 10.0), targets_of(Bernoulli())
    assert (scaled.metric_name, scaled.metric_mode) == ("error", "min")
    assert torch.equal(scaled.metric(outputs, y), Bernoulli().metric(outputs, y))
    with pytest.raises(ValueError, match="factor is 0"):
        Scaled(Bernoulli(), 0)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets"),
    [
        (Gaussian(), (4, 1), (4,)),  # would broadcast to (4, 4)
        (Bernoulli(), (4, 3), (4, 1)),
        (Scaled(Gaussian(), 2.0), (4, 1), (4,)),
        (Categorical(), (4, 10, 8), (4, 8)),
        (Categorical(), (4, 8, 10), (4,)),
        (Categorical(), (4, 10), (3,)),
    ],
)
def test_targets_that_do_not_fit_are_refused_with_both_shapes(likelihood, outputs, targets):
    with pytest.raises(ValueError, match=re.escape(f"the shapes are {outputs} and {targets}")):
        likelihood.nll(torch.zeros(outputs), torch.zeros(targets))


def test_extreme_logits_stay_finite():
    z = torch.tensor([[-200.0, 200.0]])
    assert Bernoulli().nll(z, torch.tensor([[0.0, 1.0]])).item() == 0
    assert Categorical().sampled_residual(z, seeded()).isfinite().all()


def test_an_example_of_several_labels_is_the_sum_of_as_many_examples():
    z, v = (torch.randn(M, 6, C, dtype=torch.float64, generator=seeded(s)) for s in (0, 1))
    y = torch.randint(C, (M, 6), generator=seeded(2))
    apart, z1, v1, y1 = Categorical(), z.flatten(0, 1), v.flatten(0, 1), y.flatten()
    torch.testing.assert_close(apart.nll(z, y), apart.nll(z1, y1).view(M, 6).sum(1))
    torch.testing.assert_close(apart.metric(z, y), apart.metric(z1, y1).view(M, 6).mean(1))
    torch.testing.assert_close(apart.residual(z, y), apart.residual(z1, y1).view_as(z))
    torch.testing.assert_close(apart.hessian_product(z, v), apart.hessian_product(z1, v1).view_as(z))
    drawn = [apart.sampled_residual(part, seeded(3)).view_as(z) for part in (z, z1)]
    torch.testing.assert_close(*drawn)


def test_labels_that_torch_leaves_out_are_refused():
    labels = torch.tensor([0, -100])
    with pytest.raises(IndexError, match="-100 is out of bounds"):
        Categorical().nll(torch.zeros(2, 3), labels)


def test_a_net_of_one_output_may_leave_its_dimension_out():
    z, y = torch.randn(5), torch.tensor([0, 1, 1, 0, 1])
    for likelihood, targets in ((Gaussian(), torch.randn(5)), (Bernoulli(), y), (Bernoulli(), y.bool())):
        column = targets.float()[:, None]
        for name in ("nll", "metric", "residual"):
            found, expected = getattr(likelihood, name)(z, targets), getattr(likelihood, name)(z[:, None], column)
            torch.testing.assert_close(found, expected.reshape(5))
