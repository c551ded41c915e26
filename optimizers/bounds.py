"""How long layer-wise steps may be at most; symbols and reasons are in ``optimizers.layerwise``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.averages import Averages


class Signal(NamedTuple):
    """How much of the slope is signal, and so how far a layer is believed."""

    share: Tensor
    """``s_l``, by layer"""
    whole: Tensor
    """``s``, of the whole direction's slope"""
    own: Tensor
    """``p_l``, by layer"""

    def pool(self, own: Tensor, common: Tensor) -> Tensor:
        """What is each layer's own drawn to what is common to all."""
        return own.pow(self.own) * common.pow(1 - self.own)


class Layers(NamedTuple):
    """What the bounds ask of the layers, by layer."""

    per_length: Tensor
    """``1 / ‖d_l‖``"""
    norms: Tensor
    """``max(‖θ_l‖, r_l)``"""
    shrinking: Tensor
    """``ζ / w``, where decay takes its largest part"""


class Bounds(NamedTuple):
    """The bounds; see ``optimizers.layerwise.Layerwise`` for the arguments."""

    trust: float
    joint_trust: float | None
    caution: float
    warmup: int
    growth: float
    brake: float | None
    stretch: float
    head_start: float

    def __call__(self, sizes: Tensor, signal: Signal, layers: Layers, search: Averages) -> Tensor:
        """The step sizes within warm-up, trust, shrinkage, growth and stretch."""
        sizes = sizes * (search["moved"] / self.warmup).clamp(max=1.0)
        longest = self._longest(signal, layers)
        sizes = self._together(torch.minimum(sizes, longest), layers)
        sizes = torch.minimum(sizes, layers.shrinking)
        ceiling = search.get("ceiling", torch.full_like(sizes, torch.inf))
        sizes = self._unstretched(torch.minimum(sizes, ceiling), layers.per_length, search)
        head_start = self.head_start * (not search.settled)
        grown = self._pace(search) * sizes + (self.growth - 1) * head_start * longest.nan_to_num(posinf=0.0)
        # half the last ceiling at least: a step that fell to zero must be able to grow again
        ceiling = torch.maximum(grown, ceiling.nan_to_num(posinf=0.0) / 2)
        ceiling = ceiling.masked_fill(ceiling == 0, torch.inf)  # no gradient has reached the layer yet
        search.remember("ceiling", ceiling)
        return sizes * search["resolved"]  # of this batch alone, so not remembered

    def _longest(self, signal: Signal, layers: Layers) -> Tensor:
        """The step sizes that ``τ`` allows."""
        own = signal.share**self.caution * layers.norms * layers.per_length
        common = signal.whole**self.caution * _length(layers.norms) / layers.per_length.reciprocal().norm()
        return self.trust * signal.pool(own, common)

    def _together(self, sizes: Tensor, layers: Layers) -> Tensor:
        """The step sizes within ``τ_Σ``."""
        if self.joint_trust is None:
            return sizes
        relative = sizes / (layers.norms * layers.per_length)
        return sizes * (self.joint_trust / relative.sum()).clamp(max=1.0)

    def _unstretched(self, sizes: Tensor, per_length: Tensor, search: Averages) -> Tensor:
        """Step sizes that make no step longer than ``stretch`` times the average of the last ones."""
        usual = search.get("usual_length", torch.zeros_like(sizes))
        sizes = torch.where(usual > 0, torch.minimum(sizes, self.stretch * usual * per_length), sizes)
        length = sizes / per_length
        weight = 1 - search.past**2  # half as long a memory as the other averages
        search.remember("usual_length", torch.where(usual > 0, usual.lerp(length, weight), length))
        return sizes

    def _pace(self, search: Averages) -> Tensor:
        """By what factor step sizes may grow, or have to shrink."""
        growth = torch.full_like(search["loss"], self.growth)
        if self.brake is None:
            return growth
        risen = search.rise().clamp(0, 1)
        braking = self.brake**risen
        search.remember("braked", torch.where(risen > 0, search.get("braked", 1.0) * braking, 1.0))
        return growth ** (1 - risen) / braking


def _length(norms: Tensor) -> Tensor:
    """``‖θ‖`` by the layers' norms; unlimited if there is none but of layers that are not limited."""
    length = norms.masked_fill(norms.isinf(), 0.0).norm()
    return length.masked_fill(length == 0, torch.inf)
