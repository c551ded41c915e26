r"""Layers: modules that own trainable parameters, and the rules of each kind.

A *layer* is a module that owns trainable parameters. Every curvature method of this package (layer-wise steps, KFAC,
K-BFGS, back-matching ...) needs the same few things of it, for a loss summed over the examples of a minibatch:

* its input ``a`` and the derivative ``δ = ∂(Σ_i loss_i)/∂z`` at its output ``z`` (before the activation),
* its weight gradient, a bilinear function of the two: ``gradient(a, δ)``,
* its local tangent ``ż = (∂z/∂θ) d``: how the output moves with the layer's own parameters, its input held fixed.

Input and derivative are captured in ``optimizers.trace`` and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized

from optimizers.replay import frozen_statistics

# Work in gradient-equivalents: one forward and one full backward pass make 1. Counted by construction of the method.
FORWARD = ACTIVATION_BACKWARD = WEIGHT_GRADIENT = TANGENT = 1 / 3
HESSIAN_VECTOR_PRODUCT = 2.0

#: Graph convolutions whose output is linear in all the parameters below them (by class name: torch alone is known
#: here).
LINEAR_GRAPH_LAYERS = {"GCNConv", "SAGEConv", "GraphConv", "SGConv", "TAGConv", "ChebConv", "ClusterGCNConv", "LEConv"}

# Closed rules are for these very classes: a subclass may compute something else.
_CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d}
NORMALISATIONS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm}


class Ghost(NamedTuple):
    """A layer's output whose values have been let go: all that tangents ask of one."""

    shape: torch.Size
    grad_fn: torch.autograd.graph.Node


class Untraceable(TypeError):
    """A layer's call is none that can be captured; ``layer`` is the layer.

    ``final``: nor is one of a module around it.
    """

    def __init__(self, layer: Layer, reason: str, final: bool = False) -> None:
        super().__init__(
            f"layer '{layer.name}' ({type(layer.module).__name__}) {reason}: freeze its parameters, or use an "
            "optimizer of gradients alone"
        )
        self.layer, self.final = layer, final


