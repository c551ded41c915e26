r"""Layers, and what each one saw in a forward pass.

A *layer* is a module that owns trainable parameters. Every curvature method of this package (layer-wise steps, KFAC,
K-BFGS, back-matching ...) needs the same few things of it, for a loss summed over the examples of a minibatch:

* its input ``a`` and the derivative ``δ = ∂(Σ_i loss_i)/∂z`` at its output ``z`` (before the activation),
* its weight gradient, a bilinear function of the two: ``gradient(a, δ)``,
* its local tangent ``ż = (∂z/∂θ) d``: how the output moves with the layer's own parameters, its input held fixed.

They are captured here and nowhere else: ``Trace`` runs one forward pass and puts a *tap* behind each layer's output. A
tap is the identity; in a backward pass it hands ``(call, δ)`` to a visitor and lets ``δ`` flow on. ``Trace.backward``
asks autograd for nothing but the taps, so it propagates derivatives of activations only (one third of a gradient) and
forms no weight gradients; the visitor forms those that it wants, and nothing per-example outlives its layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized

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


class RandomState:
    """The state of torch's global generators, so that a second forward pass draws the first one's dropout masks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    def has_advanced(self) -> bool:
        """Whether random numbers have been drawn since."""
        now = RandomState(self.device)
        return not all(map(torch.equal, [self.cpu, *self.cuda], [now.cpu, *now.cuda]))

    @contextmanager
    def replayed(self):
        """Within: the state as it was. After: as before."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


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
    """

    def __init__(self, name: str, module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.name = name
        self.module = module
        self.names = tuple(parameters)
        self.parameters = tuple(parameters.values())

    def gradient(self, inputs: tuple, output: Tensor, delta: Tensor) -> list[Tensor]:
        """``∂⟨δ, z⟩/∂θ``, one tensor per parameter.

        Args:
            inputs: what the module was called with.
            output: what it returned, with its graph.
            delta: ``∂(Σ_i loss_i)/∂z``, the output's shape.
        """
        return list(torch.autograd.grad(output, self.parameters, delta.to(output.dtype), retain_graph=True))

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
        return torch.func.functional_call(self.module, theta, inputs)

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


class LinearGraphLayer(Layer):
    """A graph convolution, linear in all parameters below it: ``ż`` is the layer with the direction for parameters."""

    def tangent(self, inputs, output, direction):
        absent = {n: torch.zeros_like(p) for n, p in self.module.named_parameters() if n not in self.names}
        parts = absent | dict(zip(self.names, direction, strict=True))
        return torch.func.functional_call(self.module, parts, inputs)


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
    return Layer


def _bends(convolution: nn.Module) -> bool:
    """Whether options make a graph convolution of ``LINEAR_GRAPH_LAYERS`` not linear: its linear parts are layers then.

    ``SAGEConv`` can scale its output to length 1 and put a layer with ReLU first; any aggregation may learn.
    """
    sage = type(convolution).__name__ == "SAGEConv" and (convolution.normalize or convolution.project)
    learned = any(True for _ in getattr(convolution, "aggr_module", nn.Identity()).parameters())
    return sage or learned


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of a model, in the order of ``named_modules``; frozen parameters are left out, shared ones counted
    once.

    A linear graph convolution owns all parameters below it (torch-geometric keeps the weight in a child), and so does a
    module that ``torch.nn.utils.parametrize`` computes the weight of; any other owns those that are its own attributes.
    A module of unknown type gets the generic rules (autograd for the gradient, forward mode for the tangent), right for
    any module that returns one tensor.

    Raises:
        TypeError: the model, or a part of it, is compiled: its layers' calls are not to be seen.
    """
    compiled = [name or "the model" for name, module in model.named_modules() if hasattr(module, "_orig_mod")]
    if compiled:
        raise TypeError(
            f"{compiled[0]} is compiled, and what its layers see cannot be captured: give the objective the plain "
            "model (its _orig_mod), or use an optimizer of gradients alone"
        )
    layers, seen, inside = [], set(), set()
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        kind = _kind(module)
        whole = kind is LinearGraphLayer or is_parametrized(module)
        parameters = {n: p for n, p in module.named_parameters(recurse=whole) if p.requires_grad and p not in seen}
        if whole:
            inside.add(name + ".")
        if parameters:
            seen.update(parameters.values())
            layers.append(kind(name, module, parameters))
    return layers


class Call:
    """One call of a layer in a forward pass: the layer, what went in, and what came out (before the tap).

    ``random_state`` is that before the call, of one that has drawn random numbers.

    Where the model computes in a lower precision than its parameters have (autocast), inputs and derivatives are handed
    out in the parameters' own, so that curvature is computed and kept in it.
    """

    def __init__(
        self, layer: Layer, inputs: tuple, output: Tensor | Ghost, random_state: RandomState | None = None
    ) -> None:
        self.layer = layer
        self._inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        self.output = output
        self._random_state = random_state

    @property
    def inputs(self) -> tuple:
        return tuple(self.precise(x) if isinstance(x, Tensor) else x for x in self._inputs)

    @inputs.setter
    def inputs(self, inputs: tuple) -> None:
        self._inputs = inputs

    def precise(self, x: Tensor) -> Tensor:
        """The same in the parameters' precision, where it has a lower one."""
        return x.to(self.layer.parameters[0].dtype) if x.dtype in (torch.bfloat16, torch.float16) else x

    def gradient(self, delta: Tensor) -> list[Tensor]:
        return self.layer.gradient(self.inputs, self.output, delta)

    def tangent(self, direction: Sequence[Tensor]) -> Tensor:
        if self._random_state is None:
            return self.layer.tangent(self.inputs, self.output, direction)
        with self._random_state.replayed():
            return self.layer.tangent_by_reverse(self.inputs, direction)

    def slopes(self, delta: Tensor, direction: Sequence[Tensor]) -> Tensor:
        """``⟨δ_i, ż_i⟩`` per example: ``(len(z),)``."""
        product = self.tangent(direction).mul_(delta)
        return product.flatten(1).sum(1) if product.dim() > 1 else product


class _Visitor:
    """Whom the taps of one trace report to. Holds no tensors, so that taps and their graph form no reference cycle."""

    visit: Callable[[Call, Tensor], None] | None = None


class _Tap(torch.autograd.Function):
    """The identity; backward reports its derivative to the visitor. The anchor makes autograd reach every tap."""

    @staticmethod
    def forward(ctx, output: Tensor, anchor: Tensor, call: Call, visitor: _Visitor) -> Tensor:
        ctx.call, ctx.visitor = call, visitor
        return output.detach()  # the same memory; an in-place activation behind the layer stays legal

    @staticmethod
    def backward(ctx, delta: Tensor):
        if ctx.visitor.visit is not None:
            precise = ctx.call.precise(delta)
            with torch.no_grad():
                ctx.visitor.visit(ctx.call, precise)
        return delta, None, None, None


class Trace:
    """One forward pass of a model with a tap behind every layer.

    Args:
        model: called as ``model(*inputs)``.
        layers: the layers to tap.
        inputs: the model's inputs.
        count: called with the work of each pass, in gradient-equivalents.
        keep_outputs: whether calls hold their outputs, or only what tangents ask of them: autograd itself does not
            keep them all.

    Attributes:
        outputs: the model's outputs, with graph.
        calls: the layers' calls in forward order; a layer used twice has two.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        inputs: tuple,
        count: Callable[[float], None],
        keep_outputs: bool = True,
    ) -> None:
        if not layers:
            raise ValueError("the model has no trainable parameters, so there is no layer to trace; unfreeze some")
        self.calls: list[Call] = []
        self._layers = layers
        self._count = count
        self._keep_outputs = keep_outputs
        self._visitor = _Visitor()
        self._anchor = torch.zeros((), device=layers[0].parameters[0].device, requires_grad=True)
        handles = [handle for layer in layers for handle in self._tapped(layer)]
        try:
            with torch.enable_grad():
                self.outputs = model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        count(FORWARD)

    def _tapped(self, layer: Layer) -> list:
        """Hooks that capture the layer's calls; the handles that remove them."""
        # a module of no known kind may draw random numbers, which its tangent has to draw again
        states, may_draw = [], type(layer) is Layer and layer.module.training

        def remember(module: nn.Module, inputs: tuple) -> None:
            states.append(RandomState(self._anchor.device))

        def tap(module: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # what the loss does not depend on by this call
                return output
            if not isinstance(output, Tensor):
                raise Untraceable(layer, f"returns {type(output).__name__}; only what returns one tensor can be traced")
            kept = output if self._keep_outputs else Ghost(output.shape, output.grad_fn)
            state = states.pop() if may_draw else None
            drawn = state if state is not None and state.has_advanced() else None
            call = Call(layer, positional(layer, inputs, named), kept, drawn)
            self.calls.append(call)
            return _Tap.apply(output, self._anchor, call, self._visitor)

        before = [layer.module.register_forward_pre_hook(remember)] if may_draw else []
        return [*before, layer.module.register_forward_hook(tap, with_kwargs=True)]

    def gradients(
        self, root: Tensor, cotangent: Tensor | None = None, retain_graph: bool = False
    ) -> dict[Layer, list[Tensor]]:
        """Weight gradients ``∂⟨cotangent, root⟩/∂θ`` of every layer; zero where the root does not depend on it.

        Args:
            root: the outputs, or a number made of them, with graph.
            cotangent: the root's shape; None: 1, of a number.
            retain_graph: keep the graph for another backward pass.
        """
        parameters = [p for layer in self._layers for p in layer.parameters]
        flat = torch.autograd.grad(
            root, parameters, cotangent, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
        )
        self._count(ACTIVATION_BACKWARD + WEIGHT_GRADIENT)
        flat = iter(flat)
        return {layer: [next(flat) for _ in layer.parameters] for layer in self._layers}

    def each_gradient(
        self, root: Tensor, visit: Callable[[nn.Parameter, Tensor], None], retain_graph: bool = False
    ) -> None:
        """``gradients`` of a number in passing: ``visit(parameter, gradient)`` as soon as there is one.

        Where the graph is not kept, nor are the outputs: their memory is the gradients'.
        """
        parameters = [p for layer in self._layers for p in layer.parameters]
        present = [p.grad for p in parameters]
        if not retain_graph:
            self.outputs = None

        def take(p: nn.Parameter) -> None:
            gradient, p.grad = p.grad, None
            with torch.no_grad():
                visit(p, gradient)

        handles = [p.register_post_accumulate_grad_hook(take) for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            torch.autograd.backward(root, retain_graph=retain_graph, inputs=parameters)
        finally:
            for p, handle, gradient in zip(parameters, handles, present, strict=True):
                handle.remove()
                p.grad = gradient
        self._count(ACTIVATION_BACKWARD + WEIGHT_GRADIENT)

    def backward(
        self,
        cotangent: Tensor,
        visit: Callable[[Call, Tensor], None],
        retain_graph: bool = False,
        create_graph: bool = False,
    ) -> None:
        """Propagate ``∂(Σ_i loss_i)/∂outputs`` back to all layers' outputs, and no weight gradients.

        Args:
            cotangent: the outputs' shape.
            visit: called with each call and its ``δ``, last layer first.
            retain_graph: keep the graph for another backward pass.
            create_graph: keep it, and let every ``δ`` have one of its own, back to the cotangent.
        """
        retain_graph = retain_graph or create_graph
        self._visitor.visit = visit
        try:
            torch.autograd.grad(
                self.outputs,
                self._anchor,
                cotangent,
                retain_graph=retain_graph,
                create_graph=create_graph,
                allow_unused=True,
            )
        finally:
            self._visitor.visit = None
        self._count(ACTIVATION_BACKWARD)


def positional(layer: Layer, inputs: tuple, named: dict) -> tuple:
    """A call's inputs in the order of the module's ``forward``, which is how they are kept."""
    if not named:
        return inputs
    bound = inspect.signature(type(layer.module).forward).bind(layer.module, *inputs, **named)
    if any(name in bound.kwargs for name in named):
        raise Untraceable(layer, f"is called with what has no position ({', '.join(bound.kwargs)})")
    bound.apply_defaults()
    return bound.args[1:]


@contextmanager
def frozen_statistics(module: nn.Module):
    """What training mode keeps track of stands still, the mode does not change: for second forward passes in one step.

    That is BatchNorm's and InstanceNorm's running statistics, and spectral normalisation's singular vectors.
    """
    with ExitStack() as stack:
        for m in module.modules():
            if not m.training:
                continue
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
                stack.enter_context(_set(m, "track_running_stats", False))
            elif isinstance(m, nn.modules.instancenorm._InstanceNorm) and m.track_running_stats:
                stack.enter_context(_set(m, "momentum", 0.0))
            elif isinstance(m, _SpectralNorm):
                stack.enter_context(_set(m, "training", False))
        yield


@contextmanager
def _set(module: nn.Module, name: str, value):
    """Within, an attribute is another."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
