"""The quadratic model along the line of a layer-wise step; symbols and reasons are in ``optimizers.layerwise``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Line(NamedTuple):
    """What one batch says of the line that a step goes along."""

    per_length: Tensor
    """``1 / ‖d_l‖``"""
    curvature: Tensor | None
    """``Q``; None where it was not measured"""
    slope: Tensor | None = None
    """``ρ'``, by layer, noise and weight decay included"""
    start: Tensor | None = None
    """the loss where it starts"""
    end: Tensor | None = None
    """the loss where it leads"""

    def curvatures(self, sizes: Tensor, rounding: Tensor) -> Tensor:
        """The loss's and the model's curvature along a step of ``sizes``, per squared length of it: a pair.

        The model has to be believed where the losses' difference is ``rounding``.
        """
        squared_length = (sizes / self.per_length).square().sum().clamp_min(torch.finfo(sizes.dtype).tiny)
        seen = 2 * (self.end - self.start + self.slope @ sizes) / squared_length
        modelled = sizes @ self.curvature @ sizes / squared_length
        return torch.stack([seen.where(modelled * squared_length / 2 > rounding, modelled), modelled])


def minimiser(slope: Tensor, curvature: Tensor, lengths: Tensor) -> Tensor:
    """The multiple of the layers' ``lengths`` that minimises the model, ``ρᵀℓ / ℓᵀKℓ``; 1 where it has no minimum."""
    along = lengths @ curvature @ lengths
    return torch.where(along > 0, slope @ lengths / along, 1.0)


def inverse(lengths: Tensor) -> Tensor:
    """``1/‖d‖``, finite, and so its square."""
    return 1 / lengths.clamp_min(torch.finfo(lengths.dtype).tiny ** 0.5)
