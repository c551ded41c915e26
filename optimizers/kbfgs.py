r"""K-BFGS and K-BFGS(L): Kronecker-factored quasi-Newton steps.

After *Practical Quasi-Newton Methods for Training Deep Neural Networks* (Goldfarb, Ren, Bahamou, NeurIPS 2020,
arXiv:2006.08877), as its public code has it. A layer ``z = [W|b] ā``, ``ā = [a; 1]``, has a Hessian block close to
``G ⊗ A`` with ``A = mean āāᵀ`` and ``G`` the Hessian in ``z``; ``H_a ≈ (A + √λ I)⁻¹`` and ``H_g ≈ G⁻¹`` follow BFGS:

1. ``A ← ρ A + (1−ρ) mean āāᵀ``, from its mean over one pass over the data (``start``). At the first step ``H_a = (A +
   √λ I)⁻¹``, inverted once, and ``H_g = I``.
2. ``M ← β M + (1−β) g``,  ``[W|b] ← [W|b] − α (H_g M H_a + w [W|b])``, all layers at once.
3. The same batch again at the new weights: ``s``, ``y`` are the changes of the means of ``z`` and of ``∂loss/∂z``,
   each averaged with weight ``ρ`` of the past (not where the batch is the whole training set).
4. Double damping: (i) where ``sᵀy ≤ 0.2 yᵀH_g y``: ``s ← θs + (1−θ)H_g y``, ``θ = 0.8 yᵀH_g y / (yᵀH_g y − sᵀy)``;
   (ii) where ``sᵀy ≤ √λ sᵀs``: ``y ← θy + (1−θ)s``, ``θ = (1−√λ) sᵀs / (sᵀs − sᵀy)``.
5. BFGS update of ``H_g`` by ``(s, y)``; for K-BFGS(L) the pair joins the last 100, ``H_g`` starting from ``I``.
6. BFGS update of ``H_a`` by ``s_a = H_a ã``, ``y_a = (A + √λ I) s_a``: the action of a Hessian that is known. ``ã`` is
   ``mean ā`` with the mean of its other entries where the bias has its 1.

A pair is skipped where ``sᵀy ≤ 0``, ``sᵀy ≤ 10⁻⁴ ‖s‖² ‖ḡ‖`` (``ḡ`` the mean of ``∂loss/∂z``; of ``ā`` for ``H_a``), or
where something is not finite; ``diagnostics`` tells how often. Cost: two forward and backward passes, the second
without weight gradients.

**Convolutions and graphs** (derived; the follow-up, arXiv:2102.06737, has the same factors for convolutions by its
abstract and by public code that is not its authors'). With *rows* as in ``optimizers.kfac`` (positions of an image,
nodes of a graph), products of different rows dropped, the block is ``G ⊗ A`` with ``A`` summed over an example's rows
and ``G`` one row's own Hessian, whose secant pair is the change of the means over all rows. For convolutions ``A`` is
the present batch's, as in that code, so that only ``A s_a`` is needed, two convolutions of one channel; its other
damping, ``y ← y + √λ s``, is not used. Ahead of BatchNorm the mean of ``∂loss/∂z`` is zero and damping alone shapes
``H_g``. BatchNorm and its like take the averaged gradient ``M``; so do all other layers, and a warning names them.

``ã`` is the code's and looks like an oversight, but its published curves were made with it, and it is the steadier of
the two. At their settings (``α = λ = 0.3``), at the edge of stability, 1 of 6 seeds diverges on the embedded
autoencoder with it and 3 of 6 with ``mean ā``; at ``α = 0.2`` none does, and losses agree.

Departures: where ``start`` is not called ``A`` is a plain mean until its weight ``1/t`` has fallen to ``1−ρ``; decay is
decoupled as in the rest of this group's code, where the paper's is ``10⁻⁵`` in gradient and loss.

======  ==================  ====================================
symbol  argument            meaning
======  ==================  ====================================
``α``   ``lr``              per group; schedulers act on it
``λ``   ``damping``         per group, in (0, 1)
``β``   ``momentum``        per group
``w``   ``weight_decay``    per group; decoupled
``ρ``   ``averaging``       of ``A``, ``s`` and ``y``
–       ``memory``          pairs that K-BFGS(L) keeps
======  ==================  ====================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from optimizers.kfac import factor_rows, is_factored, warn_of_plain_gradient
from optimizers.kronecker import Block, check_precision, homogeneous_block, tensor_block
from optimizers.layered import LayeredOptimizer, check
from optimizers.layers import ConvolutionLayer, Layer, LinearGraphLayer
from optimizers.objective import Minibatch
from optimizers.quasi_newton import bfgs, double_damping, is_good, lbfgs
from optimizers.replay import RandomState, frozen_statistics
from optimizers.trace import Call, Trace


class KBFGS(LayeredOptimizer):
    """K-BFGS; see the module.

    Args:
        params: parameters or parameter groups; together they must hold every trainable parameter of the model.
        lr: ``α`` ≥ 0.
        damping: ``λ`` in (0, 1).
        momentum: ``β`` in [0, 1).
        weight_decay: ``w`` ≥ 0.
        averaging: ``ρ`` in [0, 1).

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.3,
        damping: float = 0.3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        averaging: float = 0.9,
    ) -> None:
        check(0 <= averaging < 1, "averaging", averaging, "in [0, 1)")
        super().__init__(params, {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay})
        self.averaging = averaging
        self._blocks: dict[Layer, Block] = {}

    def check_group(self, group: dict) -> None:
        super().check_group(group)
        check(0 < group["damping"] < 1, "damping", group["damping"], "in (0, 1)")

    @torch.no_grad()
    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``; returns the mean loss before it, detached.

        Raises:
            NotImplementedError: a layer that the method does not support.
            TypeError: parameters of half precision.
        """
        self._find_blocks(closure)
        random_state = RandomState(self.first.device)
        trace, before, after = closure.trace(), _Means(self._blocks), _Means(self._blocks)
        for call in trace.calls:
            if call.layer in self._blocks:  # a hook that knew the output would hold it in a cycle
                call.output.register_hook(partial(before.add, _mean_call(call)))
        loss = closure.fill_gradients(trace)
        actions = self._update_a(trace, closure.size)
        for block in (*self._blocks.values(), *self._others):
            self._move(block)
        with frozen_statistics(closure.objective.model), random_state.replayed():
            trace = closure.trace()
            residual = closure.residual(trace.outputs) / closure.size
            trace.backward(residual, after.add)
        past = 0.0 if closure.complete else self.averaging
        for block in before.values:
            self._update_g_of(block, closure.size, before.values[block], after.values[block], past)
            self._update_h_a(block, *actions[block], mean=before.values[block][0])
        return loss

    @torch.no_grad()
    def start(self, minibatches: Iterable[Minibatch]) -> None:
        """Fill ``A`` with its mean over these minibatches, before the first step; optional.

        Convolutions, whose ``A`` is the present batch's, keep it for ``H_a`` at the first step and let go of it there.
        """
        for minibatch in minibatches:
            self._find_blocks(minibatch)
            with frozen_statistics(minibatch.objective.model):
                trace = minibatch.trace()
            for block, calls in self._calls_of(trace).items():
                self._average_a(self.state[block.parameters[0]], _second_moment(calls, minibatch.size), 0.0)

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """By layer, so far: pairs of ``H_g`` and of ``H_a`` that were skipped, pairs of ``H_g`` that were damped."""
        names = ("skipped_g", "skipped_a", "damped")
        states = {layer.name: self.state[block.parameters[0]] for layer, block in self._blocks.items()}
        return {
            name: dict(zip(names, s["counts"].unbind(), strict=True)) for name, s in states.items() if "counts" in s
        }

    # H_g --------------------------------------------------------------------------------------------------------------

    def _start_g(self, state: dict, like: Tensor) -> None:
        state["H_g"] = torch.eye(len(like), dtype=like.dtype, device=like.device)

    def _apply_g(self, state: dict, tensor: Tensor) -> Tensor:
        """``H_g V``; V: ``(out, …)``."""
        return state["H_g"] @ tensor

    def _update_g(self, state: dict, s: Tensor, y: Tensor, good: Tensor) -> None:
        state["H_g"] = torch.where(good, bfgs(state["H_g"], s, y), state["H_g"])

    # The step's parts -------------------------------------------------------------------------------------------------

    def _find_blocks(self, minibatch: Minibatch) -> None:
        known = self._layers
        layers = self.find_layers(minibatch)
        if layers is not known:
            check_precision(layers)
            self._blocks = {layer: homogeneous_block(layer) for layer in layers if _has_factors(layer)}
            others = [layer for layer in layers if layer not in self._blocks]
            for layer in others:
                warn_of_plain_gradient(self, layer)
            self._others = [tensor_block(layer, p) for layer in others for p in layer.parameters]
            for block in self._blocks.values():
                state = self.state[block.parameters[0]]
                if "H_a" in state and len(state["H_a"]) != sum(block.widths):
                    self.restart(block.parameters[0])

    def _calls_of(self, trace: Trace) -> dict[Block, list[Call]]:
        calls = defaultdict(list)
        for call in trace.calls:
            if call.layer in self._blocks:
                calls[self._blocks[call.layer]].append(call)
        return calls

    def _update_a(self, trace: Trace, size: int) -> dict[Block, tuple[Tensor, Tensor]]:
        """Take the batch into ``A``; by block, ``s_a`` of unit length and ``A s_a``."""
        actions = {}
        for block, calls in self._calls_of(trace).items():
            state = self.state[block.parameters[0]]
            convolution = isinstance(block.layer, ConvolutionLayer)
            if "H_a" not in state:
                if "A" not in state:
                    self._average_a(state, _second_moment(calls, size), 0.0)
                self._start_layer(block, state)
                if convolution:
                    del state["A"]
            elif not convolution:
                self._average_a(state, _second_moment(calls, size), 1 - self.averaging)
            s_a = state["H_a"] @ _probe(calls, block)
            s_a = s_a / s_a.norm()
            action = sum(_action(call, block, s_a) for call in calls) / size if convolution else state["A"] @ s_a
            actions[block] = (s_a, action)
        return actions

    def _average_a(self, state: dict, moment: Tensor, least: float) -> None:
        """Take a second moment into ``A`` with a weight of at least ``least``; one that is not finite is left out."""
        a = state.setdefault("A", torch.zeros_like(moment))
        finite = moment.diagonal().isfinite().all()
        state["updates"] = state.get("updates", a.new_zeros(())) + finite
        a.lerp_(torch.where(finite, moment, a), (1 / state["updates"].clamp_min(1)).clamp_min(least))

    def _start_layer(self, block: Block, state: dict) -> None:
        """The layer's state before its first step, from its first ``A``."""
        a = state["A"]
        damped = a + self._damping(block) * torch.eye(len(a), dtype=a.dtype, device=a.device)
        state["H_a"] = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)
        row = block.parameters[0].flatten(1)[:, 0]
        state["s"], state["y"], state["counts"] = torch.zeros_like(row), torch.zeros_like(row), row.new_zeros(3)
        self._start_g(state, row)

    def _damping(self, block: Block) -> float:
        return self.group(block.parameters[0])["damping"] ** 0.5

    def _move(self, block: Block) -> None:
        momenta = [self._momentum(p) for p in block.parameters]
        state = self.state[block.parameters[0]]
        if "H_a" in state:
            momenta = block.split(self._apply_g(state, block.join(momenta)) @ state["H_a"])
        for p, direction in zip(block.parameters, momenta, strict=True):
            self.move(p, direction)

    def _momentum(self, p: Tensor) -> Tensor:
        return self.buffer(p).lerp_(p.grad, 1 - self.group(p)["momentum"])

    def _update_g_of(self, block: Block, size: int, before: list, after: list, past: float) -> None:
        """Steps 3 to 5 for one layer; ``before``, ``after``: means of ``ā``, ``z`` and ``∂(mean loss)/∂z``."""
        state, (_, z, delta), (_, new_z, new_delta) = self.state[block.parameters[0]], before, after
        for name, change in (("s", new_z - z), ("y", size * (new_delta - delta))):
            averaged = past * state[name] + (1 - past) * change
            state[name] = torch.where(averaged.isfinite().all(), averaged, state[name])
        s, y, damped = double_damping(state["s"], state["y"], self._apply_g(state, state["y"]), self._damping(block))
        good = is_good(s, y, size * delta)
        self._update_g(state, s, y, good)
        state["counts"] += torch.stack([~good, torch.zeros_like(good), damped])

    def _update_h_a(self, block: Block, s_a: Tensor, action: Tensor, mean: Tensor) -> None:
        """Step 6 for one layer; ``action``: ``A s_a``."""
        state, y_a = self.state[block.parameters[0]], action + self._damping(block) * s_a
        good = is_good(s_a, y_a, mean)
        state["H_a"] = torch.where(good, bfgs(state["H_a"], s_a, y_a), state["H_a"])
        state["counts"][1] += ~good


