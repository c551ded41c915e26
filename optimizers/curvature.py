r"""The curvature of every layer along its own direction, all layers at once.

For directions ``d_l`` (one per layer) and a loss ``f`` (mean over ``m`` examples) each estimator returns the ``L × L``
matrix

    Q_kl = d_kᵀ C_kl d_l,      C the Hessian or the Gauss–Newton matrix,

whose diagonal ``q_l`` is the curvature of layer ``l``'s own block along its direction, and with which a joint step ``Σ
α_l d_l`` has curvature ``αᵀQα``. Gauss–Newton and Fisher matrix coincide for the likelihoods used here. All of this is
derived, not read in a paper: the paper (arXiv:2305.13664) says only that the layers' Hessian blocks are used and what
that costs.

=========================  ===============================================  ============  ========================
estimator                  what it computes                                 unbiased for  work, gradient-equivalents
=========================  ===============================================  ============  ========================
``SampledFisher``          labels from the model, paired per example        C = GGN       2/3
``ExactGaussNewton``       one Jacobian–vector product per layer            C = GGN       (2 + L/2) / 3
``GaussNewton``            the cheaper of those two: the default            C = GGN       as that
``RandomSignHessian``      ``h = H(s∘d)``, ``½(s_k r_l + s_l r_k)``         C = H         2
``RandomSignGaussNewton``  the same with the Gauss–Newton matrix            C = GGN       2
``ExactHessian``           one Hessian–vector product per layer             C = H         2 L: the oracle
=========================  ===============================================  ============  ========================

For networks of affine, ReLU and pooling layers the diagonal blocks of both matrices agree almost everywhere, because
the outputs are piecewise linear in one layer's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optimizers.layered import check
from optimizers.layers import HESSIAN_VECTOR_PRODUCT, TANGENT, Layer
from optimizers.objective import Minibatch
from optimizers.trace import Call, Trace

Directions = Mapping[Layer, list[Tensor]]


class SampledFisher:
    """Gauss–Newton curvature from labels that the model draws itself.

    With ``ŷ_i ~ p(·|x_i)``, ``δ_{l,i} = −∂ log p(ŷ_i|x_i)/∂z_l`` (propagated back without weight gradients) and the
    layer's local tangent ``ż_l = (∂z_l/∂θ_l) d_l``, per example ``s_{l,i} = ⟨δ_{l,i}, ż_{l,i}⟩`` (summed over
    positions) and

        Q = (1/m) Σ_i s_i s_iᵀ.

    Unbiased, positive semi-definite, nothing per-example stored but the ``(L, m)`` numbers ``s``.

    Where examples mix (a graph's propagation) a label's derivative is spread over many rows: their sum is paired
    instead, ``Q = (1/m) (Σ_i s_i)(Σ_i s_i)ᵀ``, unbiased too because independently drawn labels have uncorrelated
    scores, but of one degree of freedom per draw; there ``mixed_draws`` draws are averaged. So it is where a layer's
    output has not one row per example. Through BatchNorm in training mode the per-example pairing leaves out what an
    example does to the others through the batch statistics.

    Args:
        mixed_draws: label draws per call where examples mix.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, mixed_draws: int = 4) -> None:
        check(mixed_draws >= 1, "mixed_draws", mixed_draws, "at least 1")
        self.mixed_draws = mixed_draws

    def __call__(self, minibatch: Minibatch, trace: Trace, directions: Directions) -> Tensor:
        mixing = minibatch.mixes(trace)
        draws = self.mixed_draws if mixing else 1
        tangents: dict[Call, Tensor] = {}
        slopes: dict[Layer, Tensor] = {}

        def pair(call: Call, delta: Tensor) -> None:
            s = call.slopes(delta, directions[call.layer])
            slopes[call.layer] = slopes[call.layer] + s if call.layer in slopes else s

        def pair_sum(call: Call, delta: Tensor) -> None:  # one tangent serves all draws
            if call not in tangents:
                tangents[call] = call.tangent(directions[call.layer])
            s = torch.vdot(delta.flatten(), tangents[call].flatten()).view(1)
            slopes[call.layer] = slopes[call.layer] + s if call.layer in slopes else s

        q = 0.0
        for draw in range(draws):
            slopes.clear()
            residual = minibatch.sampled_residual(trace.outputs)
            trace.backward(residual, pair_sum if mixing else pair, retain_graph=draw + 1 < draws)
            none = torch.zeros_like(next(iter(slopes.values())))
            s = torch.stack([slopes.get(layer, none) for layer in directions])
            if mixing:
                s = minibatch.mean(s) * minibatch.ranks**0.5  # one sum over all ranks' examples
            q = q + s @ s.T / (minibatch.size * draws)
        minibatch.count(TANGENT)
        return q + _penalty(minibatch, directions)


