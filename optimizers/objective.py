"""The objective: what every optimizer is handed each step, a closure over one minibatch.

``Objective`` is built once, from a model and a likelihood; called with a batch it gives a ``Minibatch``. A minibatch
is a closure as ``torch.optim`` knows it (evaluate, fill ``.grad``, return the loss), so any optimizer can step on it.
A method that wants more than gradients asks the same object: a trace of the layers, the derivative of the loss at true
or at sampled labels, the likelihood's Hessian. The training loop therefore never asks which optimizer it holds::

    objective = Objective(model, likelihood)
    for inputs, targets in loader:
        loss = optimizer.step(objective(inputs, targets))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from optimizers.accounting import Account, account
from optimizers.layers import ACTIVATION_BACKWARD, FORWARD, WEIGHT_GRADIENT, Layer, LinearGraphLayer, find_layers
from optimizers.replay import frozen_statistics
from optimizers.trace import Trace


class Likelihood(Protocol):
    """What an objective asks of a likelihood ``p(y | outputs)``."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``−log p(y_i | z_i)``: ``(m,)``."""

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``∂ Σ_i nll_i / ∂ outputs``."""

    def sampled_residual(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """The residual at labels drawn from the model's own outputs: mean zero, second moment the output Hessian."""

    def hessian_product(self, outputs: Tensor, vector: Tensor) -> Tensor:
        """``∇² nll_i · v_i`` in the outputs, per example."""


