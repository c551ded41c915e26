r"""What each layer saw in a forward pass, and the derivatives at its output.

``Trace`` runs one forward pass and puts a *tap* behind each layer's output. A tap is the identity; in a backward pass
it hands ``(call, δ)`` to a visitor and lets ``δ`` flow on. ``Trace.backward`` asks autograd for nothing but the taps,
so it propagates derivatives of activations only (one third of a gradient) and forms no weight gradients; the visitor
forms those that it wants, and nothing per-example outlives its layer.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from optimizers.layers import (
    ACTIVATION_BACKWARD,
    FORWARD,
    WEIGHT_GRADIENT,
    Ghost,
    Layer,
    Named,
    Untraceable,
    first_tensor,
)
from optimizers.replay import RandomState


class Call:
    """One call of a layer in a forward pass: the layer, what went in, and what came out (before the tap).

    ``place`` is the layer, or that of its ``elsewhere`` whose module was called. ``random_state`` is that before the
    call, of one that has drawn random numbers.

    Where the model computes in a lower precision than its parameters have (autocast), inputs and derivatives are handed
    out in the parameters' own, so that curvature is computed and kept in it.
    """

    def __init__(
        self,
        layer: Layer,
        inputs: tuple,
        output: Tensor | Ghost,
        random_state: RandomState | None = None,
        place: Layer | None = None,
    ) -> None:
        self.layer = layer
        self.place = layer if place is None else place
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
        with nullcontext() if self._random_state is None else self._random_state.replayed():
            gradient = self.place.gradient(self.inputs, self.output, delta)
        if self.place is self.layer:
            return gradient
        here = dict(zip(self.place.parameters, gradient, strict=True))
        return [here[p] if p in here else torch.zeros_like(p) for p in self.layer.parameters]

    def tangent(self, direction: Sequence[Tensor]) -> Tensor:
        if self.place is not self.layer:
            parts = dict(zip(self.layer.parameters, direction, strict=True))
            direction = [parts[p] for p in self.place.parameters]
        if self._random_state is None:
            return self.place.tangent(self.inputs, self.output, direction)
        with self._random_state.replayed():
            return self.place.tangent_by_reverse(self.inputs, direction)

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
        places = defaultdict(list)
        for layer in layers:
            for place in (layer, *layer.elsewhere):
                places[place.module].append((layer, place))
        handles = [handle for module, here in places.items() for handle in self._tapped(module, here)]
        try:
            with torch.enable_grad():
                self.outputs = model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        count(FORWARD)

    def _tapped(self, module: nn.Module, places: list[tuple[Layer, Layer]]) -> list:
        """Hooks that capture a module's calls for each layer with a place in it; the handles that remove them."""
        # a module of no known kind may draw random numbers, which its tangent has to draw again
        states, may_draw = [], module.training and any(type(place) is Layer for _, place in places)

        def remember(module: nn.Module, inputs: tuple) -> None:
            states.append(RandomState(self._anchor.device))

        def tap(module: nn.Module, inputs: tuple, named: dict, returned: Tensor | tuple) -> Tensor | tuple:
            if not torch.is_grad_enabled():  # what the loss does not depend on by this call
                return returned
            tapped = output = first_tensor(returned)
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise Untraceable(places[0][0], f"returns {kind}; only what returns one tensor can be traced")
            kept = output if self._keep_outputs else Ghost(output.shape, output.grad_fn)
            state = states.pop() if may_draw else None
            drawn = state if state is not None and state.has_advanced() else None
            inputs = positional(module, inputs, named)
            for layer, place in places:
                call = Call(layer, inputs, kept, drawn, place)
                self.calls.append(call)
                tapped = _Tap.apply(tapped, self._anchor, call, self._visitor)
            return tapped if returned is output else (tapped, *returned[1:])

        before = [module.register_forward_pre_hook(remember)] if may_draw else []
        return [*before, module.register_forward_hook(tap, with_kwargs=True)]

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


def positional(module: nn.Module, inputs: tuple, named: dict) -> tuple:
    """A call's inputs in the order of the module's ``forward``, which is how they are kept; ``Named`` ones at last."""
    if not named:
        return inputs
    bound = inspect.signature(type(module).forward).bind(module, *inputs, **named)
    bound.apply_defaults()
    rest = {name: x.detach() if isinstance(x, Tensor) else x for name, x in bound.kwargs.items()}
    return (*bound.args[1:], Named(rest)) if rest else bound.args[1:]
