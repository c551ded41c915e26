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
    """``pytorch_optimizer.AdaHessian``; arguments as there."""

    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``; returns the mean loss before it, detached."""
        if self.param_groups[0].get("step", 0) % self.update_period:  # a step that estimates nothing
            return super().step(closure)
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        closure.count(FORWARD + ACTIVATION_BACKWARD + WEIGHT_GRADIENT + self.num_samples * HESSIAN_VECTOR_PRODUCT)
        with torch.enable_grad():
            loss = closure.loss(closure.objective.model(*closure.inputs))
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        try:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            super().step()
        finally:
            for p in parameters:
                p.grad = p.grad.detach()
        return loss.detach()
