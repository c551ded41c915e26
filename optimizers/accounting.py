r"""Whether the layers' calls account for the gradient, and layers of which they do.

Curvature is measured in the calls of the modules that have parameters. But a parameter may act elsewhere: a model
multiplies by the weight of its embedding; a module is never called (``ParameterList``, the output projection of
``MultiheadAttention``), or returns more than what its calls tell of (the last state of an ``LSTM``). What is told is
then not the whole of it, and nothing would look wrong. By the chain rule the calls of layer ``l`` account for its
gradient if

    Σ_calls ⟨δ, ż(d)⟩ = ⟨g_l, d⟩,     ż(d) = (∂z/∂θ_l) d,

which is checked once, on the first examples that a model sees, with ``d = g_l / ‖g_l‖`` and ``g_l`` by autograd. A
layer that fails is *lifted*: the module around takes its place, in whose calls more happens, up to the model itself, in
whose call everything does. A lifted layer's tangent is one of a larger module, and so dearer.

And whether a pass made again is the same function: if not, a warning says so.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from optimizers.layers import Layer, Untraceable, find_layers, first_tensor
from optimizers.replay import RandomState, frozen_statistics
from optimizers.trace import Call, Trace

if TYPE_CHECKING:
    from optimizers.objective import Minibatch

#: Of the sum of its terms' absolute values, by how much the sum may differ: half precision in a model's forward,
#: and so many roundings of the parameters' own.
TOLERANCE, ROUNDINGS = 1e-2, 10

#: Enough to tell, and of less memory than a step.
EXAMPLES = 32


class Account(NamedTuple):
    """What a model's first passes have shown."""

    layers: list[Layer]
    rows_mix: bool = False
    """whether there are outputs of layers whose rows are not examples"""
    draws: bool = False
    """whether a pass draws random numbers"""


def account(minibatch: Minibatch) -> Account:
    """The model's layers, lifted until their calls account for the gradient, and what else their passes have shown.

    Waits for the device. Neither the work done nor any random state, gradient or buffer shows that it was called.

    Raises:
        Untraceable: the whole model's call does not account for a gradient either.
    """
    model = minibatch.objective.model
    layers = find_layers(model)
    if not layers:
        return Account(layers)
    random_state = RandomState(layers[0].parameters[0].device)
    with random_state.replayed(), frozen_statistics(model), _no_zeros(model):
        layers, rows_mix = _accounting_by_few(layers, minibatch)
        draws = random_state.has_advanced()
        _warn_of_another_function(minibatch, random_state)
        return Account(layers, rows_mix, draws)


def _warn_of_another_function(minibatch: Minibatch, random_state: RandomState) -> None:
    """What is measured beside the gradient is of the same function only if a pass made again gives the same."""
    model, passes = minibatch.objective.model, []
    for _ in range(2):
        with torch.no_grad(), random_state.replayed(), frozen_statistics(model):
            passes.append(first_tensor(model(*minibatch.inputs)))
    first, again = passes
    if isinstance(first, Tensor) and (first - again).norm() > TOLERANCE * first.norm():
        warnings.warn(
            f"{type(model).__name__} gives other outputs when it is called with the same inputs again (it changes them "
            "in place, draws random numbers that are not torch's global ones, or carries a state from call to call): "
            "what is measured beside the gradient is then of another function than the gradient",
            stacklevel=2,
        )


def _accounting_by_few(layers: list[Layer], minibatch: Minibatch) -> tuple[list[Layer], bool]:
    """Layers that account for the gradient, by some of the examples; and whether rows are not examples."""
    some = minibatch.first(EXAMPLES)
    if some is minibatch:
        return _accounting(layers, minibatch), False
    try:  # with another number of examples what is not one of them has another number of rows
        layers = _accounting(layers, some)
        return layers, some.mixes(_trace(some, layers))
    except Untraceable:
        raise
    except Exception:  # a model for batches of one size; what else is wrong is wrong with all of them too
        return _accounting(layers, minibatch), True


