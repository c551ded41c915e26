r"""MBF: mini-block Fisher.

After Bahamou, Goldfarb and Ren, *A Mini-Block Fisher Method for Deep Neural Networks* (arXiv:2202.04124, AISTATS 2023).
From the abstract: the empirical Fisher matrix, block diagonal with many small blocks within a layer, inverted in
batches, at a cost per iteration slightly above first-order methods. Averages and momentum as in this group's code; the
block of a fully connected layer as the paper is remembered; the rule for vectors derived here.

With ``g`` the minibatch's mean gradient at the true labels:

* convolution: one block per kernel, ``F_oc ← ρ F_oc + (1 − ρ) g_oc g_ocᵀ``, ``g_oc`` the ``k²`` numbers of output ``o``
  and input ``c``;
* fully connected layer and graph convolution: one block per neuron, of the weights that lead into it and its bias,
  averaged over the layer's neurons: ``F ← ρ F + (1 − ρ) (1/O) Σ_o g_o g_oᵀ``, ``(in + 1)²`` numbers in all;
* vectors (biases of convolutions, BatchNorm): blocks of one number and, as in Adam, a square root, ``F_j ← ρ F_j + (1 −
  ρ) g_j²``;
* parameters of other layers go by their shape: a matrix (an embedding) as a fully connected layer's, what has more
  dimensions as a convolution's;

    M ← β M + g,      θ ← θ − α ((F + λI)⁻¹ M + w θ),      for blocks of one number (F + λ)^{−1/2} M.

The public code reshapes a fully connected layer's gradient in a way that averages over *inputs* instead, one ``O × O``
matrix of outgoing products: ``MBFOutgoing``.

``lr`` ``α``, ``damping`` ``λ``, ``momentum`` ``β``, ``weight_decay`` ``w``; averages and frequencies as in
``optimizers.kronecker``, whose text also tells of the first pass over the data.
"""

from __future__ import annotations

from torch import Tensor

from optimizers.kronecker import Block, Kronecker, Statistics, homogeneous_block
from optimizers.layers import Layer, LinearGraphLayer, LinearLayer
from optimizers.objective import Minibatch


class MBF(Kronecker):
    """Empirical Fisher matrix in mini-blocks; arguments as ``optimizers.kronecker.Kronecker``."""

    def _blocks_of(self, layer: Layer) -> list[Block]:
        if isinstance(layer, LinearLayer | LinearGraphLayer) and sorted(p.dim() for p in layer.parameters) == [1, 2]:
            return [homogeneous_block(layer)]
        return [Block(layer, [p], p.shape[:2] if p.dim() > 2 else p.shape[:1]) for p in layer.parameters]

    def _measure(self, minibatch: Minibatch) -> tuple[Tensor, Statistics]:
        loss = self.fill_gradients(minibatch)
        gradients = {block: block.join(p.grad for p in block.parameters) for block in self._blocks}
        return loss, {block: [self._statistic(block, gradient)] for block, gradient in gradients.items()}

    def _statistic(self, block: Block, g: Tensor) -> Tensor:
        if _is_matrix(block):
            return self._neuron_statistic(g)
        return g[..., :, None] * g[..., None, :]

    def _neuron_statistic(self, g: Tensor) -> Tensor:
        return g.T @ g / len(g)

    def _apply_to_neurons(self, inverse: Tensor, tensor: Tensor) -> Tensor:
        return tensor @ inverse

    def _apply(self, block: Block, inverses: list[Tensor], tensor: Tensor) -> Tensor:
        (inverse,) = inverses
        if _is_matrix(block):
            return self._apply_to_neurons(inverse, tensor)
        return (inverse @ tensor[..., None])[..., 0]

    def _exponent(self, block: Block) -> float:
        return -0.5 if block.parameters[0].dim() <= 1 else -1.0


class MBFOutgoing(MBF):
    """MBF with the ``O × O`` block of its public code: ``Σ_i g_i g_iᵀ / (in + 1)``, ``g_i`` what leaves input ``i``."""

    def _neuron_statistic(self, g: Tensor) -> Tensor:
        return g @ g.T / g.shape[1]

    def _apply_to_neurons(self, inverse: Tensor, tensor: Tensor) -> Tensor:
        return inverse @ tensor


def _is_matrix(block: Block) -> bool:
    return block.parameters[0].dim() == 2
