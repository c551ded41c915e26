r"""KFAC: Kronecker-factored approximate curvature, as this group of papers runs it.

After Martens and Grosse (arXiv:1503.05671; convolutions: Grosse and Martens, arXiv:1602.01407). What is written here
about averaging, damping and momentum was read in the public code of TNT (Ren, Goldfarb, NeurIPS 2021), where KFAC is
the rival; rows, graph convolutions and repeated layers are derived here.

One thing in that code is not followed. Its second backward pass, at sampled labels, adds to the activations' gradients
that the first one, at the true labels, has left there, so that its ``δ`` is the sum of both and ``G`` far too large at
first. On the MNIST autoencoder (rate 3e-3, λ 0.3) its notebook's training loss is 504, 230, 202 after epochs 1, 2, 3;
this method with the sum for ``δ`` gives 521, 220, 201, and as it is written here 201, 188, 174.

A layer that is linear in its parameters at every *row* ``r`` (an example; a position in one; a node of a graph), ``z_r
= [W|b] ā_r``, ``ā = [a; 1]``, has the Fisher block ``F = (1/m) E[(Σ_r δ_r ⊗ ā_r)(Σ_r δ_r ⊗ ā_r)ᵀ]``, with ``δ_r = ∂(Σ_i
loss_i)/∂z_r`` at labels drawn from the model. Dropping the products of different rows and taking ``δ`` and ``ā`` for
independent,

    F ≈ G ⊗ A,      A = (1/m) Σ_r ā_r ā_rᵀ,      G = (1/R) Σ_r δ_r δ_rᵀ      (m examples, R rows),

    M ← β M + g,      [W|b] ← [W|b] − α ((G + √λ I)⁻¹ M (A + √λ I)⁻¹ + w [W|b]).

For a fully connected layer ``R = m``. For a convolution a row is an output position, ``a`` the patch under the kernel,
so ``A`` is summed over positions and ``G`` averaged over positions and examples. There is no factor ``π`` that balances
the two dampings. A layer that is called several times has the rows of all its calls.

**Graph convolution** (derived). ``z = Â x Wᵀ + b = (Âx) Wᵀ + b`` is a fully connected layer on the propagated input
``a = Âx``, with nodes for rows. Independently drawn labels have uncorrelated scores, so the one ``δ`` that all labels
propagate together has the right second moment. Rows that no label reaches (``δ_r = 0``) count in neither factor; with
that, ``G ⊗ A`` is exact for a last layer whose output curvature is the same at all labelled nodes.

BatchNorm and its like take the plain gradient; so does every layer that is not fully connected (``nn.Linear``), a
two-dimensional convolution with one group, or a ``GCNConv``, or shares parameters with another module, and a warning
names it.

``lr`` ``α``, ``damping`` ``λ``, ``momentum`` ``β``, ``weight_decay`` ``w``; averages and frequencies as in
``optimizers.kronecker``, whose text also tells of the first pass over the data.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers.kronecker import Block, Kronecker, Statistics, homogeneous_block, tensor_block
from optimizers.layers import ConvolutionLayer, Layer, LinearGraphLayer, LinearLayer, NormalisationLayer, rows
from optimizers.objective import Minibatch
from optimizers.trace import Call


class KFAC(Kronecker):
    """Natural gradient with one Kronecker product per layer; arguments as ``optimizers.kronecker.Kronecker``.

    Raises:
        NotImplementedError: at the first step, for a ``GCNConv`` that normalises its graph itself.
    """

    def _blocks_of(self, layer: Layer) -> list[Block]:
        if is_factored(layer):
            return [homogeneous_block(layer)]
        warn_of_plain_gradient(self, layer)
        return [tensor_block(layer, p) for p in layer.parameters]

    def _measure(self, minibatch: Minibatch) -> tuple[Tensor, Statistics]:
        trace = minibatch.trace()
        loss = minibatch.fill_gradients(trace, retain_graph=True)
        sums: dict[Layer, list[Tensor]] = {}

        def visit(call: Call, delta: Tensor) -> None:
            if not is_factored(call.layer):
                return
            a, delta = factor_rows(call, delta)
            count = delta.new_full((), len(delta))
            if minibatch.mixing:
                reached = (delta != 0).any(1, keepdim=True)
                a, count = a * reached, reached.sum().to(delta.dtype)
            new = [delta.T @ delta, a.T @ a, count]
            sums[call.layer] = new if call.layer not in sums else torch._foreach_add(sums[call.layer], new)

        trace.backward(minibatch.sampled_residual(trace.outputs), visit)
        statistics = {}
        for block in self._blocks:
            if block.layer in sums:
                g, a, count = sums[block.layer]
                statistics[block] = [g / count.clamp_min(1), a / minibatch.size]
        return loss, statistics

    def _damped(self, block: Block, factors: list[Tensor]) -> list[tuple[Tensor, float]]:
        damping = self.group(block.parameters[0])["damping"] ** 0.5
        return [(factor, damping) for factor in factors]


def is_factored(layer: Layer) -> bool:
    """Whether a layer's block has a Kronecker form here: Linear, Conv2d without groups, GCNConv; none that is tied."""
    module = layer.module
    if layer.elsewhere:
        return False
    if isinstance(layer, LinearGraphLayer):
        return type(module).__name__ == "GCNConv" and _check_normalised(layer)
    if isinstance(layer, ConvolutionLayer):
        return isinstance(module, nn.Conv2d) and module.groups == 1
    return isinstance(layer, LinearLayer)


def warn_of_plain_gradient(optimizer: torch.optim.Optimizer, layer: Layer) -> None:
    """Name a layer that has no Kronecker form here; normalisations are known to have none."""
    if not is_factored(layer) and not isinstance(layer, NormalisationLayer):
        warnings.warn(
            f"layer '{layer.name}' ({type(layer.module).__name__}) takes the plain gradient: "
            f"{type(optimizer).__name__} has factors for Linear, Conv2d with one group and GCNConv, "
            "if no other module has their parameters; Shampoo, TNT and MBF precondition any layer",
            stacklevel=2,
        )


def _check_normalised(layer: Layer) -> bool:
    if layer.module.normalize:
        raise NotImplementedError(
            f"Kronecker factors need the input of layer '{layer.name}' after propagation; GCNConv(normalize=True) "
            "hides it: use normalize=False with a normalised adjacency, or Shampoo, TNT, MBF or a gradient method"
        )
    return True


def factor_rows(call: Call, delta: Tensor) -> tuple[Tensor, Tensor]:
    """``ā`` ``(R, in + 1)`` and ``δ`` ``(R, out)`` of one call."""
    module, a = call.layer.module, call.inputs[0]
    if isinstance(call.layer, ConvolutionLayer):
        a = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride).mT.flatten(0, 1)
        delta = delta.flatten(2).mT.flatten(0, 1)
    elif isinstance(call.layer, LinearGraphLayer):
        weights = call.inputs[2] if len(call.inputs) > 2 else None
        a = a if a.layout == torch.strided else a.to_dense()
        a = module.propagate(call.inputs[1], x=a, edge_weight=weights)
    else:
        a, delta = rows(a), rows(delta)
    ones = a.new_ones(len(a), 1)
    parts = [a] if any(p.dim() > 1 for p in call.layer.parameters) else []
    parts += [ones] if any(p.dim() == 1 for p in call.layer.parameters) else []
    return torch.cat(parts, 1), delta
