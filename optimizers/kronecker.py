r"""What KFAC, Shampoo, TNT and MBF share: averaged curvature factors, inverted now and then, applied to momentum.

All four step by

    M ← β M + g,      θ ← θ − α (P M + w θ),

with ``P`` the inverse (or inverse root) of an approximation of curvature that is a Kronecker product of small matrices,
the *factors*, one set per *block* of parameters:

    F_i ← ρ F_i + (1 − ρ) (statistic of the minibatch)           every T₁ steps,
    inverses of F_i + damping                                    every T₂ steps; every T₁ steps before the first T₂.

This is the recursion of the public code of this group (read there): momentum is plain, not averaged; the average is
over raw statistics; decay is decoupled and multiplied by the rate. A method adds what its blocks are, what is measured,
how a factor is damped and which power is taken.

**First values.** The papers' code fills the factors by one pass over the data before the first step: ``start``, which
the caller makes, for ``step`` sees one minibatch at a time. Without it the ``t``-th update has weight ``max(1 − ρ,
1/t)``: the first minibatch is the first value, and a plain mean grows into the running average; nothing is biased
towards zero. (That is what the same code does with its first pass switched off.) It matters: at the published settings
TNT diverges on the MNIST autoencoder without the pass, and agrees with the published curve after it.

**Faults.** A statistic that is not finite is left out. Damping below what the arithmetic resolves is raised to ``ε tr
F`` (``ε`` the machine's). A matrix that still has no Cholesky factor keeps its last inverse. Each is counted per layer
and told by ``diagnostics``; none waits for the device.

======  ==================  =====================================
symbol  argument            meaning
======  ==================  =====================================
``α``   ``lr``              per group; schedulers act on it
–       ``damping``         per group; its meaning is the method's
``β``   ``momentum``        per group
``w``   ``weight_decay``    per group; decoupled
``ρ``   ``averaging``       weight of the past in the factors
``T₁``  ``update_every``    steps between statistics
``T₂``  ``refresh_every``   steps between inversions
======  ==================  =====================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from optimizers.layered import LayeredOptimizer, check
from optimizers.layers import Layer
from optimizers.objective import Minibatch
from optimizers.replay import frozen_statistics


class Block:
    """Parameters of one layer that are preconditioned together, as one tensor.

    Args:
        layer: their layer.
        parameters: they are flattened behind the leading dimensions and joined along the last one: ``[W|b]``.
        leading: the leading dimensions, e.g. ``(out,)`` for a matrix, ``(out, in)`` for a stack of kernels.
    """

    def __init__(self, layer: Layer, parameters: Sequence[torch.nn.Parameter], leading: Sequence[int]) -> None:
        self.layer = layer
        self.parameters = tuple(parameters)
        self.leading = tuple(leading)
        self.widths = [p.reshape(*self.leading, -1).shape[-1] for p in self.parameters]

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """One tensor ``(*leading, width)`` from one per parameter."""
        parts = [t.reshape(*self.leading, -1) for t in tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of ``join``."""
        parts = tensor.split(self.widths, -1)
        return [part.reshape(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


Statistics = dict[Block, list[Tensor]]


class Kronecker(LayeredOptimizer):
    """The recursion above; a method defines ``_blocks_of``, ``_measure``, and where it differs the hooks below them.

    Args:
        params: parameters or parameter groups; together they must hold every trainable parameter of the model.
        lr: ``α`` ≥ 0.
        damping: > 0.
        momentum: ``β`` in [0, 1).
        weight_decay: ``w`` ≥ 0.
        averaging: ``ρ`` in [0, 1).
        update_every: ``T₁`` ≥ 1.
        refresh_every: ``T₂`` ≥ 1.
        refresh_early: invert with every statistic before the first ``T₂`` steps are over.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        damping: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        averaging: float = 0.9,
        update_every: int = 1,
        refresh_every: int = 20,
        refresh_early: bool = True,
    ) -> None:
        check(0 <= averaging < 1, "averaging", averaging, "in [0, 1)")
        check(update_every >= 1, "update_every", update_every, "at least 1")
        check(refresh_every >= 1, "refresh_every", refresh_every, "at least 1")
        super().__init__(params, {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay})
        self.averaging, self.update_every = averaging, update_every
        self.refresh_every, self.refresh_early = refresh_every, refresh_early
        self._blocks: list[Block] = []

    def check_group(self, group: dict) -> None:
        super().check_group(group)
        check(group["damping"] > 0, "damping", group["damping"], "positive")

    @torch.no_grad()
    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``.

        Returns:
            The minibatch's mean loss before the step, detached.

        Raises:
            TypeError: the closure is not a minibatch of an ``optimizers.Objective``.
            NotImplementedError: a layer that the method does not support.
            ValueError: a trainable parameter is in no group.
        """
        changed = self._find_blocks(closure)
        step = self.state[self.first].get("step_count", 0)
        updating = changed or step % self.update_every == 0
        if updating:
            loss, statistics = self._measure(closure)
            self._average(statistics, 1 - self.averaging)
        else:
            loss = self.fill_gradients(closure)
        early = self.refresh_early and updating and step < self.refresh_every
        if changed or early or step % self.refresh_every == 0:
            self._refresh()
        for block in self._blocks:
            self._move(block)
        self.state[self.first]["step_count"] = step + 1
        return loss

    @torch.no_grad()
    def start(self, minibatches: Iterable[Minibatch]) -> None:
        """Fill the factors with the plain mean over these minibatches, before the first step; optional."""
        for minibatch in minibatches:
            self._find_blocks(minibatch)
            with frozen_statistics(minibatch.objective.model):
                self._average(self._measure(minibatch)[1], 0.0)

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """By layer: how many statistics were skipped, dampings raised, and last inverses kept, so far."""
        names = ("skipped_statistics", "raised_dampings", "kept_inverses")
        counts: dict[str, Tensor] = {}
        for block in self._blocks:
            if "faults" in self.state[block.parameters[0]]:
                faults = self.state[block.parameters[0]]["faults"]
                counts[block.layer.name] = counts.get(block.layer.name, 0) + faults
        return {layer: dict(zip(names, faults.unbind(), strict=True)) for layer, faults in counts.items()}

    # The method -------------------------------------------------------------------------------------------------------

    def _blocks_of(self, layer: Layer) -> list[Block]:
        """How a layer's parameters are divided into blocks; every parameter in one."""
        raise NotImplementedError

    def _measure(self, minibatch: Minibatch) -> tuple[Tensor, Statistics]:
        """Fill ``.grad``; return the loss and the statistics. A block without any takes the plain gradient."""
        raise NotImplementedError

    def _damped(self, block: Block, factors: list[Tensor]) -> list[tuple[Tensor, float]]:
        """Each factor as it is inverted, ``(…, n, n)``, and what is added to its diagonal."""
        damping = self.group(block.parameters[0])["damping"]
        return [(factor, damping) for factor in factors]

    def _exponent(self, block: Block) -> float:
        """The power of the damped factors."""
        return -1.0

    def _apply(self, block: Block, inverses: list[Tensor], tensor: Tensor) -> Tensor:
        """``P M``: by default one inverse per mode of the tensor."""
        for inverse in inverses:  # each takes the first mode and puts it last: after all, the order is restored
            tensor = torch.tensordot(tensor, inverse, dims=([0], [0]))
        return tensor

    # The recursion ----------------------------------------------------------------------------------------------------

    def _find_blocks(self, minibatch: Minibatch) -> bool:
        """Whether there are other blocks than before, of which nothing is known; ``members`` tells so after a load."""
        known = self._layers
        layers = self.find_layers(minibatch)
        if layers is known:
            return False
        check_precision(layers)
        stepped, before = "step_count" in self.state[self.first], {block.parameters[0] for block in self._blocks}
        self._blocks = [block for layer in layers for block in self._blocks_of(layer)]
        unknown = False
        for block in self._blocks:
            first, members = block.parameters[0], len(block.parameters)
            if self.state[first].get("members") != members:
                self.restart(first)
                self.state[first]["members"] = members
                unknown = True
            unknown |= bool(before) and first not in before
        return stepped and unknown

    def _average(self, statistics: Statistics, least: float) -> None:
        """Take statistics into the factors' averages, with a weight of at least ``least``."""
        for block, new in statistics.items():
            state = self.state[block.parameters[0]]
            if "factors" not in state:
                state["factors"] = [torch.zeros_like(factor) for factor in new]
                state["faults"] = new[0].new_zeros(3)
                state["updates"] = new[0].new_zeros(())  # those that were finite
            # factors are sums of outer products: what is not finite in one shows on its diagonal
            finite = torch.stack([_diagonal(factor).isfinite().all() for factor in new]).all()
            state["updates"] = state["updates"] + finite
            weight = (1 / state["updates"].clamp_min(1)).clamp_min(least)
            for factor, value in zip(state["factors"], new, strict=True):
                factor.lerp_(torch.where(finite, value, factor), weight)
            state["faults"][0] += ~finite

    def _refresh(self) -> None:
        """Invert all factors, matrices of one size in one batch."""
        batches = defaultdict(list)
        for block in self._blocks:
            state = self.state[block.parameters[0]]
            if "factors" not in state:
                continue
            state.setdefault("inverses", [None] * len(state["factors"]))
            for i, (matrix, damping) in enumerate(self._damped(block, state["factors"])):
                batches[matrix.shape[-1], self._exponent(block)].append((state, i, matrix, damping))
        for (n, exponent), members in batches.items():
            self._invert(
                [(state, i, matrix.reshape(-1, n, n), damping) for state, i, matrix, damping in members], exponent
            )

    def _invert(self, members: list[tuple[dict, int, Tensor, float]], exponent: float) -> None:
        stack = torch.cat([matrix for _, _, matrix, _ in members])
        shift = torch.cat([torch.full_like(matrix[:, 0, 0], damping) for _, _, matrix, damping in members])
        powers, raised, failed = damped_power(stack, shift, exponent)
        sizes = [len(matrix) for _, _, matrix, _ in members]
        parts = zip(members, powers.split(sizes), raised.split(sizes), failed.split(sizes), strict=True)
        for (state, i, matrix, damping), power, was_raised, has_failed in parts:
            last = state["inverses"][i]
            if last is None:  # as if there were no curvature yet
                last = torch.eye(matrix.shape[-1], dtype=power.dtype, device=power.device) * damping**exponent
            power = torch.where(
                has_failed[:, None, None], last.expand(state["factors"][i].shape).reshape(power.shape), power
            )
            state["inverses"][i] = power.reshape(state["factors"][i].shape)
            state["faults"][1] += was_raised.sum()
            state["faults"][2] += has_failed.sum()

    def _move(self, block: Block) -> None:
        momenta = [self._momentum(p) for p in block.parameters]
        inverses = self.state[block.parameters[0]].get("inverses")
        directions = momenta
        if inverses is not None:
            directions = block.split(self._apply(block, inverses, block.join(momenta)))
        for p, direction in zip(block.parameters, directions, strict=True):
            self.move(p, direction)

    def _momentum(self, p: Tensor) -> Tensor:
        return self.buffer(p).mul_(self.group(p)["momentum"]).add_(p.grad)


def check_precision(layers: Iterable[Layer]) -> None:
    """Refuse parameters in which no matrix can be factored.

    Raises:
        TypeError: a layer has parameters of half precision.
    """
    for layer in layers:
        for name, p in zip(layer.names, layer.parameters, strict=True):
            if p.dtype in (torch.bfloat16, torch.float16):
                raise TypeError(
                    f"'{layer.name}.{name}' is {p.dtype}, in which matrices cannot be inverted: keep float32 "
                    "parameters and put autocast into the model's forward"
                )


def damped_power(stack: Tensor, damping: Tensor, exponent: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(S + damping I)^exponent`` of symmetric positive semi-definite matrices, in one batch.

    Args:
        stack: ``(b, n, n)``.
        damping: ``(b,)``.
        exponent: −1 goes by Cholesky factors; others by eigenvalues, those below the damping being rounding.

    Returns:
        The powers ``(b, n, n)``; where damping was raised ``(b,)``; where there is no power ``(b,)``.

    >>> damped_power(torch.diag(torch.tensor([3.0, 8.0]))[None], torch.tensor([1.0]), -0.5)[0]
    tensor([[[0.5000, 0.0000],
             [0.0000, 0.3333]]])
    """
    none = torch.zeros_like(damping, dtype=torch.bool)
    if stack.shape[-1] == 1:
        return (stack.clamp_min(0) + damping[:, None, None]) ** exponent, none, none
    least = torch.finfo(stack.dtype).eps * _diagonal(stack).sum(-1) if exponent == -1 else torch.zeros_like(damping)
    damped = stack.clone()
    _diagonal(damped).add_(torch.maximum(damping, least)[:, None])
    if exponent == -1:
        factor, info = torch.linalg.cholesky_ex(damped)
        return torch.cholesky_inverse(factor), least > damping, info != 0
    values, vectors = _eigh(damped)
    values = torch.maximum(values, damping[:, None]) ** exponent
    return (vectors * values[:, None]) @ vectors.mT, none, none


def _eigh(stack: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(stack)
    except torch.linalg.LinAlgError:  # single precision may fail to converge where many eigenvalues are equal
        values, vectors = torch.linalg.eigh(stack.double())
        return values.to(stack.dtype), vectors.to(stack.dtype)


def mode_grams(tensor: Tensor) -> list[Tensor]:
    """The contractions of a tensor with itself over all modes but one: ``(n_i, n_i)`` for every mode ``i``.

    >>> mode_grams(torch.tensor([[1.0, 2.0]]))
    [tensor([[5.]]), tensor([[1., 2.],
            [2., 4.]])]
    """
    unfolded = [tensor.movedim(i, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None] for i in range(tensor.dim())]
    return [matrix @ matrix.T for matrix in unfolded]


def tensor_block(layer: Layer, p: torch.nn.Parameter) -> Block:
    """One parameter as a tensor of its own; a convolution's kernels flattened: ``(out, in, k²)``."""
    return Block(layer, [p], p.shape[: min(p.dim() - 1, 2)])


def homogeneous_block(layer: Layer) -> Block:
    """A layer's weight and bias as one matrix ``[W|b]``: ``(out, in + 1)``, ``(out, in·k² + 1)``."""
    weight_first = sorted(layer.parameters, key=lambda p: -p.dim())
    return Block(layer, weight_first, weight_first[0].shape[:1])


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)
