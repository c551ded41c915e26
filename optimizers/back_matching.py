r"""Layer-wise rates from back-matching propagation: scale-amended SGD.

After *Train Feedforward Neural Network with Layer-wise Adaptive Rate via Approximating Back-matching Propagation*
(Zhang, Chen, Liu, arXiv:1802.09750). The abstract says: match a layer's backward value by least squares on its
parameters and on its input; with approximations this is SGD with a layer-wise rate. What follows is derived.

To move a layer's output by ``Δz`` at every example, least squares wants its parameters to move by ``(JᵀJ)⁻¹ Jᵀ Δz`` and
its input by ``(AᵀA)⁻¹ Aᵀ Δz``, with ``J`` and ``A`` the derivatives of ``z`` by the parameters and by the input. Where
``JᵀJ`` and ``AᵀA`` are taken for multiples of the identity with the same trace, both are back-propagation's ``JᵀΔz``
and ``AᵀΔz``, rescaled by ``q_l`` and by ``1/m_k``:

    lr_l = lr · q_l · Π_{k behind l} 1/m_k,      m_k = ‖A_k‖_F² / n_in,      q_l = m · P_l / ‖J_l‖_F²,

(``n_in`` inputs of the map, ``P_l`` parameters, ``m`` examples). By kind of map, as in the paper where ``*``:

=====================================  ========================================================================
map                                    ``m_k``
=====================================  ========================================================================
fully connected, ``W``                 ``‖W‖_F² / n_in``  *
convolution                            ``‖W‖_F² / (c_in · stride²)``  *, away from the border
ReLU                                   the share of active units, ½ for symmetric inputs  *
BatchNorm                              ``mean (γ/σ)²``  *, less what its statistics take away: ``O(1/examples)``
skip block                             ``1 + m_branch``  *
average pooling of ``k × k``           ``1/k⁴``
max pooling                            outputs / inputs
graph propagation, ``n`` nodes         ``‖Â‖_F² / n``
parameters of a fully connected layer  ``q = (n_in + 1) / (mean ‖a‖² + 1)``, the inverse second moment of ``[a;1]``
=====================================  ========================================================================

None of these is coded: **all are measured at once**, for any architecture. Random signs ``ε`` have ``E ‖Aᵀε‖² =
‖A‖_F²``, so a backward pass that starts from random signs at the outputs, and at every layer replaces what arrives by
*fresh* random signs of the same mean square, arrives at layer ``l`` with mean square ``Π m_k``; fresh signs at a skip
block's branch are independent of those beside it, so the two add up. From the same signs ``‖J_lᵀε‖²`` gives ``q_l``.
Both are averaged over measurements, at the first ``settling`` steps and then one in ``every``; one costs two thirds of
a gradient.

**Where the premise fails.** A multiple of the identity with the same trace has the *mean* eigenvalue; what a step of
one rate survives is the *largest*. Inputs that are not centred put most of ``E āāᵀ``'s trace in one eigenvalue, and
weights that have learnt carry signals in few directions. At ``lr = 1`` the rate times the layer's largest Gauss–Newton
eigenvalue, 1 where the premise holds, was measured after 60 steps of SGD with momentum: 0.005 to 0.3 over the layers of
the BatchNorm CNN on digits, but 21 (last layer) to 2·10⁶ (first) over those of the small CURVES autoencoder, and 220 in
the first layer of a GCN. So these nets want an ``lr`` far below 1, which the configs' search spaces reach down to.

The rate is per layer, weight and bias together. ``v ← β v + lr_l (g + w θ)``, ``θ ← θ − v``. It is not LARS, although
one framework's LARS cites this paper.

======  ================  ==========================================================
symbol  argument          meaning
======  ================  ==========================================================
``lr``  ``lr``            1 moves outputs by their derivative, if layers moved alone
``β``   ``momentum``      rates multiply gradients as they enter the buffer
–       ``every``         steps between measurements
–       ``settling``      first steps, all of which are measured
–       ``averaging``     weight of the past in ``Π m_k`` and ``1/q_l``
======  ================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optimizers.layered import LayeredOptimizer, check
from optimizers.layers import WEIGHT_GRADIENT, Layer
from optimizers.objective import Minibatch
from optimizers.trace import Call, Trace


class BackMatching(LayeredOptimizer):
    """SGD with momentum and back-matching rates; see the module.

    Args:
        params: parameters or parameter groups.
        lr: ≥ 0.
        momentum: ``β`` in [0, 1).
        weight_decay: ``w`` ≥ 0, of ``½ w ‖θ‖²`` added to the loss.
        every: steps between measurements of the factors, at least 1.
        settling: the first steps, all of which are measured; at least 0.
        averaging: in [0, 1).

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        every: int = 10,
        settling: int = 10,
        averaging: float = 0.9,
    ) -> None:
        check(every >= 1, "every", every, "at least 1")
        check(settling >= 0, "settling", settling, "at least 0")
        check(0 <= averaging < 1, "averaging", averaging, "in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.every, self.settling, self.averaging = every, settling, averaging

    @torch.no_grad()
    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``; returns the mean loss before it, detached."""
        layers, rates = self.find_layers(closure), self._rates
        if rates.setdefault("layers", self.layer_names) != self.layer_names:  # others train than before
            rates.clear()
            rates.update(step=0, layers=self.layer_names)
        if rates["step"] < self.settling or rates["step"] % self.every == 0:
            trace = closure.trace()
            loss = closure.fill_gradients(trace, retain_graph=True)
            self._average(*backward_gains(closure, trace))
        else:
            loss = self.fill_gradients(closure)
        rates["step"] += 1
        for layer, rate in zip(layers, rates["rate"].unbind(), strict=True):
            for p in layer.parameters:
                self._move(p, rate)
        return loss

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """By layer: ``step_size``, the present rate; ``skipped``, measurements left out as they were not finite."""
        rates = self._rates
        if "rate" not in rates:
            return {}
        return {
            layer.name: {
                "step_size": self.group(layer.parameters[0])["lr"] * rates["rate"][i],
                "skipped": rates["skipped"][i],
            }
            for i, layer in enumerate(self._layers)
        }

    @property
    def _rates(self) -> dict:
        """The averages, kept with the first parameter's state so that ``state_dict`` carries them."""
        return self.state[self.first].setdefault("rates", {"step": 0})

    def _average(self, propagated: Tensor, parameters: Tensor) -> None:
        """Take one measurement into the averages; ``rate`` is ``q_l Π 1/m_k``."""
        rates = self._rates
        finite = propagated.isfinite() & parameters.isfinite()
        counts = finite & (propagated > 0) & (parameters > 0)  # a layer may not have been called, or not be reached
        rates["skipped"] = rates.get("skipped", 0) + (~finite).to(propagated.dtype)
        rates["measured"] = rates.get("measured", 0) + counts.to(propagated.dtype)
        weight = (1 / rates["measured"]).clamp(1 - self.averaging, 1)  # a plain mean until it has its length
        for name, value in (("propagated", propagated), ("parameters", parameters)):
            past = rates.get(name, torch.zeros_like(value))
            rates[name] = torch.where(counts, past.lerp(value, weight), past)
        product = rates["propagated"] * rates["parameters"]
        rates["rate"] = torch.where(product > 0, 1 / product, 0)  # no signal reaches the layer: nor does a gradient

    def _move(self, p: Tensor, rate: Tensor) -> None:
        group = self.group(p)
        step = group["lr"] * rate * self.decayed_gradient(p)
        if group["momentum"]:
            step = self.buffer(p).mul_(group["momentum"]).add_(step)
        p.sub_(step)


def backward_gains(minibatch: Minibatch, trace: Trace) -> tuple[Tensor, Tensor]:
    """``Π_{k behind l} m_k`` and ``1/q_l``, each ``(layers,)``, from one backward pass of random signs.

    Consumes the trace's graph. A layer that is called several times adds up its calls.
    """
    layers, generator = minibatch.objective.layers, minibatch.objective.generator

    def signs(like: Tensor) -> Tensor:
        return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype).mul_(2).sub_(1)

    squares: dict[Layer, Tensor] = {}
    grams: dict[Layer, Tensor] = {}

    def visit(call: Call, delta: Tensor) -> None:
        """Behind the layer: what arrives, and what fresh signs give its parameters."""
        layer = call.layer
        fresh = signs(delta)
        gradient = torch.cat([g.flatten() for g in call.gradient(fresh)])
        squares[layer] = squares.get(layer, 0) + delta.square().mean()
        grams[layer] = grams.get(layer, 0) + gradient.square().mean() / minibatch.size

    for call in trace.calls:
        call.output.register_hook(lambda delta: delta.square().mean().sqrt() * signs(delta))
    trace.backward(signs(trace.outputs), visit)
    minibatch.count(WEIGHT_GRADIENT)
    none = torch.zeros_like(next(iter(squares.values())))
    return tuple(torch.stack([values.get(layer, none) for layer in layers]) for values in (squares, grams))