class RandomSignHessian:
    """``h = H(s∘d)`` with one random sign per layer: unbiased for every block of the true Hessian of any architecture.

    ``r_k = d_kᵀ h_k = Σ_l s_l d_kᵀ H_kl d_l``, so ``s_l r_k`` has mean ``Q_kl``. Noisy, and may be negative.
    """

    def __call__(self, minibatch: Minibatch, trace: Trace, directions: Directions) -> Tensor:
        products = _HessianProduct(minibatch, trace, directions)
        minibatch.count(HESSIAN_VECTOR_PRODUCT)
        return _random_sign_matrix(minibatch, products)


class RandomSignGaussNewton:
    """``RandomSignHessian`` with the Gauss–Newton matrix ``Jᵀ H_out J``; unbiased wherever examples mix."""

    def __call__(self, minibatch: Minibatch, trace: Trace, directions: Directions) -> Tensor:
        products = _GaussNewtonProduct(minibatch, trace, directions)
        minibatch.count(HESSIAN_VECTOR_PRODUCT)
        return _random_sign_matrix(minibatch, products) + _penalty(minibatch, directions)


class ExactGaussNewton:
    """``Q_kl = (1/m) Σ_i ⟨J_i d_k, H_out,i J_i d_l⟩``, without a sample.

    ``J d_l`` is the layer's local tangent carried on to the outputs by the transpose of the activations' backward pass:
    one such pass, differentiated once per layer.
    """

    def __call__(self, minibatch: Minibatch, trace: Trace, directions: Directions) -> Tensor:
        dual = torch.zeros_like(trace.outputs, requires_grad=True)
        pulled: dict[Call, Tensor] = {}  # linear in the dual
        trace.backward(dual, pulled.__setitem__, create_graph=True)
        tangents = []
        for layer, direction in directions.items():
            calls = [call for call in pulled if call.layer is layer]
            if not calls:  # the outputs do not depend on it
                tangents.append(torch.zeros_like(dual))
                continue
            local = [call.tangent(direction) for call in calls]
            tangents.append(torch.autograd.grad([pulled[c] for c in calls], dual, local, retain_graph=True)[0])
        minibatch.count(TANGENT * (1 + len(tangents) / 2))
        curved = [minibatch.hessian_product(trace.outputs, t).flatten() for t in tangents]
        q = torch.stack([t.flatten() for t in tangents]) @ torch.stack(curved).T / minibatch.size
        return q + _penalty(minibatch, directions)


class GaussNewton:
    """``SampledFisher``, or ``ExactGaussNewton`` where that costs no more: where examples mix and the layers are few.

    There ``k`` draws of labels are ``k`` backward passes, the exact products one and half a pass per layer. Some
    functions (fused attention) have but one derivative in torch, and the exact products need two.
    """

    def __init__(self) -> None:
        self.sampled, self.exact = SampledFisher(), ExactGaussNewton()
        self.is_exact_possible = True

    def __call__(self, minibatch: Minibatch, trace: Trace, directions: Directions) -> Tensor:
        few = 1 + len(directions) / 2 <= self.sampled.mixed_draws
        if few and self.is_exact_possible and minibatch.mixes(trace):
            try:
                return self.exact(minibatch, trace, directions)
            except (NotImplementedError, RuntimeError) as error:
                if "not implemented" not in str(error):
                    raise
                self.is_exact_possible = False
        return self.sampled(minibatch, trace, directions)


