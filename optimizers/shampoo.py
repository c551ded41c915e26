r"""Shampoo, as this group of papers runs it.

After Gupta, Koren and Singer (arXiv:1802.09568). What follows was read in the public code of TNT (Ren, Goldfarb,
NeurIPS 2021), where Shampoo is a rival; a modern distributed Shampoo (grafting, blocking, see ``shampoo_grafted``) is a
different and stronger method.

Every parameter is a tensor of its own: a matrix, a convolution ``(out, in, k²)``, a vector (which gets a full matrix
too). With ``ḡ`` the minibatch's mean gradient as a tensor of ``k`` modes and ``ḡ⁽ⁱ⁾`` its unfolding along mode ``i``,

    H_i ← ρ H_i + (1 − ρ) ḡ⁽ⁱ⁾ ḡ⁽ⁱ⁾ᵀ,      M ← β M + ḡ,

    θ ← θ − α (M ×₁ (H₁ + εI)^{−1/(2k)} ×₂ … ×_k (H_k + εI)^{−1/(2k)} + w θ).

The average replaces the sum of the original paper, and there is no grafting.

``lr`` ``α``, ``damping`` ``ε``, ``momentum`` ``β``, ``weight_decay`` ``w``; averages and frequencies as in
``optimizers.kronecker``, whose text also tells of the first pass over the data. On autoencoders the code takes roots
every T₂ steps from the start (``refresh_early=False``).
"""

from __future__ import annotations

from torch import Tensor

from optimizers.kronecker import Block, Kronecker, Statistics, mode_grams, tensor_block
from optimizers.layers import Layer
from optimizers.objective import Minibatch


class Shampoo(Kronecker):
    """Inverse roots of gradient second moments, one per mode; arguments as ``optimizers.kronecker.Kronecker``."""

    def _blocks_of(self, layer: Layer) -> list[Block]:
        return [tensor_block(layer, p) for p in layer.parameters]

    def _measure(self, minibatch: Minibatch) -> tuple[Tensor, Statistics]:
        loss = self.fill_gradients(minibatch)
        return loss, {block: mode_grams(block.join([block.parameters[0].grad])) for block in self._blocks}

    def _exponent(self, block: Block) -> float:
        modes = len(block.leading) + 1
        return -1 / (2 * modes)
