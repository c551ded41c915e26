r"""GeN: one step size for all layers, at the minimum of a parabola through the loss at three points.

After *Gradient descent with generalized Newton's method* (Bu, Xu, arXiv:2407.02772, ICLR 2025). Along the direction
``d`` of any first-order method the minimiser of the loss's quadratic model is ``η* = gᵀd / dᵀHd``. Both are read off
three losses, so that forward passes are all it costs:

    η* = η/2 · (L₋ − L₊) / (L₊ − 2 L₀ + L₋),     L₀ = L(θ),  L± = L(θ ∓ η d).

Every ``Φ`` steps, where slope and curvature come out positive, the rate takes a part of the way to it:

    η ← γ η + (1 − γ) min(max(η*, η/2), 2η).

As in the authors' package (``gen-optim``, whose function takes the training loop's own data iterator and so fits no
optimizer's ``step``) the line is that of the step just taken and the losses are those of the next minibatch, which had
no part in ``d``: its noise is not taken for slope. The smoothing, its bounds and ``γ`` are that package's; its fit's
test of goodness says nothing of three points, and is left out. The rate that it starts with is the method's own
default, up to four hundred times below the tuned one of a task here, and grows by a tenth every ``Φ`` steps at most.

======  =============  ======================================================
symbol  argument       meaning
======  =============  ======================================================
``η``   ``lr``         the first rate; from then on found
``Φ``   ``every``      steps between measurements; 8 costs an eighth gradient
``γ``   ``averaging``  weight of the rate that was
======  =============  ======================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from optimizers.layered import check
from optimizers.objective import Minibatch
from optimizers.replay import RandomState


class GeN(torch.optim.Optimizer):
    """The search; put before a ``torch.optim`` method, whose steps it scales.

    Args:
        params: parameters or parameter groups.
        every: ``Φ`` ≥ 1.
        averaging: ``γ`` in [0, 1).
        **descent: arguments of the method that takes the steps.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, params: Iterable, every: int = 8, averaging: float = 0.9, **descent) -> None:
        check(every >= 1 and every == int(every), "every", every, "a whole number, at least 1")
        check(0 <= averaging < 1, "averaging", averaging, "in [0, 1)")
        super().__init__(params, **descent)
        self.every, self.averaging = every, averaging
        self.param_groups[0]["taken"] = 0  # steps, where ``state_dict`` carries them

    def __getstate__(self) -> dict:
        """For copies and pickles: torch's keeps no settings."""
        return super().__getstate__() | {"every": self.every, "averaging": self.averaging}

    @torch.no_grad()
    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``; returns the mean loss before it, detached.

        Waits for the device once every ``Φ`` steps, to read three losses.

        Raises:
            TypeError: the closure is not a minibatch of an ``optimizers.Objective``.
        """
        if not isinstance(closure, Minibatch):
            raise TypeError(
                f"{type(self).__name__}.step needs a minibatch that can be evaluated again, not "
                f"{type(closure).__name__}: objective = Objective(model, likelihood) once, then "
                "optimizer.step(objective(inputs, targets))"
            )
        if "before" in self.state[self._parameters()[0]]:
            self._search(closure)
        self.param_groups[0]["taken"] += 1
        kept = self._parameters() if self.param_groups[0]["taken"] % self.every == 0 else []
        before = [p.clone() for p in kept]
        loss = super().step(closure)
        for p, start in zip(kept, before, strict=True):  # once the method has made its own state
            self.state[p]["before"] = start
        return loss

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Of all layers together: ``step_size``."""
        return {"all": {"step_size": self.param_groups[0]["lr"]}}

    def _search(self, minibatch: Minibatch) -> None:
        """Measure along the last step, and change the groups' rates by one factor."""
        try:
            ahead, start, behind = self._losses(minibatch).tolist()
        except ArithmeticError:  # a model that refuses outputs that are not finite, somewhere along the line
            return
        slope, curvature = (behind - ahead) / 2, ahead - 2 * start + behind  # η from the last step's start on is 1
        if math.isfinite(slope) and slope > 0 and curvature > 0:
            best = min(max(slope / curvature, 0.5), 2.0)
            for group in self.param_groups:
                group["lr"] *= self.averaging + (1 - self.averaging) * best

    def _losses(self, minibatch: Minibatch) -> Tensor:
        """``(L₊, L₀, L₋)`` about the last step's start, under the same dropout masks; parameters end as they were."""
        parameters = [p for p in self._parameters() if "before" in self.state[p]]
        now = [p.clone() for p in parameters]
        before = [self.state[p].pop("before") for p in parameters]
        random_state, losses = RandomState(parameters[0].device), []
        try:
            for towards in (1.0, 0.0, -1.0):
                for p, start, end in zip(parameters, before, now, strict=True):
                    torch.lerp(start, end, towards, out=p)
                with random_state.replayed():
                    losses.append(minibatch.evaluate())
        finally:
            for p, end in zip(parameters, now, strict=True):
                p.copy_(end)
        return torch.stack(losses)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]


class GeNSGD(GeN, torch.optim.SGD):
    """GeN on ``torch.optim.SGD``, momentum included; arguments as there and in ``GeN``."""


class GeNAdamW(GeN, torch.optim.AdamW):
    """GeN on ``torch.optim.AdamW``; arguments as there and in ``GeN``."""