def _accounting(layers: list[Layer], minibatch: Minibatch) -> list[Layer]:
    while unaccounted := _unaccounted(minibatch, layers):
        layers = [_lifted(layer, minibatch.objective.model) if layer in unaccounted else layer for layer in layers]
    return layers


@contextmanager
def _no_zeros(model: nn.Module):
    """Within, parameters of zero are not, for a gradient of zero tells nothing."""
    zero = [p for p in model.parameters() if p.requires_grad and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in zero:
            p.copy_(torch.randn(p.shape, generator=generator) / 10)
        try:
            yield
        finally:
            for p in zero:
                p.zero_()


def _trace(minibatch: Minibatch, layers: list[Layer]) -> Trace:
    return Trace(minibatch.objective.model, layers, minibatch.inputs, lambda work: None, keep_outputs=False)


def _unaccounted(minibatch: Minibatch, layers: list[Layer]) -> list[Layer]:
    try:
        trace = _trace(minibatch, layers)
        with torch.enable_grad():
            loss = minibatch.losses(trace.outputs).sum()
        gradients = trace.gradients(loss, retain_graph=True)
        lengths = torch.stack([_normalise(layer, gradient) for layer, gradient in gradients.items()]).to(loss.dtype)
        slopes: dict[Layer, list[Tensor]] = {layer: [loss.new_zeros(2)] for layer in layers}
        dtypes = {p.dtype for layer in layers for p in layer.parameters}

        def visit(call: Call, delta: Tensor) -> None:
            dtypes.add(delta.dtype)  # lower than the parameters' under autocast
            terms = call.slopes(delta, gradients[call.layer])
            slopes[call.layer].append(torch.stack([terms.sum(), terms.abs().sum()]).to(loss.dtype))

        trace.backward(torch.autograd.grad(loss, trace.outputs, retain_graph=True)[0], visit)
    except Untraceable as error:
        layer = next(layer for layer in layers if error.layer in (layer, *layer.elsewhere))
        if error.final or (layer.module is minibatch.objective.model and not layer.elsewhere):
            raise
        return [layer]
    seen, size = torch.stack([sum(slopes[layer]) for layer in layers]).unbind(1)
    tolerance = max(TOLERANCE, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in dtypes))
    differ = (seen - lengths).abs() > tolerance * torch.maximum(size, lengths)  # of what is not finite nothing is known
    return [layer for layer, differs in zip(layers, differ.tolist(), strict=True) if differs]


def _normalise(layer: Layer, gradient: list[Tensor]) -> Tensor:
    """Give a gradient length 1; the length that it had."""
    if any(g.layout != torch.strided for g in gradient):
        raise Untraceable(layer, "has a sparse gradient (type sparse=False)", final=True)
    length = torch.stack(torch._foreach_norm(gradient)).norm()
    divisor = length.clamp_min(torch.finfo(length.dtype).tiny)
    gradient[:] = [g / divisor for g in gradient]  # autograd may have expanded one, which is not to be written to
    return length


def _lifted(layer: Layer, model: nn.Module) -> Layer:
    """The same parameters in the calls of the module around, or of the model alone."""
    if layer.module is model and layer.elsewhere:
        return Layer(layer.name, model, dict(zip(layer.names, layer.parameters, strict=True)))
    if layer.module is model:
        raise Untraceable(
            layer,
            f"has a gradient in '{layer.names[0]}' that the model's call does not account for: something makes it "
            "another than the loss's (scale_grad_by_freq=True, a hook, a function with a backward pass of its own)",
        )
    path = next(name for name, module in model.named_modules() if module is layer.module)
    around, _, name = path.rpartition(".")
    parameters = {f"{name}.{n}": p for n, p in zip(layer.names, layer.parameters, strict=True)}
    return Layer(layer.name, model.get_submodule(around), parameters)
