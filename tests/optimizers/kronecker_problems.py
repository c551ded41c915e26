"""Least squares whose Hessian is a Kronecker product, and labels drawn to order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.likelihoods import Gaussian
from optimizers import Objective


class Prescribed(Gaussian):
    """``½ (z − y)ᵀ S (z − y)`` with residuals 'at sampled labels' that are given in advance, one after another."""

    def __init__(self, precision: Tensor, draws: list[Tensor]) -> None:
        self.precision, self.draws = precision, list(draws)

    def nll(self, outputs, targets):
        difference = outputs - targets
        return ((difference @ self.precision) * difference).sum(1) / 2

    def residual(self, outputs, targets):
        return (outputs - targets) @ self.precision

    def sampled_residual(self, outputs, generator=None):
        return self.draws.pop(0)

    def hessian_product(self, outputs, v):
        return v @ self.precision


def square_root(matrix: Tensor, exponent: float = 0.5) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


class LeastSquares:
    """A linear model of ``m`` examples: the Hessian is ``S ⊗ A``, ``A = (1/m) Σ a aᵀ``; optimum known, loss zero."""

    def __init__(self, m: int = 40, inputs: int = 5, outputs: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x = randn(m, inputs) @ torch.diag(torch.logspace(-1, 1, inputs, dtype=torch.float64))
        self.optimum = randn(outputs, inputs)
        self.y = self.x @ self.optimum.T
        root = randn(outputs, outputs)
        self.s, self.a = root @ root.T + 0.1 * torch.eye(outputs), self.x.T @ self.x / m
        self.model = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
        orthogonal = torch.linalg.qr(randn(m, outputs))[0] * m**0.5
        self.exact_draw = orthogonal @ square_root(self.s)  # (1/m) Σ δ δᵀ = S

    def basis_draws(self) -> list[Tensor]:
        """``δ`` whose mean gradients are ``S^½ e_k e_lᵀ A^½``: over all their covariance is ``S ⊗ A`` exactly."""
        left, right = square_root(self.s), self.x @ square_root(self.a, -0.5)
        return [torch.outer(right[:, j], left[:, k]) for k in range(len(self.s)) for j in range(len(self.a))]

    def objective(self, draws: list[Tensor]) -> Objective:
        return Objective(self.model, Prescribed(self.s, draws))
