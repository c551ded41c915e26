"""TNT against dense Kronecker algebra, and a least squares of known solution."""

import torch

from optimizers.kronecker import mode_grams
from optimizers.tnt import TNT, normalised
from tests.optimizers import cases
from tests.optimizers.kronecker_problems import LeastSquares


def test_normalised_factors_share_the_covariances_trace():
    torch.manual_seed(0)
    tensors = [torch.randn(3, 4, 5).double() for _ in range(7)]
    factors = [sum(grams) / 7 for grams in zip(*map(mode_grams, tensors), strict=True)]
    scaled = normalised(factors)
    product = torch.kron(torch.kron(scaled[0], scaled[1]), scaled[2])
    torch.testing.assert_close(product.trace(), sum(t.square().sum() for t in tensors) / 7)
    means = torch.stack([factor.trace() / len(factor) for factor in scaled])
    torch.testing.assert_close(means, means[:1].expand(3))


def test_one_step_is_dense_inverses_at_sampled_labels():
    model = cases.small_network(torch.float64)
    x, y = cases.small_batch(torch.float64)
    objective = cases.small_objective(model)
    epsilon, rate = 0.05, 0.1
    minibatch = objective(x, y)
    trace = minibatch.trace()
    sampled = trace.gradients(trace.outputs, minibatch.sampled_residual(trace.outputs) / len(x))
    sampled = {p: g for layer, gs in sampled.items() for p, g in zip(layer.parameters, gs, strict=True)}

    model.load_state_dict(cases.small_network(torch.float64).state_dict())
    objective.generator.manual_seed(4)
    before = {p: p.detach().clone() for p in model.parameters()}
    TNT(model.parameters(), lr=rate, damping=epsilon).step(objective(x, y))
    for p, start in before.items():
        g = sampled[p].flatten(2) if p.dim() > 2 else sampled[p]
        n, k = g.numel(), g.dim()
        c = (g.square().sum() / n) ** (1 / k)
        dense = torch.ones(1, 1).double()
        for i in range(k):
            unfolded = g.movedim(i, 0).reshape(g.shape[i], -1)
            factor = unfolded @ unfolded.T / (c ** (k - 1) * (n / g.shape[i]))
            dense = torch.kron(dense, torch.linalg.inv(factor + epsilon * torch.eye(g.shape[i])))
        torch.testing.assert_close(p.detach(), start - rate * (dense @ p.grad.flatten()).view(p.shape))


def test_kronecker_least_squares_in_one_step_of_exact_statistics():
    """Mean gradients whose covariance is exactly (S ⊗ A)/n over n draws: rate 1/n is Newton's step."""
    problem = LeastSquares()
    draws = problem.basis_draws()
    n = len(draws)
    objective = problem.objective(draws)
    optimizer = TNT(problem.model.parameters(), lr=1 / n, damping=1e-24, momentum=0.0, averaging=1 - 1 / n)
    optimizer.start(objective(problem.x, problem.y) for _ in range(n - 1))
    optimizer.step(objective(problem.x, problem.y))
    torch.testing.assert_close(problem.model.weight.detach(), problem.optimum)
