r"""Layer-specific adaptive learning rates (Singh, De, Zhang, Goldstein, Taylor, arXiv:1510.04609).

    t_l = t (1 + log(1 + 1/‖g_l‖₂))

multiplies the scheduled rate ``t`` of any first-order method: layers with small gradients, near the input or at saddle
points, get longer steps. The norm is over all of a layer's parameters: **weight and bias share one norm and one rate**
(the paper's "gradient in the l-th layer"; that its code did so too is not known). Three methods carry it here, as in
the paper: SGD and Nesterov's method in ``LayerSpecificSGD``, AdaGrad in ``LayerSpecificAdaGrad``.

Derived, not read: momentum follows Caffe, the framework of the paper's experiments, where the rate multiplies a
gradient as it *enters* the buffer; weight decay is part of ``g_l``, norm included, for it is part of the function that
is minimised; a gradient of zero gets a finite rate (the logarithm of the smallest normal number).

======  ============  ================================================
symbol  argument      meaning
======  ============  ================================================
``t``   ``lr``        rate of a layer whose gradient is large
======  ============  ================================================
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optimizers.layered import LayeredOptimizer, check
from optimizers.layers import Layer
from optimizers.objective import Minibatch


def rate_multiplier(norm: Tensor) -> Tensor:
    """``1 + log(1 + 1/‖g‖)``.

    >>> rate_multiplier(torch.tensor([1.0, 0.1, 0.01, 0.001]))
    tensor([1.6931, 3.3979, 5.6151, 7.9088])
    """
    return 1 + torch.log1p(1 / norm.clamp_min(torch.finfo(norm.dtype).tiny))


class LayerSpecific(LayeredOptimizer):
    """The rates; a subclass defines the method by ``_move``."""

    def __init__(self, params: Iterable, defaults: dict) -> None:
        super().__init__(params, defaults)
        self._multipliers: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``; returns the mean loss before it, detached."""
        known = self._layers
        layers = self.find_layers(closure)
        loss = self.fill_gradients(closure)
        gradients = [[self.decayed_gradient(p) for p in layer.parameters] for layer in layers]
        norms = torch.stack([torch.stack(torch._foreach_norm(gs)).norm() for gs in gradients])
        if self._multipliers is None or layers is not known:
            self._multipliers = torch.empty_like(norms)
        self._multipliers.copy_(rate_multiplier(norms))  # in one place, for steps that are captured
        for layer, gs, multiplier in zip(layers, gradients, self._multipliers.unbind(), strict=True):
            for p, g in zip(layer.parameters, gs, strict=True):
                self._move(p, g, self.group(p)["lr"] * multiplier)
        return loss

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """By layer: ``step_size``, the last step's rate."""
        if self._multipliers is None:
            return {}
        return {layer.name: {"step_size": self._rate(i, layer)} for i, layer in enumerate(self._layers)}

    def _rate(self, i: int, layer: Layer) -> Tensor:
        return self.group(layer.parameters[0])["lr"] * self._multipliers[i]

    def _move(self, p: Tensor, g: Tensor, rate: Tensor) -> None:
        """The step of one parameter, in place."""
        raise NotImplementedError


class LayerSpecificSGD(LayerSpecific):
    r"""SGD: ``v ← β v + t_l g_l``, ``θ ← θ − v``; Nesterov's method: ``θ ← θ − (t_l g_l + β v)``.

    Args:
        params: parameters or parameter groups.
        lr: ``t``.
        momentum: ``β`` in [0, 1).
        nesterov: Nesterov's method in place of heavy-ball momentum.
        weight_decay: ``w`` ≥ 0, of ``½ w ‖θ‖²`` added to the loss.
    """

    def __init__(
        self, params: Iterable, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def check_group(self, group: dict) -> None:
        super().check_group(group)
        check(
            group["momentum"] > 0 or not group["nesterov"], "momentum", group["momentum"], "positive with nesterov=True"
        )

    def _move(self, p: Tensor, g: Tensor, rate: Tensor) -> None:
        group, step = self.group(p), rate * g
        if group["momentum"]:
            v = self.buffer(p).mul_(group["momentum"]).add_(step)
            step = step.add_(v, alpha=group["momentum"]) if group["nesterov"] else v
        p.sub_(step)


class LayerSpecificAdaGrad(LayerSpecific):
    r"""AdaGrad: ``s ← s + g²``, ``θ ← θ − t_l g / (√s + ε)``.

    Args:
        params: parameters or parameter groups.
        lr: ``t``.
        eps: ``ε`` > 0.
        weight_decay: ``w`` ≥ 0, of ``½ w ‖θ‖²`` added to the loss.
    """

    def __init__(self, params: Iterable, lr: float, eps: float = 1e-10, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def _move(self, p: Tensor, g: Tensor, rate: Tensor) -> None:
        squares = self.buffer(p, "sum").addcmul_(g, g)
        p.sub_(rate * g / (squares.sqrt() + self.group(p)["eps"]))
