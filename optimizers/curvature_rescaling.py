r"""Steps rescaled by the curvature along them, by second-order automatic differentiation.

After *Adaptive scaling of the learning rate by second order automatic differentiation* (de Gournay, Gossard,
arXiv:2210.14520). The abstract says: rescale a direction ``u`` by the *curvature* ``c(u) = ⟨Hu, u⟩``, which costs less
than a Hessian–vector product: with one gradient at (1C, 1M) of time and memory, (1.5C, 2M) or (2C, 1M) in all; the user
chooses between exploration and convergence. What follows is derived:

    θ ← θ − ℓ τ u,     τ = max(N, 0) / D,     N, D: averages of ⟨g, u⟩ / ‖u‖² and |c(u)| / ‖u‖².

``τ`` minimises ``f − τ ⟨g, u⟩ + ½ τ² c(u)``. ``ℓ = 1`` goes to that minimum (convergence), ``ℓ = ½`` gets ¾ of its
decrease, ``ℓ → 2`` is the border of decrease (exploration). Negative curvature counts by its magnitude, which keeps the
step finite; numerator and denominator are averaged apart, because the average of a ratio of noisy numbers is not the
ratio, and per length, because ``u`` changes length.

How ``c(u)`` is had, and what it costs, is ``optimizers.tangent``'s matter. The first step compares it with a
Hessian–vector product: a smooth *function* called inside a ``forward`` can not be seen from outside.

=========  =============  ==========================================================================
symbol     argument       meaning
=========  =============  ==========================================================================
``ℓ``      ``lr``         dimensionless; 1 convergence, near 2 exploration; schedulers may decay it
–          ``averaging``  weight of the past in ``N`` and ``D``; 0: this batch alone
–          ``recompute``  False: (5/3 C, 2M); True: (2C, 1M), by count of products
=========  =============  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optimizers.layered import LayeredOptimizer, check, dot
from optimizers.objective import Minibatch
from optimizers.tangent import Curvature, named_where_missing


class CurvatureRescaling(LayeredOptimizer):
    """The rescaling; a subclass defines the direction by ``_direction``.

    Args:
        params: parameters or parameter groups.
        defaults: the direction's own options, per group, with ``lr`` and ``weight_decay``.
        averaging: in [0, 1).
        recompute: see the module's table.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, params: Iterable, defaults: dict, averaging: float = 0.9, recompute: bool = False) -> None:
        check(0 <= averaging < 1, "averaging", averaging, "in [0, 1)")
        super().__init__(params, defaults)
        self.averaging, self.recompute = averaging, recompute

    @torch.no_grad()
    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``; returns the mean loss before it, detached.

        Raises:
            RuntimeError: at the first step, for a model whose curvature can not be seen whole; see the module.
            NotImplementedError: a derivative that torch does not have.
        """
        self.find_layers(closure)
        curvature = Curvature(closure, self.recompute)
        gradients = {p: self.decayed_gradient(p) for layer in self._layers for p in layer.parameters}
        u = {p: self._direction(p, g) for p, g in gradients.items()}
        with named_where_missing():
            c = curvature(u)
            if not self._averages:
                curvature.check(u, c)
        for group in self.param_groups:  # the decay's own curvature
            chosen = [u[p] for p in group["params"] if p in u]
            if chosen and group["weight_decay"]:
                c = c + group["weight_decay"] * dot(chosen, chosen)
        step_size = self._step_size(dot(gradients.values(), u.values()), c, dot(u.values(), u.values()))
        for p, d in u.items():
            p.sub_(self.group(p)["lr"] * step_size * d)
        return curvature.loss

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """Of all layers together: ``step_size`` (ℓ included), averaged ``slope`` and ``curvature`` per length.

        ``skipped``: batches so far whose slope or curvature was not finite; they are left out of the averages.
        """
        averages = self._averages
        if not averages:
            return {}
        quantities = {"step_size": self.param_groups[0]["lr"] * averages["step_size"], "skipped": averages["skipped"]}
        return {"all": quantities | {name: averages[name] / averages["weight"] for name in ("slope", "curvature")}}

    @property
    def _averages(self) -> dict[str, Tensor]:
        """``N`` and ``D``, kept with the first parameter's state so that ``state_dict`` carries them."""
        return self.state[self.first].setdefault("averages", {})

    def _step_size(self, slope: Tensor, curvature: Tensor, squared_length: Tensor) -> Tensor:
        """``τ``; the averages start at zero, a bias that cancels in their ratio."""
        tiny = torch.finfo(slope.dtype).tiny
        averages, per_length = self._averages, 1 / squared_length.clamp_min(tiny)
        now = {"slope": slope * per_length, "curvature": curvature.abs() * per_length, "weight": torch.ones_like(slope)}
        finite = torch.stack([value.isfinite() for value in now.values()]).all()
        for name, value in now.items():
            past = averages.get(name, torch.zeros_like(value))
            averages[name] = torch.where(finite, (1 - self.averaging) * value + self.averaging * past, past)
        averages["skipped"] = averages.get("skipped", 0) + ~finite
        averages["step_size"] = averages["slope"].clamp_min(0) / averages["curvature"].clamp_min(tiny)
        return averages["step_size"]

    def _direction(self, p: Tensor, gradient: Tensor) -> Tensor:
        """``u`` of one parameter; takes what averages it keeps one step further."""
        raise NotImplementedError


class RescaledSGD(CurvatureRescaling):
    r"""Along SGD's direction, ``v ← β v + g``, ``u = v``.

    Args:
        params: parameters or parameter groups.
        lr: ``ℓ``.
        momentum: ``β`` in [0, 1).
        weight_decay: ``w`` ≥ 0, of ``½ w ‖θ‖²`` added to the loss; its gradient and curvature count.
        **rescaling: see ``CurvatureRescaling``.
    """

    def __init__(
        self, params: Iterable, lr: float = 1.0, momentum: float = 0.0, weight_decay: float = 0.0, **rescaling
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, **rescaling)

    def _direction(self, p: Tensor, gradient: Tensor) -> Tensor:
        beta = self.group(p)["momentum"]
        if not beta:
            return gradient
        return self.buffer(p).mul_(beta).add_(gradient)


class RescaledAdam(CurvatureRescaling):
    r"""Along Adam's direction, ``u = m̂ / (√v̂ + ε)``.

    Args:
        params: parameters or parameter groups.
        lr: ``ℓ``.
        betas: ``(β₁, β₂)``, each in [0, 1).
        eps: ``ε`` > 0.
        weight_decay: ``w`` ≥ 0, of ``½ w ‖θ‖²`` added to the loss; its gradient and curvature count.
        **rescaling: see ``CurvatureRescaling``.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **rescaling,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}, **rescaling
        )

    def _direction(self, p: Tensor, gradient: Tensor) -> Tensor:
        (beta1, beta2), state = self.group(p)["betas"], self.state[p]
        if "step" not in state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(self.group(p)["eps"])
        return state["exp_avg"] / (1 - beta1 ** state["step"]) / scale