class ExactHessian:
    """``Q_kl = d_kᵀ H_kl d_l``, one Hessian–vector product per layer. The oracle for tests and theory."""

    def __call__(self, minibatch: Minibatch, trace: Trace, directions: Directions) -> Tensor:
        product = _HessianProduct(minibatch, trace, directions)
        rows = [product({layer: directions[layer]}) for layer in directions]
        minibatch.count(HESSIAN_VECTOR_PRODUCT * len(rows))
        q = torch.stack(rows)
        return (q + q.T) / 2


class _HessianProduct:
    """``v → (d_kᵀ (H v)_k)_k`` on one trace, by differentiating the gradient again."""

    def __init__(self, minibatch: Minibatch, trace: Trace, directions: Directions) -> None:
        self.directions = directions
        with torch.enable_grad():
            loss = minibatch.loss(trace.outputs)
            parameters = _parameters(directions)
            self.gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        self.parameters = parameters

    def __call__(self, vector: Directions) -> Tensor:
        v = _flat(self.directions, vector)
        products = torch.autograd.grad(
            self.gradients, self.parameters, v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return _dots(self.directions, products)


class _GaussNewtonProduct:
    """``v → (d_kᵀ (Jᵀ H_out J v)_k / m)_k`` on one trace; ``J v`` by differentiating ``Jᵀ u`` in ``u``."""

    def __init__(self, minibatch: Minibatch, trace: Trace, directions: Directions) -> None:
        self.minibatch, self.trace, self.directions = minibatch, trace, directions
        self.parameters = _parameters(directions)
        self.dual = torch.zeros_like(trace.outputs, requires_grad=True)
        with torch.enable_grad():
            self.pulled = torch.autograd.grad(
                trace.outputs, self.parameters, self.dual, create_graph=True, materialize_grads=True
            )

    def tangent(self, vector: Directions) -> Tensor:
        """``J v``, the outputs' shape."""
        return torch.autograd.grad(self.pulled, self.dual, _flat(self.directions, vector), retain_graph=True)[0]

    def __call__(self, vector: Directions) -> Tensor:
        curved = self.minibatch.hessian_product(self.trace.outputs, self.tangent(vector)) / self.minibatch.size
        products = torch.autograd.grad(
            self.trace.outputs, self.parameters, curved, retain_graph=True, materialize_grads=True
        )
        return _dots(self.directions, products)


def _penalty(minibatch: Minibatch, directions: Directions) -> Tensor | float:
    """The penalty's part of ``Q``, which is diagonal: no two layers share a parameter."""
    if not minibatch.objective.penalty:
        return 0.0
    return torch.diag(torch.stack([minibatch.penalty_curvature(layer, d) for layer, d in directions.items()]))


def _random_sign_matrix(minibatch: Minibatch, product) -> Tensor:
    generator, like = minibatch.objective.generator, product.parameters[0]
    signs = torch.randint(0, 2, (len(product.directions),), generator=generator, device=like.device).to(like) * 2 - 1
    signed = {
        layer: [sign * d for d in ds] for sign, (layer, ds) in zip(signs, product.directions.items(), strict=True)
    }
    r = product(signed)
    return (torch.outer(signs, r) + torch.outer(r, signs)) / 2


def _parameters(directions: Directions) -> list[Tensor]:
    return [p for layer in directions for p in layer.parameters]


def _flat(directions: Directions, vector: Directions) -> list[Tensor]:
    """The vector's parts in the order of all parameters, zero in layers that it leaves out."""
    return [
        part
        for layer in directions
        for part in (vector[layer] if layer in vector else [torch.zeros_like(p) for p in layer.parameters])
    ]


def _dots(directions: Directions, products: Sequence[Tensor]) -> Tensor:
    """``d_kᵀ h_k`` per layer."""
    products = iter(products)
    return torch.stack([sum((d * next(products)).sum() for d in ds) for ds in directions.values()])