class Layer:
    """A module and trainable parameters that act in its calls: those that it owns, or more.

    Args:
        name: what the layer is called: the name in the model of the module that owns the parameters.
        module: the module.
        parameters: trainable parameters by their name inside the module, e.g. ``{"weight": …, "bias": …}``.

    Attributes:
        elsewhere: other modules that have some of the parameters too, as layers of those alone.
    """

    def __init__(self, name: str, module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.name = name
        self.module = module
        self.names = tuple(parameters)
        self.parameters = tuple(parameters.values())
        self.elsewhere: list[Layer] = []

    def gradient(self, inputs: tuple, output: Tensor, delta: Tensor) -> list[Tensor]:
        """``∂⟨δ, z⟩/∂θ``, one tensor per parameter.

        Args:
            inputs: what the module was called with.
            output: what it returned.
            delta: ``∂(Σ_i loss_i)/∂z``, the output's shape.
        """
        # anew, for the pass's own graph leads on to other calls, in which the same parameters may act
        with torch.enable_grad(), frozen_statistics(self.module):
            theta = {name: p.requires_grad_() for name, p in self._values().items()}
            z = self._output(theta, inputs)
            return list(torch.autograd.grad(z, list(theta.values()), delta.to(z.dtype), materialize_grads=True))

    def tangent(self, inputs: tuple, output: Tensor, direction: Sequence[Tensor]) -> Tensor:
        """``ż = (∂z/∂θ) d``, a new tensor, for a direction ``d`` in the layer's parameters.

        Args:
            inputs: what the module was called with.
            output: what it returned.
            direction: one tensor per parameter.

        Raises:
            TypeError: the module has a function that torch cannot differentiate so.
        """
        theta = self._values()
        dot = dict(zip(self.names, direction, strict=True))
        with frozen_statistics(self.module), sdpa_kernel(SDPBackend.MATH):  # fused attention has one derivative
            try:
                return torch.func.jvp(lambda theta: self._output(theta, inputs), (theta,), (dot,))[1].clone()
            except (NotImplementedError, RuntimeError):  # torch has no forward mode for some functions
                return self.tangent_by_reverse(inputs, direction)

    def tangent_by_reverse(self, inputs: tuple, direction: Sequence[Tensor]) -> Tensor:
        """``ż`` by reverse mode alone: ``(∂z/∂θ)ᵀ δ`` is linear in ``δ``, and its derivative along ``d`` is ``ż``.

        Dearer; but its forward pass is the usual one, and so draws the masks that that one does from one random state.
        """
        with torch.enable_grad(), frozen_statistics(self.module), sdpa_kernel(SDPBackend.MATH):
            theta = {name: p.requires_grad_() for name, p in self._values().items()}
            z = self._output(theta, inputs)
            delta = torch.zeros_like(z, requires_grad=True)
            try:
                pulled = torch.autograd.grad(z, list(theta.values()), delta, create_graph=True)
                return torch.autograd.grad(pulled, delta, list(direction))[0].clone()
            except RuntimeError as error:
                raise Untraceable(self, f"has no derivative along a direction in torch ({error})") from None

    def _values(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in zip(self.names, self.parameters, strict=True)}

    def _output(self, theta: dict[str, Tensor], inputs: tuple) -> Tensor:
        return first_tensor(called(self.module, theta, inputs))

    def _named(self, **values: Callable[[], Tensor]) -> list[Tensor]:
        """The values that this layer has a trainable parameter for, in its parameters' order, computed only then."""
        return [values[name]() for name in self.names]

    def _direction(self, direction: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """A direction's (weight, bias) parts, None where the layer has no such trainable parameter."""
        parts = dict(zip(self.names, direction, strict=True))
        return parts.get("weight"), parts.get("bias")


class LinearLayer(Layer):
    """``z = a Wᵀ + b`` on the last dimension; ``a``: ``(m, …, in)``."""

    def gradient(self, inputs, output, delta):
        delta, a = rows(delta), rows(inputs[0])
        return self._named(weight=lambda: delta.T @ a, bias=lambda: delta.sum(0))

    def tangent(self, inputs, output, direction):
        a, (weight, bias) = inputs[0], self._direction(direction)
        if weight is None:
            return bias.expand(*a.shape[:-1], -1).clone()
        return F.linear(a, weight, bias)


class ConvolutionLayer(Layer):
    """Convolution over 1 to 3 dimensions, with stride, zero padding, dilation and groups; ``a``: ``(m, c_in, …)``."""

    def gradient(self, inputs, output, delta):
        conv, a = self.module, inputs[0]
        dims = delta.dim() - 2

        def weight() -> Tensor:
            form = (torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)[dims - 1]
            return form(a, conv.weight.shape, delta, conv.stride, conv.padding, conv.dilation, conv.groups)

        return self._named(weight=weight, bias=lambda: delta.flatten(2).sum((0, 2)))

    def tangent(self, inputs, output, direction):
        conv, a, (weight, bias) = self.module, inputs[0], self._direction(direction)
        if weight is None:
            return bias.view(-1, *[1] * (len(output.shape) - 2)).expand(len(a), *output.shape[1:]).clone()
        form = (F.conv1d, F.conv2d, F.conv3d)[len(output.shape) - 3]
        return form(a, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class NormalisationLayer(Layer):
    """``z = γ x̂ + β`` with ``x̂`` the normalised input (BatchNorm, LayerNorm, GroupNorm). ``x̂`` does not depend on
    γ, β.

    In training mode BatchNorm's ``x̂`` mixes the examples. That concerns what flows *through* it; ``γ`` and ``β`` act
    on each example apart, so this layer's own pairing is exact.
    """

    def gradient(self, inputs, output, delta):
        with torch.enable_grad():  # the adjoint of the tangent
            direction = [torch.zeros_like(p, requires_grad=True) for p in self.parameters]
            return list(torch.autograd.grad(self.tangent(inputs, output, direction), direction, delta))

    def tangent(self, inputs, output, direction):
        norm, x, (weight, bias) = self.module, inputs[0], self._direction(direction)
        if weight is None:
            shared = 0 if isinstance(norm, nn.LayerNorm) else len(output.shape) - 2
            return bias.view(*bias.shape, *[1] * shared).expand(len(x), *output.shape[1:]).clone()
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        mean, variance = self._statistics(x, output)
        return F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)

    def _statistics(self, x: Tensor, output: Tensor | Ghost) -> tuple[Tensor, Tensor]:
        """The mean and variance that BatchNorm used."""
        norm = self.module
        if not norm.training and norm.running_mean is not None:
            return norm.running_mean, norm.running_var
        kept = output.grad_fn  # for backward; finding them anew is most of a BatchNorm
        if getattr(kept, "_saved_training", True) is False:  # given to it: those of all processes' examples
            return kept._saved_running_mean, kept._saved_running_var
        if hasattr(kept, "_saved_result2"):
            return kept._saved_result1, kept._saved_result2.pow(-2) - norm.eps
        variance, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
        return mean, variance


class EmbeddingLayer(Layer):
    """``z = W[index]``; index: ``(m, …)``."""

    def gradient(self, inputs, output, delta):
        index, delta = inputs[0].flatten(), delta.flatten(0, -2)
        return [torch.zeros_like(self.module.weight).index_add_(0, index, delta)]

    def tangent(self, inputs, output, direction):
        return F.embedding(inputs[0], direction[0])


class LinearInParametersLayer(Layer):
    """A module linear in all parameters below it: ``ż`` is what it returns with the direction for parameters."""

    def tangent(self, inputs, output, direction):
        absent = {n: torch.zeros_like(p) for n, p in self.module.named_parameters() if n not in self.names}
        return called(self.module, absent | dict(zip(self.names, direction, strict=True)), inputs)


class EmbeddingBagLayer(LinearInParametersLayer):
    """``z``: sums or means of rows of ``W``, by bag; torch has no other derivative of it along a direction."""


class LinearGraphLayer(LinearInParametersLayer):
    """A graph convolution whose output is linear in its parameters."""


class Named(dict):
    """Arguments of a call that have names and no position: the last of its inputs."""


def called(module: nn.Module, theta: dict[str, Tensor], inputs: tuple):
    """What a module returns for other parameters."""
    named = inputs[-1] if inputs and isinstance(inputs[-1], Named) else {}
    return torch.func.functional_call(module, theta, inputs[:-1] if named else inputs, named)


def first_tensor(output):
    """What a module returns; of a tuple the first, as recurrent layers and attention have it."""
    return output[0] if type(output) is tuple and output else output


def rows(x: Tensor) -> Tensor:
    """All vectors along the last dimension, as the rows of a matrix."""
    return x.reshape(-1, x.shape[-1])


def _kind(module: nn.Module) -> type[Layer]:
    kind = type(module)
    if kind.__name__ in LINEAR_GRAPH_LAYERS and hasattr(module, "propagate") and not _bends(module):
        return LinearGraphLayer
    if not {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
        return Layer  # reparametrised, whatever the module is: by spectral_norm, weight_norm
    if kind is nn.Linear:
        return LinearLayer
    if kind in _CONVOLUTIONS and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return ConvolutionLayer
    if kind in NORMALISATIONS:
        return NormalisationLayer
    if kind is nn.Embedding and module.padding_idx is None and module.max_norm is None:
        return EmbeddingLayer
    if kind is nn.EmbeddingBag and module.mode != "max" and module.max_norm is None:
        return EmbeddingBagLayer
    return Layer


def _bends(convolution: nn.Module) -> bool:
    """Whether options make a graph convolution of ``LINEAR_GRAPH_LAYERS`` not linear: its linear parts are layers then.

    ``SAGEConv`` can scale its output to length 1 and put a layer with ReLU first; any aggregation may learn.
    """
    sage = type(convolution).__name__ == "SAGEConv" and (convolution.normalize or convolution.project)
    learned = any(True for _ in getattr(convolution, "aggr_module", nn.Identity()).parameters())
    return sage or learned


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of a model, in the order of ``named_modules``; frozen parameters are left out, shared ones belong to
    the first module that has them.

    A linear graph convolution owns all parameters below it (torch-geometric keeps the weight in a child), and so does a
    module that ``torch.nn.utils.parametrize`` computes the weight of; any other owns those that are its own attributes.
    A module of unknown type gets the generic rules (autograd for the gradient, forward mode for the tangent), right for
    any module that returns one tensor, or it first of a tuple.

    Raises:
        TypeError: the model, or a part of it, is compiled: its layers' calls are not to be seen.
    """
    compiled = [name or "the model" for name, module in model.named_modules() if hasattr(module, "_orig_mod")]
    if compiled:
        raise TypeError(
            f"{compiled[0]} is compiled, and what its layers see cannot be captured: give the objective the plain "
            "model (its _orig_mod), or use an optimizer of gradients alone"
        )
    layers, owners, inside = [], {}, set()
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        kind = _kind(module)
        whole = kind is LinearGraphLayer or is_parametrized(module)
        if whole:
            inside.add(name + ".")
        parameters = defaultdict(dict)  # by the layer that has them already; None: a new one
        for n, p in module.named_parameters(recurse=whole):
            if p.requires_grad:
                parameters[owners.get(p)][n] = p
        for owner, tied in parameters.items():
            layer = kind(name, module, tied)
            if owner is not None:
                owner.elsewhere.append(layer)
                continue
            owners.update(dict.fromkeys(layer.parameters, layer))
            layers.append(layer)
    return layers