class KBFGSL(KBFGS):
    """K-BFGS(L): ``H_g`` from the last pairs; see the module.

    Args:
        params: parameters or parameter groups.
        memory: pairs kept, at least 1.
        **options: see ``KBFGS``.
    """

    def __init__(self, params: Iterable, *args, memory: int = 100, **options) -> None:
        check(memory >= 1, "memory", memory, "at least 1")
        super().__init__(params, *args, **options)
        self.memory = memory

    def _start_g(self, state: dict, like: Tensor) -> None:
        state["S"] = state["Y"] = like.new_zeros(self.memory, len(like))

    def _apply_g(self, state: dict, tensor: Tensor) -> Tensor:
        return lbfgs(state["S"], state["Y"], tensor)

    def _update_g(self, state: dict, s: Tensor, y: Tensor, good: Tensor) -> None:
        for name, new in (("S", s), ("Y", y)):
            state[name] = torch.where(good, torch.cat([state[name][1:], new[None]]), state[name])


def _has_factors(layer: Layer) -> bool:
    return is_factored(layer) and any(p.dim() > 1 for p in layer.parameters)


class _Means:
    """By block, the means over rows of ``ā``, ``z`` and ``∂(mean loss)/∂z``, added up over a layer's calls."""

    def __init__(self, blocks: dict[Layer, Block]) -> None:
        self.blocks = blocks
        self.values: dict[Block, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, call: Call, delta: Tensor) -> None:
        if call.layer not in self.blocks:
            return
        block = self.blocks[call.layer]
        if not isinstance(call.layer, LinearGraphLayer):
            delta = delta.mean(0, keepdim=True)
        a, delta = (rows.mean(0) for rows in factor_rows(_mean_call(call), delta))
        new = [a, block.join(p.detach() for p in block.parameters) @ a, delta]
        self.values[block] = new if block not in self.values else torch._foreach_add(self.values[block], new)


