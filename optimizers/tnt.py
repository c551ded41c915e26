r"""TNT: tensor normal training.

After Ren and Goldfarb, *Tensor Normal Training for Deep Learning Models* (NeurIPS 2021); all of it read in their public
code.

Every parameter is a tensor of its own: a matrix, a convolution ``(out, in, k²)``, a vector. Gradients at labels drawn
from the model are taken for a tensor normal variable, whose covariance is a Kronecker product over its ``k`` modes.
With ``ḡ`` the minibatch's **mean** gradient at sampled labels, ``ḡ⁽ⁱ⁾`` its unfolding along mode ``i`` of size ``n_i``,
and ``N = Π n_i``,

    H_i ← ρ H_i + (1 − ρ) ḡ⁽ⁱ⁾ ḡ⁽ⁱ⁾ᵀ,      c = (tr H₁ / N)^{1/k},      H̃_i = H_i / (c^{k−1} Π_{j≠i} n_j),

    M ← β M + g,      θ ← θ − α (M ×₁ (H̃₁ + εI)⁻¹ ×₂ … ×_k (H̃_k + εI)⁻¹ + w θ),

where ``g`` is the gradient at the true labels. All ``H_i`` have one trace, so ``⊗ H̃_i`` has the trace of the
covariance and each ``H̃_i`` the mean eigenvalue ``c``. Being of mean gradients the covariance is the Fisher matrix over
``m``, and ``ε`` is to be read on that scale.

``lr`` ``α``, ``damping`` ``ε``, ``momentum`` ``β``, ``weight_decay`` ``w``; averages and frequencies as in
``optimizers.kronecker``, whose text also tells of the first pass over the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.kronecker import Block, Kronecker, Statistics, mode_grams, tensor_block
from optimizers.layers import Layer
from optimizers.objective import Minibatch


class TNT(Kronecker):
    """Natural gradient under a tensor normal model; arguments as ``optimizers.kronecker.Kronecker``."""

    def _blocks_of(self, layer: Layer) -> list[Block]:
        return [tensor_block(layer, p) for p in layer.parameters]

    def _measure(self, minibatch: Minibatch) -> tuple[Tensor, Statistics]:
        trace = minibatch.trace()
        loss = minibatch.fill_gradients(trace, retain_graph=True)
        sampled = trace.gradients(trace.outputs, minibatch.sampled_residual(trace.outputs) / minibatch.size)
        gradient = {p: g for layer, gs in sampled.items() for p, g in zip(layer.parameters, gs, strict=True)}
        return loss, {block: mode_grams(block.join([gradient[block.parameters[0]]])) for block in self._blocks}

    def _damped(self, block: Block, factors: list[Tensor]) -> list[tuple[Tensor, float]]:
        return [(factor, self.group(block.parameters[0])["damping"]) for factor in normalised(factors)]


def normalised(factors: list[Tensor]) -> list[Tensor]:
    """``H̃_i``: factors whose Kronecker product has their common trace, the mean eigenvalue shared out evenly."""
    sizes = [len(factor) for factor in factors]
    total = torch.Size(sizes).numel()
    c = (factors[0].trace() / total).clamp_min(torch.finfo(factors[0].dtype).tiny) ** (1 / len(sizes))
    return [factor / (c ** (len(sizes) - 1) * (total // n)) for factor, n in zip(factors, sizes, strict=True)]
