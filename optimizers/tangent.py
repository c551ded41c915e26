r"""The curvature of the loss along a direction, ``c(u) = ⟨Hu, u⟩``, for less than a Hessian–vector product.

Let the network be made of maps ``x⁺ = F(x, θ)`` with adjoints ``λ`` at their outputs, as the backward pass leaves them,
and let ``ẋ`` be the tangents of the activations as ``θ`` moves along ``u``. Then, exactly,

    c(u) = ⟨ż, ∇²ℓ ż⟩ + Σ_F ⟨λ, D²F[(ẋ, u_F)²]⟩        (ż: tangent of the network's output),

so one tangent pass with the stored adjoints does, and no second backward pass. Sums, pooling and ReLU have no second
derivative. Linear layers, convolutions and graph convolutions are bilinear in ``(x, θ)``: along ``(ẋ, u)`` they are
quadratic polynomials, whose central differences are exact for any ``ε``,

    ẋ⁺ = (P₊ − P₋) / 2ε,     D²F[(ẋ, u)²] = (P₊ + P₋ − 2 F(x, θ)) / ε²,     P_± = F(x ± εẋ, θ ± εu):

two products where ``Wẋ``, ``Ux`` and ``Uẋ`` would be three. BatchNorm in training mode has a closed form; every other
layer or activation is differentiated twice by itself.

By count of products a gradient is 3 and the tangent pass 2, so 5/3 C in all with activations kept (2M: those and the
adjoints). With ``recompute=True`` the backward pass frees activations while adjoints appear, and the tangent pass makes
them anew: 2C, 1M.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from optimizers.layered import dot
from optimizers.layers import (
    FORWARD,
    TANGENT,
    ConvolutionLayer,
    EmbeddingBagLayer,
    EmbeddingLayer,
    Layer,
    LinearGraphLayer,
    LinearLayer,
    called,
)
from optimizers.objective import Minibatch
from optimizers.replay import RandomState, frozen_statistics
from optimizers.trace import Call, Trace, positional

_BILINEAR = (LinearLayer, ConvolutionLayer, LinearGraphLayer, EmbeddingLayer, EmbeddingBagLayer)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.RReLU, nn.Hardshrink, nn.Softshrink, nn.Threshold)
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Curvature:
    """A gradient and, for any direction, ``c(u) = ⟨Hu, u⟩`` of the minibatch's mean loss.

    Made, it has filled ``.grad`` and holds the adjoints; called, it runs the tangent pass.

    Args:
        minibatch: the minibatch.
        recompute: free activations in the backward pass and compute them again in the tangent pass.

    Raises:
        NotImplementedError: a layer's module holds another layer's, or returns a tuple; or layers share parameters.

    Attributes:
        loss: the mean loss, detached.
    """

    def __init__(self, minibatch: Minibatch, recompute: bool = False) -> None:
        self.minibatch, self.recompute = minibatch, recompute
        model, layers = minibatch.objective.model, minibatch.objective.layers
        _check_apart(layers)
        self._random_state = RandomState(layers[0].parameters[0].device)
        trace = Trace(model, [*layers, *_activations(model, layers)], minibatch.inputs, minibatch.count)
        self._calls, self._outputs = trace.calls, trace.outputs.detach()
        self._adjoints: dict[Call, Tensor] = {}
        for call in trace.calls:
            if call.output.requires_grad:  # not ahead of the first parameter that is trained
                call.output.register_hook(partial(self._adjoints.__setitem__, call))
            call.inputs, call.output = (), (None if recompute else call.output.detach())
        self.loss = minibatch.fill_gradients(trace)

    @torch.no_grad()
    def __call__(self, direction: dict[Tensor, Tensor]) -> Tensor:
        """``c(u)`` for ``u`` by parameter."""
        minibatch, model, calls = self.minibatch, self.minibatch.objective.model, iter(self._calls)
        self._terms: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(frozen_statistics(model))
            stack.enter_context(self._random_state.replayed())
            stack.enter_context(forward_ad.dual_level())
            for module in {call.layer.module for call in self._calls}:
                forward = self._tangent_forward(module, calls, direction)
                stack.enter_context(_forward_replaced(module, forward))
            tangent = forward_ad.unpack_dual(model(*minibatch.inputs)).tangent
        minibatch.count(2 * TANGENT + (FORWARD if self.recompute else 0))
        curved = minibatch.hessian_product(self._outputs, tangent) / minibatch.size
        self._terms.append(dot([curved], [tangent]))
        self._terms += [
            w * dot([direction[p]], [direction[p]]) for p, w in minibatch.objective.penalty.items() if p in direction
        ]
        return torch.stack(self._terms).sum()

    def check(self, direction: dict[Tensor, Tensor], curvature: Tensor) -> None:
        """Compare ``c(u)`` with a Hessian–vector product; waits for the device.

        Raises:
            RuntimeError: they differ by more than rounding, relative to the sum's terms.
        """
        exact = hessian_quadratic(self.minibatch, direction, self._random_state)
        if (curvature - exact).abs() > 1e-2 * torch.stack(self._terms).abs().sum():
            raise RuntimeError(
                f"the curvature along the step is {exact.item():.6g}, but its layers' terms sum to "
                f"{curvature.item():.6g}: the model calls a smooth function that is not a module, or an activation "
                "changes its input in place; use modules (nn.GELU(), not F.gelu) with inplace=False"
            )

    def _tangent_forward(self, module: nn.Module, calls: Iterator[Call], direction: dict[Tensor, Tensor]):
        """A layer's forward in the tangent pass: outputs with tangents; its second derivative joins the terms."""
        original = module.__dict__.get("forward")

        def forward(*inputs, **named) -> Tensor:
            call = next(calls)
            inputs = positional(module, inputs, named)
            x, tangent = _with_tangent(inputs[0])
            u = [direction[p] for p in call.layer.parameters]
            rule = _rule(call.layer)
            with _forward_replaced(module, original):
                z, dot_z, second = rule(call, (x, *inputs[1:]), tangent, u, self._adjoints.get(call))
            if second is not None:
                self._terms.append(second)
            return forward_ad.make_dual(z, dot_z)

        return forward