def _mean_call(call: Call) -> Call:
    """The call on the mean example, without output: rows are linear in the example. A graph is one example."""
    if isinstance(call.layer, LinearGraphLayer):
        return Call(call.layer, call.inputs, None)
    return Call(call.layer, (call.inputs[0].mean(0, keepdim=True),), None)


def _probe(calls: list[Call], block: Block) -> Tensor:
    """``ã``: the mean of ``ā`` over the rows of a layer's calls, with the mean of the other entries for the bias's."""
    mean = sum(factor_rows(_mean_call(call), call.output[:1, :1])[0].mean(0) for call in calls)
    if len(block.widths) == 2:
        mean[-1] = mean[:-1].mean()
    return mean


def _second_moment(calls: list[Call], size: int) -> Tensor:
    """``Σ_r ā_r ā_rᵀ / m``."""
    rows = [factor_rows(call, call.output[:, :1])[0] for call in calls]
    return sum(a.T @ a for a in rows) / size


def _action(call: Call, block: Block, s: Tensor) -> Tensor:
    """``Σ_r ā_r (ā_rᵀ s)`` of a convolution, by one output channel of it and that channel's weight gradient."""
    conv, x = call.layer.module, call.inputs[0]
    shape, geometry = (1, *conv.weight.shape[1:]), (conv.stride, conv.padding, conv.dilation)
    weight, bias = s.split(block.widths) if len(block.widths) == 2 else (s, None)
    products = F.conv2d(x, weight.view(shape), bias, *geometry)
    parts = [torch.nn.grad.conv2d_weight(x, shape, products, *geometry).flatten()]
    return torch.cat(parts if bias is None else [*parts, products.sum().view(1)])
