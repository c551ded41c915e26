"""Divergence: when a run meets numbers that are not finite, and in which layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from optimizers.replay import frozen_statistics


class NotFinite(ArithmeticError):
    """A model's output holds NaN or infinity."""


def refuse_not_finite(model: torch.nn.Module, inputs: tuple, outputs: Tensor) -> None:
    """A forward hook: ends a training step before it spreads what is not finite over all weights.

    Raises:
        NotFinite: the model is in training mode and its outputs are not finite.
    """
    if model.training and not outputs.isfinite().all():
        raise NotFinite("the model's outputs are not finite")


def first_layer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple | None = None) -> str | None:
    """The layer where a step went wrong: the one with the most that is not finite, else the first whose output is not
    (on these inputs).

    Looked through are the method's diagnostics of layers, and where these tell nothing parameters, gradients, and what
    the optimizer keeps for them (curvature, factors). None where all layers have as much of it: then it has spread, and
    nothing can be told.
    """
    bad = Counter(_parts_not_finite(model, optimizer))
    if not bad.total():
        return None if inputs is None else _first_bad_output(model, inputs)
    layer, most = bad.most_common(1)[0]
    return None if len(bad) > 1 and min(bad.values()) == most else layer


def _parts_not_finite(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """By layer, how many of its numbers or tensors are not finite."""
    layers, diagnostics = dict(model.named_modules()), getattr(optimizer, "diagnostics", dict)()
    told = {name: sum(not _is_finite(v) for v in of.values()) for name, of in diagnostics.items() if name in layers}
    if any(told.values()):
        return told
    bad = Counter()
    for name, p in model.named_parameters():
        tensors = _tensors((p.detach(), p.grad, optimizer.state.get(p, {})))
        bad[name.rpartition(".")[0] or name] += sum(not _is_finite(tensor) for tensor in tensors)
    return bad


def _first_bad_output(model: torch.nn.Module, inputs: tuple) -> str | None:
    """The first layer with parameters whose output is not finite, in a forward pass."""
    found = []

    def look(name: str):
        def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
            if not _is_finite(output):
                found.append(name)

        return hook

    layers = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    handles = [module.register_forward_hook(look(name), prepend=True) for name, module in layers.items()]
    try:
        with torch.no_grad(), frozen_statistics(model):
            model(*inputs)
    except NotFinite:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_finite(value: Tensor | float) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


def _tensors(node) -> Iterator[Tensor]:
    """The floating-point tensors in a nest of dicts and sequences."""
    if isinstance(node, Tensor):
        if node.is_floating_point():
            yield node
    elif isinstance(node, dict | list | tuple):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _tensors(part)
