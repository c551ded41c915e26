"""LW-SGDm: SGD with momentum whose layers find their own step sizes; the rule is in ``optimizers.layerwise``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from optimizers.layerwise import Layerwise


class LWSGDm(Layerwise):
    r"""SGD with momentum and layer-wise adaptive step sizes.

    ``m ← β m + (1−β) g``,  ``d = m``,  ``θ_l ← (1 − α_l w) θ_l − α_l d_l``.

    Momentum averages, so that ``d`` is the step's own direction and slope and curvature are those of the step; in
    ``torch.optim.SGD``, which sums, the same step has the rate ``(1−β) α``. Weight decay is decoupled and scaled by the
    step size. The metric is ``M = 1−β``. What is known and what is derived: see ``optimizers.layerwise``.

    Args:
        params: parameters or parameter groups.
        momentum: ``β`` in [0, 1).
        weight_decay: ``w`` ≥ 0.
        trust: ``τ``; see ``Layerwise``.
        joint_trust: ``τ_Σ``; see ``Layerwise``.
        own: ``ω``; see ``Layerwise``.
        caution: ``χ``; see ``Layerwise``.
        warmup: see ``Layerwise``.
        growth: see ``Layerwise``.
        brake: see ``Layerwise``.
        look_back: see ``Layerwise``.
        **search: see ``Layerwise``.
    """

    def __init__(
        self,
        params: Iterable,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.02,
        joint_trust: float | None = 0.1,
        own: float = 1.0,
        caution: float = 1.5,
        warmup: int = 5,
        growth: float = 1.1,
        brake: float | None = 1.1,
        look_back: bool = False,
        **search,
    ) -> None:
        defaults = {"momentum": momentum, "weight_decay": weight_decay}
        search |= {"trust": trust, "joint_trust": joint_trust, "own": own}
        search |= {"caution": caution, "warmup": warmup, "growth": growth, "brake": brake, "look_back": look_back}
        super().__init__(params, defaults, **search)

    def _take_in(self, parameter: Tensor) -> None:
        self.buffer(parameter, "exp_avg").lerp_(parameter.grad, 1 - self.group(parameter)["momentum"])

    def _direction(self, parameter: Tensor) -> Tensor:
        return self.state[parameter]["exp_avg"]

    def _metric(self, parameter: Tensor, e: Tensor) -> Tensor:
        return (1 - self.group(parameter)["momentum"]) * e
