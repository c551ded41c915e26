"""Shampoo against dense eigendecompositions."""

import torch

from optimizers.shampoo import Shampoo
from tests.optimizers import cases
from tests.optimizers.kronecker_problems import LeastSquares, square_root


def test_one_step_is_dense_roots_of_the_gradients_second_moments():
    """Exponent −1/(2k): −1/6 on the modes of a convolution, −1/4 of a matrix, −1/2 of a vector."""
    model = cases.small_network(torch.float64)
    objective = cases.small_objective(model)
    before = [p.detach().clone() for p in model.parameters()]
    epsilon, rate = 1e-3, 0.1
    Shampoo(model.parameters(), lr=rate, damping=epsilon).step(objective(*cases.small_batch(torch.float64)))
    for p, start in zip(model.parameters(), before, strict=True):
        g = p.grad.flatten(2) if p.dim() > 2 else p.grad
        direction, modes = g, g.dim()
        for i in range(modes):
            unfolded = g.movedim(i, 0).reshape(len(g.movedim(i, 0)), -1)
            root = square_root(unfolded @ unfolded.T + epsilon * torch.eye(len(unfolded)), -1 / (2 * modes))
            direction = torch.einsum("ij,j...->i...", root, direction.movedim(i, 0)).movedim(0, i)
        torch.testing.assert_close(p.detach(), start - rate * direction.reshape(p.shape))


def test_true_labels_are_used():
    problem = LeastSquares()
    objective = problem.objective([])  # there is no draw to take
    Shampoo(problem.model.parameters(), lr=0.01, damping=1e-4).step(objective(problem.x, problem.y))
