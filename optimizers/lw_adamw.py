"""LW-AdamW: AdamW whose layers find their own step sizes; the rule is in ``optimizers.layerwise``."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from optimizers.layerwise import Layerwise


class LWAdamW(Layerwise):
    r"""AdamW with layer-wise adaptive step sizes.

    ``m ← β₁m + (1−β₁)g``, ``v ← β₂v + (1−β₂)g²``,  ``d = m̂ / (√v̂ + ε)``,  ``θ_l ← (1 − α_l w) θ_l − α_l d_l``.

    Weight decay is decoupled and scaled by the step size, as in ``torch.optim.AdamW``. The metric is approximate: ``M =
    (1−β₁)/(1−β₁ᵗ) / (√v̂' + ε)``, where ``v̂'`` is ``v̂`` with ``e`` in it, so that no entry whose gradient happened to be
    nearly zero counts without bound in the first steps.

    Args:
        params: parameters or parameter groups.
        betas: ``(β₁, β₂)``, each in [0, 1).
        eps: ``ε`` > 0.
        weight_decay: ``w`` ≥ 0.
        trust: ``τ``; see ``Layerwise``.
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        trust: float = 0.05,
        own: float = 0.1,
        caution: float = 2.0,
        warmup: int = 20,
        growth: float = 1.05,
        brake: float | None = 1.05,
        look_back: bool = True,
        **search,
    ) -> None:
        defaults = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        search |= {"trust": trust, "own": own, "caution": caution, "warmup": warmup, "growth": growth, "brake": brake}
        search |= {"look_back": look_back}
        super().__init__(params, defaults, **search)

    def _count(self) -> tuple[Hashable, dict[str, float]]:
        """Bias corrections, by age and group: of parameters that were frozen for a while they are others."""
        self._ages, known = {}, {}
        for p in self._parameters:
            state, group = self.state[p], self.group(p)
            state["step"] = state.get("step", 0) + 1
            self._ages[p] = known.setdefault((state["step"], *group["betas"], group["eps"]), len(known))
        numbers = {}
        for (step, beta1, beta2, eps), age in known.items():
            first, root = 1 - beta1**step, (1 - beta2**step) ** 0.5
            for name, divisor in (("direction", first), ("metric", first / (1 - beta1))):
                numbers |= {f"{name}_scale_{age}": divisor / root, f"{name}_shift_{age}": divisor * eps}
        return tuple(self._ages.values()), numbers

    def _take_in(self, parameter: Tensor) -> None:
        (beta1, beta2), g = self.group(parameter)["betas"], parameter.grad
        self.buffer(parameter, "exp_avg").lerp_(g, 1 - beta1)
        self.buffer(parameter, "exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)

    def _direction(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        return self._preconditioned("direction", parameter, state["exp_avg"], state["exp_avg_sq"].sqrt())

    def _metric(self, parameter: Tensor, e: Tensor) -> Tensor:
        beta2, state = self.group(parameter)["betas"][1], self.state[parameter]
        second_moment = state["exp_avg_sq"].addcmul(e, e, value=1 - beta2)
        return self._preconditioned("metric", parameter, e, second_moment.sqrt_())

    def _preconditioned(self, name: str, parameter: Tensor, x: Tensor, root: Tensor) -> Tensor:
        """``x / (divisor (√v̂ + ε))``, in the place of ``root``, which is ``√v``: a single copy of the parameter."""
        age = self._ages[parameter]
        root.mul_(self._numbers[f"{name}_scale_{age}"]).add_(self._numbers[f"{name}_shift_{age}"])
        return torch.div(x, root, out=root)
