"""The quasi-Newton updates of K-BFGS, on the device throughout: guards choose values, they never wait."""

from __future__ import annotations

import torch
from torch import Tensor

POWELL = 0.2
LEAST_CURVATURE = 1e-4


def bfgs(h: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """``(I − ρsyᵀ) H (I − ρysᵀ) + ρssᵀ``, ``ρ = 1/sᵀy``: the inverse Hessian that maps ``y`` to ``s``.

    >>> bfgs(torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
    tensor([[0.2500, 0.0000],
            [0.0000, 1.0000]])
    """
    rho, hy = 1 / (s @ y), h @ y
    cross = torch.outer(s, hy)
    return h + torch.outer((rho**2 * (y @ hy) + rho) * s, s) - rho * (cross + cross.T)


def lbfgs(s: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """``H V`` of BFGS from ``I`` by pairs ``(memory, n)``, oldest first, in products: the two loops, solved at once.

    A pair of zeros is no pair. ``V``: ``(n,)`` or ``(n, k)``.
    """
    columns = v if v.dim() > 1 else v[:, None]
    products = s @ y.T
    curvature = products.diagonal()
    r = products.triu() + torch.diag((curvature == 0).to(v))
    first = torch.linalg.solve_triangular(r, s @ columns, upper=True)
    rest = columns - y.T @ first
    second = torch.linalg.solve_triangular(r.T, curvature[:, None] * first - y @ rest, upper=False)
    return (rest + s.T @ second).view_as(v)


def double_damping(s: Tensor, y: Tensor, hy: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Double damping: ``s`` and ``y`` with ``sᵀy ≥ √λ sᵀs``, and whether either was changed.

    (i) Where ``sᵀy ≤ 0.2 yᵀHy``: ``s ← θs + (1−θ)Hy``, so that ``sᵀy = 0.2 yᵀHy``. (ii) Where ``sᵀy ≤ √λ sᵀs``:
    ``y ← θy + (1−θ)s``, so that ``sᵀy = √λ sᵀs``. The pair is returned in units of ``‖s‖``: updates do not depend on
    a pair's scale, and products of tiny numbers leave single precision.

    Args:
        s: ``(n,)``.
        y: ``(n,)``.
        hy: ``H y``.
        damping: ``√λ`` in (0, 1).
    """
    scale = s.norm()
    s, y, hy = s / scale, y / scale, hy / scale
    sy, yhy = s @ y, y @ hy
    powell = sy <= POWELL * yhy
    theta = torch.where(powell, (1 - POWELL) * yhy / (yhy - sy), 1)
    s = theta * s + (1 - theta) * hy
    scale = s.norm()
    s, y = s / scale, y / scale
    sy = s @ y
    marquardt = sy <= damping
    theta = torch.where(marquardt, (1 - damping) / (1 - sy), 1)
    return s, theta * y + (1 - theta) * s, powell | marquardt


def is_good(s: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    """Whether BFGS may take the pair: ``sᵀy > 0``, ``sᵀy > 10⁻⁴ ‖s‖² ‖mean‖``, and finite."""
    sy = s @ y
    return (sy > 0) & (sy > LEAST_CURVATURE * (s @ s) * mean.norm()) & sy.isfinite()