class Objective:
    """The mean loss of a model over minibatches, with an L2 penalty where the task has one.

        f(θ) = (1/m) Σ_i nll_i(θ) + Σ_p ½ w_p ‖p‖²

    Args:
        model: called as ``model(*inputs)``.
        likelihood: see ``Likelihood``; ``models.likelihoods`` has the usual ones.
        generator: draws the sampled labels; on the outputs' device. None: torch's global one.
        population: ``n``, the number of training examples that minibatches are drawn from; None: unlimited. With ``m =
            n`` gradients carry no sampling noise.
        penalty: ``w_p`` of the parameters that have one. Every method sees its gradient, the layer-wise ones and
            curvature rescaling its curvature, too; an optimizer's ``weight_decay`` is the optimizer's own affair.
        max_norm: > 0, what the gradient's norm is clipped to; None: any. Curvature, and the slope that a layer-wise
            method compares it with, stay the loss's own.

    Raises:
        ValueError: an argument out of its range.
        TypeError: ``likelihood`` is none.

    Attributes:
        layers: the model's layers (found when first asked for, and again by a step where parameters are others, or
            have been frozen or unfrozen; call ``refresh`` after giving the same ones to other modules).
        gradient_equivalents: the work done so far; one forward and one full backward make 1.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        generator: torch.Generator | None = None,
        population: int | None = None,
        penalty: Mapping[nn.Parameter, float] | None = None,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm} is impossible: it must be positive, or None")
        if population is not None and not (isinstance(population, Integral) and population > 0):
            raise ValueError(f"population={population} is impossible: it must be a number of examples, or None")
        if isinstance(likelihood, type) or not hasattr(likelihood, "nll"):
            raise TypeError(f"{likelihood} is no likelihood: Objective(model, Categorical()), or another with an nll")
        self.model = model
        self.likelihood = likelihood
        self.generator = generator
        self.population = population
        self.penalty = dict(penalty or {})
        self.max_norm = max_norm
        self.gradient_equivalents = 0.0
        self._account: Account | None = None
        self._state: list | None = None  # the mode, the parameters and which were trained when it was taken

    @property
    def layers(self) -> list[Layer]:
        return self.shown.layers

    @property
    def shown(self) -> Account:
        """What is known of the model; before a step has looked, the layers alone."""
        if self._account is None:
            self._account = Account(find_layers(self.model))
        return self._account

    def refresh(self) -> None:
        """Look for layers anew at the next step: after modules were replaced by others with the same parameters."""
        self._account = self._state = None

    def account(self, minibatch: Minibatch) -> list[Layer]:
        """The layers, once this minibatch or one before has shown that their calls account for its gradient.

        Found anew where there are or are trained other parameters than before, or in another mode; see
        ``optimizers.accounting``.
        """
        state = [self.model.training, *((id(p), p.requires_grad) for p in self.model.parameters())]
        if state != self._state:
            self._account = None  # what was known misleads no pass that looks anew
            self._account, self._state = account(minibatch), state
        return self.layers

    def __call__(self, inputs, targets: Tensor, rows: Tensor | None = None) -> Minibatch:
        """One minibatch.

        Args:
            inputs: a tensor or a tuple of them, as the model takes them.
            targets: ``(m, …)``.
            rows: indices of the outputs that the targets belong to (a graph's labelled nodes), or a mask of them; None:
                all, in order, and no example's output depends on the other examples but through BatchNorm.

        Raises:
            ValueError: there are no targets, or more than the population has.
        """
        if not len(targets):
            raise ValueError("a minibatch of no examples has no mean loss: leave it out (a DataLoader's drop_last)")
        if self.population is not None and len(targets) > self.population:
            raise ValueError(
                f"a minibatch of {len(targets)} examples from a population of {self.population}: population is the "
                "number of training examples (len(dataset)), not of batches"
            )
        if rows is not None:
            rows = torch.as_tensor(rows, device=targets.device)
            rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows.long()
        return Minibatch(self, inputs if isinstance(inputs, tuple) else (inputs,), targets, rows)


class Minibatch:
    """A closure over one minibatch; see the module's text."""

    def __init__(self, objective: Objective, inputs: tuple, targets: Tensor, rows: Tensor | None) -> None:
        self.objective = objective
        self.inputs = inputs
        self.targets = targets
        self.rows = rows
        self.drawn = len(targets)  # examples that ``.grad`` is the mean of, in all parts and on all ranks
        self.weight = 1.0  # of its work, against the whole batch's

    @property
    def size(self) -> int:
        """``m``, the number of examples that the loss is a mean over."""
        return len(self.targets)

    #: How many processes hold a part of this batch each; see ``optimizers.parallel``.
    ranks = 1

    #: How many such parts are evaluated one after another; see ``optimizers.accumulation``.
    parts = 1

    #: What clipping has multiplied ``.grad`` by.
    clipped: float | Tensor = 1.0

    def mean(self, part: Tensor) -> Tensor:
        """The mean over all processes of what each has measured on its part of the batch."""
        return part

    @property
    def mixing(self) -> bool:
        """Whether one example's output depends on other examples' rows by construction (a graph's propagation)."""
        objective = self.objective
        graph = any(isinstance(layer, LinearGraphLayer) for layer in objective.layers)
        return self.rows is not None or objective.shown.rows_mix or graph

    @property
    def complete(self) -> bool:
        """Whether this is the whole training set, at once."""
        population = self.objective.population
        return population is not None and self.parts == 1 and self.drawn >= population

    @property
    def noisy(self) -> bool:
        """Whether the gradient would come out otherwise if it were drawn again."""
        return not self.complete or self._drawing

    @property
    def _drawing(self) -> bool:
        """Whether a pass draws random numbers (dropout): the first one did, or there is a module that does by now."""
        modules = self.objective.model.modules()
        return self.objective.shown.draws or any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in modules)

    def losses(self, outputs: Tensor) -> Tensor:
        """Each example's loss, ``(m,)``, with graph.

        Raises:
            ValueError: the likelihood gives something else, such as their mean.
        """
        losses = self.objective.likelihood.nll(self.labelled(outputs), self.targets)
        if losses.shape != (self.size,):
            likelihood = type(self.objective.likelihood).__name__
            raise ValueError(
                f"{likelihood}.nll returned shape {tuple(losses.shape)} for {self.size} examples: it must return "
                f"each one's negative log-likelihood, ({self.size},), not their mean"
            )
        return losses

    def loss(self, outputs: Tensor) -> Tensor:
        """The mean loss and the penalty, with graph."""
        return self.losses(outputs).mean() + sum(w / 2 * p.square().sum() for p, w in self.objective.penalty.items())

    def labelled(self, outputs: Tensor) -> Tensor:
        """The outputs that have a target."""
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model returned a {type(outputs).__name__}, not a tensor: return one (parts can be concatenated, "
                "and split again in the likelihood's nll)"
            )
        return outputs if self.rows is None else outputs[self.rows]

    def __call__(self) -> Tensor:
        """Evaluate, fill ``.grad`` anew, return the loss (detached): a ``torch.optim`` closure."""
        for module in (self.objective.model, self.objective.likelihood):
            if isinstance(module, nn.Module):  # a likelihood may be one, with parameters of its own
                module.zero_grad(set_to_none=True)
        return self.finish(self.add_gradient())

    def add_gradient(self) -> Tensor:
        """Add this minibatch's gradient to ``.grad``; returns the loss, detached."""
        self.count(FORWARD + ACTIVATION_BACKWARD + WEIGHT_GRADIENT)
        with torch.enable_grad():
            loss = self.loss(self.objective.model(*self.inputs))
        loss.backward()
        return loss.detach()

    def evaluate(self) -> Tensor:
        """The loss alone, in the model's present mode, without touching BatchNorm's statistics."""
        self.count(FORWARD)
        with torch.no_grad(), frozen_statistics(self.objective.model):
            return self.loss(self.objective.model(*self.inputs))

    def trace(self, keep_outputs: bool = True) -> Trace:
        """One forward pass with the layers captured; see ``Trace``.

        Raises:
            TypeError: the model is wrapped for several processes by torch, which knows of gradients alone.
        """
        if isinstance(self.objective.model, nn.parallel.DistributedDataParallel):
            raise TypeError(
                "DistributedDataParallel averages gradients alone, and what is measured beside them would differ from "
                "process to process: give the plain model to optimizers.parallel.DataParallel(model, likelihood, …)"
            )
        return Trace(self.objective.model, self.objective.layers, self.inputs, self.count, keep_outputs)

    def mixes(self, trace: Trace | None = None) -> bool:
        """Whether rows are not examples: ``mixing``, or inputs or layers whose outputs have not a row per example."""
        outputs = [call.output for call in trace.calls] if trace else []
        rows = [getattr(x, "shape", ())[:1] for x in (*self.inputs, *outputs)]
        return self.mixing or any(row != (self.size,) for row in rows)

    def thinned(self, stride: int) -> Minibatch:
        """Every ``stride``-th example, from a random one on: to measure what this batch's ``.grad`` says, for less.

        Evenly spaced, so that each of several processes has as many of them.
        """
        m, device = self.size, self.targets.device
        first = torch.randint(m, (1,), generator=self.objective.generator, device=device)
        return self._sample(((first + stride * torch.arange(m // stride, device=device)) % m).sort().values)

    def first(self, count: int) -> Minibatch:
        """So many at most, and not all if there are three; all where they cannot be told from one another."""
        return self if self.mixes() or self.size <= 2 else self._sample(slice(min(count, self.size - 1)))

    def _sample(self, index: Tensor | slice) -> Minibatch:
        sample = copy.copy(self)
        sample.inputs = tuple(x[index] for x in self.inputs)
        sample.targets = sample.inputs[0] if self.targets is self.inputs[0] else self.targets[index]
        sample.weight = self.weight * sample.size / self.size
        return sample

    def fill_gradients(self, trace: Trace, retain_graph: bool = False) -> Tensor:
        """Fill ``.grad`` from a trace; returns the mean loss, detached."""
        loss = self._traced_loss(trace)
        gradients = trace.gradients(loss, retain_graph=retain_graph)
        taken = set()
        for layer, gradient in gradients.items():
            for p, g in zip(layer.parameters, gradient, strict=True):
                memory = g.untyped_storage().data_ptr()
                # autograd may hand out one tensor twice (of a sum), or one number many times; clipping writes into it
                p.grad = g.clone() if memory in taken or 0 in g.stride() else g
                taken.add(memory)
        return self.finish(loss.detach())

    def visit_gradients(
        self, trace: Trace, visit: Callable[[nn.Parameter], None], retain_graph: bool = False
    ) -> Tensor:
        """``visit(parameter)`` with each parameter's ``.grad``; returns the mean loss, detached.

        A gradient is dropped once it has been seen, before the next is made, unless something is made of the whole:
        its norm (clipping), a mean over parts or ranks, or the comparison with a second draw (``noise``, ``complete``).
        """
        parameters = [p for layer in self.objective.layers for p in layer.parameters]
        if self.objective.max_norm is not None or self.parts > 1 or self.ranks > 1 or self.complete:
            loss = self.fill_gradients(trace, retain_graph)
            for p in parameters:
                visit(p)
            return loss
        left = dict.fromkeys(parameters)

        def take(p: nn.Parameter, g: Tensor) -> None:
            del left[p]
            p.grad = g
            visit(p)
            p.grad = None

        loss = self._traced_loss(trace)
        trace.each_gradient(loss, take, retain_graph)
        for p in list(left):  # the loss does not depend on it
            take(p, torch.zeros_like(p))
        return loss.detach()

    def noise(self, trace: Trace | None, visit: Callable[[nn.Parameter, Tensor], None]) -> None:
        r"""A random ``e`` with the second moment of the noise in the mean gradient that ``.grad`` holds.

        Drawing ``m`` of ``n`` examples: ``e = √(1 − m/n) (1/m) Σ_i ε_i ∇ℓ_i``, ``ε_i = ±1`` random and balanced. Under
        dropout every example's gradient is noisy by itself, so there ``e = (1/m) Σ_i ε_i ∇ℓ_i``; but at ``m = n``,
        where that spread is no noise, a second draw of the masks is compared: ``e = (g − g')/√2``.

        Of a batch in parts, or of a sample of one, only ``k`` of the ``m`` examples are here: ``e`` is their sum over
        ``√(km)``. Each parameter's ``e`` is handed to ``visit(parameter, e)`` and not kept. The trace's graph is; a
        ``complete`` batch needs no trace.
        """
        if self.complete:
            self._redraw(visit)
            return
        here = self.size * self.ranks
        scale = 1.0 if self._drawing else max(0.0, 1 - self.drawn / (self.objective.population or math.inf)) ** 0.5
        order = torch.randperm(here, generator=self.objective.generator, device=self.targets.device)
        signs = self._mine(order % 2 * 2 - 1)
        scale = self.clipped * scale * self.ranks / (here * self.drawn) ** 0.5
        with torch.enable_grad():
            signed = (self.losses(trace.outputs) * signs).sum() * scale
        trace.each_gradient(signed, visit, retain_graph=True)

    def _redraw(self, visit: Callable[[nn.Parameter, Tensor], None]) -> None:
        gradients = {p: p.grad for layer in self.objective.layers for p in layer.parameters}
        with frozen_statistics(self.objective.model):
            again = self.trace(keep_outputs=False)

        def compare(p: nn.Parameter, g: Tensor) -> None:
            visit(p, g.mul_(self.clipped).sub_(gradients[p]).mul_(0.5**0.5))

        again.each_gradient(self._traced_loss(again), compare)

    def residual(self, outputs: Tensor) -> Tensor:
        """``∂ Σ_i loss_i / ∂ outputs`` at the true labels (zero where there is none); a sum, not a mean."""
        likelihood = self.objective.likelihood
        return self._scatter(outputs, likelihood.residual(self.labelled(outputs.detach()), self.targets))

    def sampled_residual(self, outputs: Tensor) -> Tensor:
        """The same at labels drawn from the model's own outputs."""
        likelihood, generator = self.objective.likelihood, self.objective.generator
        return self._scatter(outputs, likelihood.sampled_residual(self.labelled(outputs.detach()), generator))

    def hessian_product(self, outputs: Tensor, vector: Tensor) -> Tensor:
        """``∇² Σ_i loss_i · v`` in the outputs (zero where there is no label)."""
        likelihood = self.objective.likelihood
        product = likelihood.hessian_product(self.labelled(outputs.detach()), self.labelled(vector))
        return self._scatter(outputs, product)

    def penalty_curvature(self, layer: Layer, direction: Sequence[Tensor]) -> Tensor:
        """``Σ w ‖d‖²`` of one layer: the penalty's part of the curvature along a direction."""
        weights = [self.objective.penalty.get(p, 0.0) for p in layer.parameters]
        return sum(w * d.square().sum() for w, d in zip(weights, direction, strict=True))

    def count(self, work: float) -> None:
        """Add to the objective's gradient-equivalents."""
        self.objective.gradient_equivalents += work * self.weight

    def _traced_loss(self, trace: Trace) -> Tensor:
        with torch.enable_grad():
            return self.loss(trace.outputs)

    def finish(self, loss: Tensor) -> Tensor:
        """Once ``.grad`` holds the gradient: clip it. Returns the loss."""
        max_norm = self.objective.max_norm
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.objective.model.parameters(), max_norm)
            self.clipped = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
        return loss

    def _mine(self, whole: Tensor) -> Tensor:
        """This process's rows of what was drawn for the whole batch."""
        return whole

    def _scatter(self, outputs: Tensor, values: Tensor) -> Tensor:
        if self.rows is None:
            return values
        return torch.zeros_like(outputs).index_add_(0, self.rows, values)  # a row may have several targets
