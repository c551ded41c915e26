"""AdaHessian on a minibatch; the optimizer is ``pytorch_optimizer``'s.

That package differentiates ``.grad`` again, for Hutchinson's estimate of the Hessian's diagonal, and so wants gradients
that carry their graph, which the usual closure does not leave. Here they are taken by ``torch.autograd.grad``, and let
go of once the step is made: ``loss.backward(create_graph=True)`` would keep parameter, gradient and graph in a cycle
that no reference count frees.
"""

from __future__ import annotations

import pytorch_optimizer
import torch
from torch import Tensor

from optimizers.layers import ACTIVATION_BACKWARD, FORWARD, HESSIAN_VECTOR_PRODUCT, WEIGHT_GRADIENT
from optimizers.objective import Minibatch


class AdaHessian(pytorch_optimizer.AdaHessian):
    """``pytorch_optimizer.AdaHessian``; arguments as there.

    Of a batch in parts the last one gives the estimate, of one that ranks share the mean of all; clipping is of the
    gradient alone.
    """

    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``; returns the mean loss before it, detached."""
        if not isinstance(closure, Minibatch):
            raise TypeError(f"AdaHessian.step needs objective(inputs, targets), not {type(closure).__name__}")
        if self.param_groups[0].get("step", 0) % self.update_period:  # a step that estimates nothing
            return super().step(closure)
        closure.count(FORWARD + ACTIVATION_BACKWARD + WEIGHT_GRADIENT + self.num_samples * HESSIAN_VECTOR_PRODUCT)
        with torch.enable_grad():
            loss = closure.loss(closure.objective.model(*closure.inputs))
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._estimate(loss, [p for p in parameters if p.requires_grad])
        hessian = [self.state[p].get("hessian", torch.zeros_like(p)) for p in parameters]
        loss = closure.finish(loss.detach())
        super().step(hessian=[closure.mean(h) for h in hessian])
        return loss

    def _estimate(self, loss: Tensor, parameters: list[Tensor]) -> None:
        """Fill ``.grad``, None where the loss does not depend on it, and the estimates, which are the package's."""
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        try:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            self.zero_hessian(self.param_groups, self.state)
            self.compute_hutchinson_hessian(self.param_groups, self.state, self.num_samples, 1.0, self.distribution)
        finally:
            for p in parameters:
                p.grad = None if p.grad is None else p.grad.detach()
