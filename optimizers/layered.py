"""What every optimizer that works on layers does alike: find them through the objective, and each one's group."""

from __future__ import annotations

import functools
import inspect
import zlib

import torch
from torch import Tensor

from optimizers.layers import Layer
from optimizers.objective import Minibatch


class LayeredOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose step takes a minibatch that knows its layers."""

    #: Whether a batch may come in parts, over processes (``optimizers.parallel``) or time (``.accumulation``).
    takes_parts = False

    _layers: list[Layer] = []  # noqa: RUF012 - never changed in place

    def find_layers(self, closure: Minibatch) -> list[Layer]:
        """The layers of the closure's model.

        Raises:
            TypeError: the closure is not a minibatch of an ``optimizers.Objective``.
            NotImplementedError: the minibatch is in parts, and the method needs it whole.
            Untraceable: a layer's calls can not be captured; a ``TypeError`` too.
            RuntimeError: called under autocast.
            ValueError: the parameter groups do not hold all of the model's trainable parameters, or others too.
        """
        device = self.first.device.type
        if torch.is_autocast_enabled(device):
            raise RuntimeError(
                f"{type(self).__name__}.step was called under autocast, which would round curvature: put autocast into "
                "the model's forward alone, and return float32 outputs from there"
            )
        if not isinstance(closure, Minibatch):
            raise TypeError(
                f"{type(self).__name__}.step needs a minibatch that knows its layers, not {type(closure).__name__}: "
                "objective = Objective(model, likelihood) once, then optimizer.step(objective(inputs, targets))"
            )
        if closure.ranks * closure.parts > 1 and not self.takes_parts:
            raise NotImplementedError(
                f"{type(self).__name__} measures its layers on the whole batch at once, on one process; the layer-wise "
                "methods and those of gradients alone take batches in parts"
            )
        layers = closure.objective.account(closure)
        # groups are looked up anew each step: load_state_dict puts new ones in place of those that it finds
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        if layers is not self._layers:
            for layer in layers:
                for name, p in zip(layer.names, layer.parameters, strict=True):
                    if p not in self._group_of:
                        raise ValueError(
                            f"parameter '{layer.name}.{name}' is trainable but in none of the optimizer's groups: "
                            "pass model.parameters(), or freeze it with requires_grad_(False)"
                        )
            if not self.state:  # later on there are those of modules that were replaced
                self._refuse_foreign(layers)
            self._layers = layers
        return layers

    def _refuse_foreign(self, layers: list[Layer]) -> None:
        """Parameters that are in no layer would never move, and nothing would say so."""
        known = {p for layer in layers for p in layer.parameters}
        for p in self._group_of:
            if p.requires_grad and p not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} in {type(self).__name__}'s groups is none of the model's: "
                    "it steps on the layers of one model alone; give this one an optimizer of its own"
                )

    def add_param_group(self, param_group: dict) -> None:
        """As of every optimizer.

        Raises:
            ValueError: a group sets what is one for all of them, or out of its range.
        """
        arguments = {name for kind in type(self).__mro__ for name in inspect.signature(kind.__init__).parameters}
        for name in sorted(arguments & set(param_group) - {"params", *self.defaults}):
            raise ValueError(
                f"{type(self).__name__} has one {name} for all groups; a group may have its own "
                f"{', '.join(self.defaults)}"
            )
        super().add_param_group(param_group)
        self.check_group(self.param_groups[-1])

    def check_group(self, group: dict) -> None:
        """Refuse a group's settings that are out of their range: of those that have one meaning in all methods."""
        for name in ("lr", "weight_decay"):
            check(group[name] >= 0, name, group[name], "at least 0")
        momentum, betas, eps = group.get("momentum", 0.0), group.get("betas", (0.0, 0.0)), group.get("eps", 1.0)
        check(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        check(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", betas, "two numbers in [0, 1)")
        check(eps > 0, "eps", eps, "positive")

    @property
    def first(self) -> Tensor:
        """The first parameter, whose state holds what is no parameter's own, so that ``state_dict`` carries it."""
        return next(p for group in self.param_groups for p in group["params"])

    @property
    def layer_names(self) -> int:
        """A number that tells by their names which layers there are; torch loads no text in states."""
        return zlib.crc32("\n".join(layer.name for layer in self._layers).encode())

    def fill_gradients(self, closure: Minibatch) -> Tensor:
        """Fill the layers' ``.grad``, with zero where the loss does not depend on a parameter; the loss."""
        loss = closure()
        for layer in self._layers:
            for p in layer.parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        return loss

    def __getstate__(self) -> dict:
        """For copies and pickles: torch's keeps no settings. Layers are found anew, a scheduler's ``step`` stays."""
        found = ("_layers", "_parameters", "_group_of", "_ages", "step")
        return {name: value for name, value in self.__dict__.items() if name not in found}

    def state_dict(self) -> dict:
        """As of every optimizer, and beside it ``method`` and ``shapes``: whose it is."""
        return super().state_dict() | self._identity()

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is another method's, or of a model with other parameters.
        """
        mine = self._identity()
        method = state_dict.get("method", "another optimizer")
        if method != mine["method"]:
            raise ValueError(f"this is a state of {method}; {mine['method']} can only load its own")
        if state_dict["shapes"] != mine["shapes"]:
            raise ValueError(
                f"this state is of another model: of parameters of shapes {state_dict['shapes']}, not {mine['shapes']}"
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in mine})
        # what is no parameter's own torch would keep in the first one's number format
        for name, value in state_dict["state"].get(0, {}).items():
            if isinstance(value, dict):
                self.state[self.first][name] = {key: self._taken(part) for key, part in value.items()}

    def _taken(self, value):
        return value.to(self.first.device, copy=True) if isinstance(value, Tensor) else value

    def _identity(self) -> dict:
        shapes = [list(p.shape) for group in self.param_groups for p in group["params"]]
        return {"method": type(self).__name__, "shapes": shapes}

    def group(self, parameter: Tensor) -> dict:
        """The parameter group that holds a parameter."""
        return self._group_of[parameter]

    def buffer(self, parameter: Tensor, name: str = "momentum_buffer") -> Tensor:
        """What the optimizer keeps of a parameter under that name, of its shape; zero until something is added."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]

    def restart(self, parameter: Tensor) -> None:
        """Let go of a layer's curvature, kept with its first parameter, where a part has been frozen or unfrozen."""
        kept = ("momentum_buffer", "step_count")
        self.state[parameter] = {name: value for name, value in self.state[parameter].items() if name in kept}

    def decayed_gradient(self, parameter: Tensor) -> Tensor:
        """``g + w θ``: the gradient of the loss plus ``½ w ‖θ‖²``."""
        decay = self.group(parameter)["weight_decay"]
        return parameter.grad.add(parameter, alpha=decay) if decay else parameter.grad

    def move(self, parameter: Tensor, direction: Tensor) -> None:
        """``θ ← (1 − α w) θ − α d``, in place: a step with decoupled decay."""
        group = self.group(parameter)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])


def dot(xs, ys) -> Tensor:
    """The inner product of two lists of tensors."""
    products = (torch.vdot(x.flatten(), y.flatten()) for x, y in zip(xs, ys, strict=True))
    return functools.reduce(torch.add, products)  # sum() would add the first to a zero


def check(ok: bool, name: str, value, wanted: str) -> None:
    """Refuse an argument that is out of its range."""
    if not ok:
        raise ValueError(f"{name}={value} is impossible: it must be {wanted}")