def _check_apart(layers: list[Layer]) -> None:
    """A second derivative is of one layer alone; of one inside another it would be counted twice."""
    for layer in layers:
        if layer.elsewhere:
            raise NotImplementedError(
                f"layers '{layer.name}' and '{layer.elsewhere[0].name}' share parameters: the curvature along a "
                "direction is a sum over layers that do not, so take another optimizer for this model"
            )
        inside = {*layer.module.modules()}
        for other in layers:
            if other is not layer and other.module in inside and not isinstance(layer, LinearGraphLayer):
                raise NotImplementedError(
                    f"layer '{layer.name}' ({type(layer.module).__name__}) holds layer '{other.name}': the curvature "
                    "along a direction is a sum over layers that do not, so take another optimizer for this model"
                )


def _with_tangent(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor and its tangent; a sparse one is data, which has none."""
    return forward_ad.unpack_dual(x) if x.layout == torch.strided else (x, None)


def _rule(layer: Layer):
    if isinstance(layer, _BILINEAR):
        return _bilinear
    norm = layer.module
    if isinstance(norm, _BATCH_NORM) and (norm.training or norm.running_mean is None):
        return _batch_norm
    return _general


def _bilinear(call: Call, inputs: tuple, tangent: Tensor | None, u: list[Tensor], adjoint: Tensor | None):
    """Output, its tangent and ``⟨λ, D²F[(ẋ,u)²]⟩`` of a layer bilinear in its input and its parameters."""
    layer, theta = call.layer, [p.detach() for p in call.layer.parameters]
    z = _apply(layer, inputs, theta) if call.output is None else call.output
    if tangent is None:
        return z, layer.tangent(inputs, z, u), None
    # ε makes εu as long as θ: exact for any ε, but for rounding
    ratio = torch.stack(torch._foreach_norm(theta)).norm() / torch.stack(torch._foreach_norm(u)).norm()
    epsilon = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
    x, opposite = inputs[0], -epsilon
    plus = _apply(layer, (torch.addcmul(x, tangent, epsilon), *inputs[1:]), _moved(theta, u, epsilon))
    minus = _apply(layer, (torch.addcmul(x, tangent, opposite), *inputs[1:]), _moved(theta, u, opposite))
    dot_z = (plus - minus).mul_(0.5 / epsilon)
    if adjoint is None:  # the loss does not depend on this call
        return z, dot_z, None
    return z, dot_z, dot([adjoint], [plus.add_(minus).sub_(z, alpha=2)]) / epsilon**2


def _moved(theta: list[Tensor], u: list[Tensor], t: Tensor) -> list[Tensor]:
    return [torch.addcmul(p, d, t) for p, d in zip(theta, u, strict=True)]


def _batch_norm(call: Call, inputs: tuple, tangent: Tensor | None, u: list[Tensor], adjoint: Tensor | None):
    """The same of BatchNorm with the batch's statistics: ``γ x̂ + β``, ``x̂ = s x̄``, ``s = (mean x̄² + eps)^-½``."""
    norm, x, d = call.layer.module, inputs[0], dict(zip(call.layer.names, u, strict=True))
    dims = [i for i in range(x.dim()) if i != 1]
    shape = [-1 if i == 1 else 1 for i in range(x.dim())]
    gamma = norm.weight.detach().view(shape) if norm.affine else 1.0
    dot_gamma, dot_beta = (d[n].view(shape) if n in d else x.new_zeros(()) for n in ("weight", "bias"))
    centred = x - x.mean(dims, keepdim=True)
    moved = torch.zeros_like(x) if tangent is None else tangent - tangent.mean(dims, keepdim=True)
    count = x.numel() // x.shape[1]
    variance, spread = (torch.linalg.vector_norm(t, dim=dims, keepdim=True) ** 2 / count for t in (centred, moved))
    s = (variance + norm.eps).rsqrt()
    cross = (centred * moved).sum(dims, keepdim=True) / count  # the variance is variance + 2 cross t + spread t²
    dot_s, ddot_s = -(s**3) * cross, 3 * s**5 * cross**2 - s**3 * spread
    z = call.output
    if z is None:
        z = centred * (gamma * s) if norm.bias is None else torch.addcmul(norm.bias.view(shape), centred, gamma * s)
    dot_z = torch.addcmul(dot_beta, moved, gamma * s).addcmul_(centred, gamma * dot_s + dot_gamma * s)
    if adjoint is None:
        return z, dot_z, None
    a, b = (adjoint * moved).sum(dims, keepdim=True), (adjoint * centred).sum(dims, keepdim=True)
    return z, dot_z, (gamma * (2 * dot_s * a + ddot_s * b) + 2 * dot_gamma * (s * a + dot_s * b)).sum()


def _general(call: Call, inputs: tuple, tangent: Tensor | None, u: list[Tensor], adjoint: Tensor | None):
    """The same of any layer or activation: forward mode for the tangent, reverse mode twice for the second."""
    x, theta = inputs[0], [p.detach() for p in call.layer.parameters]
    duals = [forward_ad.make_dual(p, d) for p, d in zip(theta, u, strict=True)]
    if x.is_floating_point():  # an index stands still
        tangent = torch.zeros_like(x) if tangent is None else tangent
        z = _apply(call.layer, (forward_ad.make_dual(x, tangent), *inputs[1:]), duals)
    else:
        z = _apply(call.layer, inputs, duals)
    if not isinstance(z, Tensor):
        raise NotImplementedError(
            f"layer '{call.layer.name}' ({type(call.layer.module).__name__}) returns a tuple, and the curvature along "
            "a direction is a sum over layers that return one tensor: take another optimizer for this model"
        )
    z, dot_z = forward_ad.unpack_dual(z)
    if adjoint is None:
        return z, dot_z, None
    with torch.enable_grad():
        t = adjoint.new_zeros((), requires_grad=True)
        moved_x = x + t * tangent if x.is_floating_point() else x
        moved = _apply(call.layer, (moved_x, *inputs[1:]), _moved(theta, u, t))
        slope = torch.autograd.grad(moved, t, adjoint, create_graph=True)[0]
        second = torch.autograd.grad(slope, t)[0] if slope.requires_grad else None
    return z, dot_z, second


def _apply(layer: Layer, inputs: tuple, parameters: list[Tensor]) -> Tensor:
    return called(layer.module, dict(zip(layer.names, parameters, strict=True)), inputs)


def _activations(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """Modules without trainable parameters that may have a second derivative, as layers."""
    known = {layer.module for layer in layers}

    def curved(module: nn.Module) -> bool:
        activation = type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, _PIECEWISE_LINEAR)
        return (activation or isinstance(module, _NORMALISATIONS)) and module not in known

    return [Layer(name, module, {}) for name, module in model.named_modules() if curved(module)]


@contextmanager
def named_where_missing():
    """Within, a derivative that torch does not have is said to be what is missing.

    Raises:
        NotImplementedError: in place of torch's own errors.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "implemented" not in str(error):
            raise
        missing = str(error).split(".")[0]
        raise NotImplementedError(
            f"the curvature along a direction needs a derivative that torch does not have ({missing}): "
            "take another optimizer for this model"
        ) from None


@contextmanager
def _forward_replaced(module: nn.Module, forward):
    """Within, a module's ``forward`` is another, or for None its class's own."""
    before = module.__dict__.pop("forward", None)
    if forward is not None:
        module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.forward = before


def hessian_quadratic(minibatch: Minibatch, direction: dict[Tensor, Tensor], random_state: RandomState) -> Tensor:
    """``⟨Hu, u⟩`` by differentiating the gradient again, from a forward pass of its own: the reference."""
    model, parameters = minibatch.objective.model, list(direction)
    with torch.enable_grad(), frozen_statistics(model), random_state.replayed():
        loss = minibatch.loss(model(*minibatch.inputs))
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        products = torch.autograd.grad(dot(gradients, direction.values()), parameters, materialize_grads=True)
    return dot(products, direction.values())
