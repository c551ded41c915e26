r"""Layer-wise adaptive step sizes: the search that LW-SGDm and LW-AdamW share.

After *Layer-wise Adaptive Step-Sizes for Stochastic First-Order Methods for Deep Learning* (Bahamou, Goldfarb,
arXiv:2305.13664). The paper's abstract says: one step size per layer, from stochastic curvature in the diagonal blocks
of the Hessian; no learning rate to tune; first-order memory; about one extra gradient of time. Its text and code are
not to be had, so **everything below is a reconstruction**, derived and then chosen by measurement.

A *descent* gives each layer ``l`` a direction ``d_l``, momentum included; the *search* gives it a length. Along
``d_l``, the other layers fixed, the model is

    f(θ − α d_l) ≈ f − α ρ_l + ½ α² q_l,     ρ_l = ∇_l fᵀ d_l,     q_l = d_lᵀ C_ll d_l,

with ``C`` the Gauss–Newton matrix, and the step sizes are

    α_l = σ · c/η · u_l / ‖d_l‖,     u_l = t_l^{p_l} (a ‖d_l‖)^{1−p_l},     c = ρ̄ᵀu / uᵀK̄u,
    t_l = max(ρ̄_l, κ ρ̄ᵖ_l) / K̄_ll,     a = ρ̄ᵀ‖d‖ / ‖d‖ᵀK̄‖d‖,

where ``ρ̄ᵖ``, ``ρ̄`` are averages of the slopes per unit of length, ``ρ_l / ‖d_l‖``, before and after the correction for
noise below, ``K̄`` averages ``Q_kl / (‖d_k‖‖d_l‖)``, and ``η`` corrects the model's curvature. Numerators and
denominators are averaged apart, because the average of a ratio of noisy numbers is not the ratio. ``c`` makes
simultaneous steps consistent: independent ones can overshoot by up to the number of layers, and ``c`` minimises the
model along their sum.

**Slope without noise.** With ``d = g`` from the same batch, ``gᵀd`` counts the batch's own noise as slope, and at small
batches the step comes out far too long. With random balanced signs ``ε_i = ±1`` per example, ``e = (1/m) Σ_i ε_i ∇ℓ_i``
has the second moment of that noise, also where examples mix (BatchNorm, graphs), and

    ρ_l = g_lᵀ d_l − ν · e_lᵀ M_l e_l.

``M = ∂d/∂g`` is the descent's metric; ``ν = 1 − m/n``, for a batch that is the whole training set has no sampling
noise. Dropout has its own (``Minibatch.noise``). ``e`` costs as much as the curvature and changes slowly, so it is
measured each ``correct_every``-th time, in place of the curvature once training has settled; the next curvature then
counts twice. A layer's share of signal is ``s_l = max(ρ̄_l, κ ρ̄ᵖ_l) / ρ̄ᵖ_l``, in (0, 1].

A gradient that is clipped is one of another length: the direction takes it in as it is, but ``ρ_l`` and ``e`` are
divided by what it was multiplied with, for slopes are to be compared with the loss's own curvature.

**A sample of the batch.** Means over examples need no more of them than their accuracy asks for. So the gradient is
the whole batch's, in a pass like any method's; curvature and noise come from every fourth example (at least 32), in a
pass of its own: a quarter of a gradient, ``share (1/3 + 1/3 + 1/3)``: forward, activations' derivatives, tangents.
BatchNorm normalises the sample by its own statistics there. Where examples mix (graphs) there is no sample, and what
is measured is measured on the first pass.

**Curvature of the loss itself.** Gauss–Newton leaves out how the outputs bend. Along the step the loss has half of the
model's curvature on a BatchNorm ResNet, up to three times it on a graph, and as much on an autoencoder, so that no one
``σ`` would suit them. So every ``correct_every`` measurements the batch is evaluated once more, where the step has led,
for a third of a gradient:

    η = max(⟨f(θ⁺) − f(θ) + Σ_l α_l ρ'_l⟩ / ⟨½ αᵀQα⟩, s),

both averaged per squared length of the step, from a ratio of 1 on; ``ρ'`` is the plain slope, weight decay's included.
Where ``½ αᵀQα`` is within the losses' rounding (below) a comparison says nothing, and its ratio is taken for 1.
``s`` is the whole direction's share of signal. Where slope is signal a loss saturates along a long step and looks the
flatter the longer it is: there the model is not to be lowered. Where slope is noise it may be.

**The next batch.** A batch has a part in its own direction, and an example that few others are like, whose gradient
Adam's scaling makes long, is in the batch and in the sample, or not: for dozens of steps on end ``η`` was ten and
more, and step sizes a hundredth of what they had been. So for LW-AdamW (``look_back``), once settled, the next batch
is asked, along the step that is behind it: ``Q`` where it ended, the loss there and where it began, the slope ``gᵀd``
there with ``d`` from before ``g``. In the first steps, which grow, the step behind is no measure of the next one; and
a batch that is the whole training set has no other.

**Pooling.** ``t_l`` is the layer's own minimiser; ``a`` is the one step size for all layers that minimises the model
along ``d``, which is what a tuned rate does. With ``p_l = ω s_l²`` a layer whose slope is signal takes its own to the
degree ``ω``; one whose slope is mostly noise knows little about itself and takes the common one. ``ω`` is 1 for SGD's
direction and small for Adam's, which has brought the layers to one scale already. A layer of whose curvature nothing
has been seen (``K̄_ll = 0``: no example of the sample reaches it) takes the common one, and has no part in ``a`` and
``c``.

**Edge of stability.** ``σ = 1`` minimises the model; ``σ = 2`` is its edge, where it promises no decrease, and what
long training wants (arXiv:2407.06183): shorter steps let curvature grow, which shortens them again, until training
stands still. On the MNIST autoencoder that is seen with ``σ = 1.5`` and with a ``σ`` that noise draws towards 1. The
edge is momentum's own only if ``d`` is the direction of the step, momentum included: an oscillation along curvature
``λ`` leaves ``(1−β)/(1+β)`` of itself in an average, and ``α = 2 ρ/q`` then means ``αλ = 2 (1+β)/(1−β)``, where
averaged momentum just stays stable. With ``d = g`` the same ``σ`` stops at half of that or less.

**Trust.** A quadratic model does not hold across distances comparable to the weights themselves: at the start of a deep
autoencoder a tenth of the greedy step triples the loss. So ``α_l ≤ σ b_l^{p_l} b^{1−p_l}``, ``b_l = τ s_l^χ max(‖θ_l‖,
r_l) / ‖d_l‖``: a step that is mostly noise must be shorter still. ``r_l`` is half (of normalisations a quarter) of the
norm that torch starts such a layer with: one that starts at zero or next to it would take hundreds of steps to grow.
The bound is pooled as step sizes are, with ``b = τ s^χ ‖θ‖ / ‖d‖`` of all layers, ``s`` the whole direction's share:
where slope is mostly noise a bound of each layer's own held the convolutions of a ResNet to a third of the step sizes
of its other layers, and those, of which the loss says little by themselves, ran off to ten times the best rate if ``τ``
was larger. Layers in series multiply: ``L`` of them that move by ``ε`` of their weights move the product by up to ``(1
+ ε)^L − 1`` of itself (arXiv:2002.03432), and on a plain autoencoder of twelve layers 40 steps of 4 % in each killed
whole layers on half of the seeds. So for LW-SGDm ``Σ_l α_l ‖d_l‖ / max(‖θ_l‖, r_l) ≤ σ τ_Σ``, which is met by itself
where steps are noisy or layers few. On a BatchNorm CNN long noisy steps cost the minibatch's loss nothing, but in
evaluation mode, whose statistics lag behind the weights, half a unit of loss.

**Growth.** Step sizes start at ``1/warmup`` of their value, each layer's when it first has a gradient (that is more
than rounding), and grow by at most ``growth − 1`` of themselves at each measurement, because curvature rises while
steps grow and its average lags behind. They may fall at any pace, and after a fall regain half of their last ceiling at
once. Curvature along Adam's first directions is so high, on a ResNet, that by a twentieth of itself alone a step size
creeps for a hundred steps at a tenth of what is best; with a head start it grows by that part of ``h b_l^{p_l}
b^{1−p_l}`` as well in the first ``settling`` ones. By default there is none, for deep autoencoders are the worse for
it. (Later it would bring examples that are fitted to life again.)

**A loss that rises.** At the edge the model promises nothing, and so cannot tell that steps are too long. Where they
are, iterates jump about far up the walls of the valley, their gradients agree about the way down, and what had been
noise counts as signal, by which trust grows and steps with it: on LeNet five times as long within fifty steps, at five
times the loss. Only the losses tell. So step sizes grow at each measurement by ``growth^(1−r) / brake^r``, with ``r``
in [0, 1] the rise of their average above its own average, in standard deviations of what noise alone makes of it: at
``r = 1`` they shrink to ``1/brake`` of themselves. Without that measure, with ``r = 1`` at any rise, the noise of small
batches, which is a rise half of the time, takes step sizes down for good. A rise that goes on when they are a tenth of
what they were is not of their making (another task, longer sequences), and the loss's past starts anew.

**Fitted examples.** Slope and curvature die away, and step sizes grow, against a direction of Adam's that keeps its
length: that is what trust shrinks with noise for. One batch that is not fitted makes the direction several times as
long as it has been; so no step is longer than ``stretch`` times the average of the layer's last ones. Weight decay,
which does not die away, took a layer a tenth of its weights a step, faster than any average follows: a BatchNorm CNN at
batch 500 had a minibatch loss of 0.001 and an evaluation loss of 1. So ``α_l w ≤ σ ζ``, ``ζ = 10⁻³``: what decay takes
of a layer a step at a rate of 0.4, with a momentum of 0.9 and ``w = 5·10⁻⁴``.

**Rounding.** Once the loss is down to rounding, ``ε|f_0|`` with ``f_0`` that of some first examples (of outputs of zero
if that is larger) and ``ε`` its number format's, so is all that is measured, while step sizes still grow against a
direction that dies away, until one entry comes to life: on full batches that ended fits of 1e-8 at 1. A step taken
there is shorter by ``|f| / ε|f_0|``, and no average or bound remembers that batch, or the next one that is not fitted
would find step sizes of nothing.

**Invariances.** Scaling the likelihood changes nothing. Moving scale between layers of a ReLU net changes nothing where
there is no noise (a full batch), ``ω = 1`` and no layer is below ``r_l``; otherwise the common step size sees the
scale, as any single rate does.

=======  ================  ==========================================================================================
symbol   argument          meaning
=======  ================  ==========================================================================================
``σ``    ``sigma``         dimensionless, not a learning rate, though the groups' ``lr`` to a scheduler, which so
                           scales the steps
–        ``averaging``     weight of the past in the averages
``ω``    ``own``           weight of a layer's own minimiser against the common one, where its slope is all signal
``κ``    ``floor``         the corrected slope is a difference and can average to nothing: no step is zero for
                           good, and where nearly all slope is noise, the step of the plain slope at a fifth of
                           σ = 1 is safe
``χ``    ``caution``       how fast trust shrinks with a layer's share of signal
``τ``    ``trust``         longest step of a layer, relative to its weights
``τ_Σ``  ``joint_trust``   longest step of all layers, each relative to its weights, summed
``h``    ``head_start``    of the step size that trust allows, what one grows by as if it had it, until settled
–        ``stretch``       longest step of a layer, relative to its last ones
–        ``brake``         by how much step sizes shrink while the loss rises
=======  ================  ==========================================================================================
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor

from optimizers.averages import Averages
from optimizers.bounds import Bounds, Layers, Signal
from optimizers.curvature import GaussNewton
from optimizers.layered import LayeredOptimizer, check, dot
from optimizers.layers import Layer, NormalisationLayer
from optimizers.line import Line, inverse, minimiser
from optimizers.objective import Minibatch
from optimizers.plan import Due, Plan
from optimizers.replay import RandomState, frozen_statistics
from optimizers.trace import Trace


class _Directions(Mapping):
    """``d`` by layer, made when asked for and not kept: a copy of all parameters less."""

    def __init__(self, layers: list[Layer], direction: Callable[[Tensor], Tensor]) -> None:
        self.layers, self.direction = layers, direction

    def __getitem__(self, layer: Layer) -> list[Tensor]:
        return [self.direction(p) for p in layer.parameters]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class Layerwise(LayeredOptimizer):
    """The search: step sizes for a descent that a subclass defines by ``_take_in``, ``_direction`` and ``_metric``.

    Args:
        params: parameters or parameter groups; together they must hold every trainable parameter of the model.
        defaults: the descent's own options, per group.
        trust: ``τ`` > 0.
        joint_trust: ``τ_Σ`` > 0; None: no bound.
        own: ``ω`` in [0, 1].
        caution: ``χ`` ≥ 0.
        warmup: steps with a gradient in which a layer's step size rises to its value, by ``1/warmup`` of it each; at
            least 1.
        growth: largest growth of a step size from measurement to measurement, above 1.
        head_start: ``h`` ≥ 0.
        brake: step sizes are divided by it at each measurement while the loss rises beyond its noise, at least 1; None:
            they may grow.
        stretch: a layer's longest step, relative to the mean of its last ones; above 1.
        sigma: ``σ`` > 0.
        averaging: in [0, 1).
        floor: ``κ`` in (0, 1].
        every: once ``settling`` steps are over, measure every so many steps; between them the step sizes stand and a
            step costs one gradient.
        look_back: once settled, compare model and loss along the last step, by a batch that had no part in it.
        settling: the first steps, all of which are measured: curvature changes fast in them, and step sizes grow.
        correct_every: measure the noise in the slope and the loss's own curvature every so many measurements.
        share: of a batch's examples, in (0, 1]: curvature and noise are measured on so many, at least, and on no less
            than ``FEWEST_EXAMPLES``; on all where examples mix.
        curvature: an estimator of ``optimizers.curvature``; None: ``GaussNewton()``.
        lr: there is none; refused in words.

    Raises:
        ValueError: an argument out of its range.
    """

    takes_parts = True

    #: Measurements that an average is made of, at least.
    FEWEST = 5

    #: Examples that curvature and noise are measured on, at least.
    FEWEST_EXAMPLES = 32

    #: What is less at the start is taken for a learning rate.
    LEAST_SIGMA = 0.05

    #: ``ζ``: times ``σ``, the largest part of a layer that decay takes in a step.
    SHRINKAGE = 1e-3

    def __init__(
        self,
        params: Iterable,
        defaults: dict,
        *,
        trust: float,
        own: float,
        caution: float,
        warmup: int,
        growth: float,
        brake: float | None,
        look_back: bool,
        stretch: float = 2.0,
        sigma: float = 2.0,
        averaging: float = 0.95,
        floor: float = 0.2,
        every: int = 1,
        settling: int = 100,
        correct_every: int = 5,
        share: float = 0.25,
        joint_trust: float | None = None,
        head_start: float = 0.0,
        curvature=None,
        lr: None = None,
    ) -> None:
        check(lr is None, "lr", lr, "left out, for step sizes are found; sigma (2 by default) scales them")
        check(sigma > 0, "sigma", sigma, "positive")
        check(0 <= averaging < 1, "averaging", averaging, "in [0, 1)")
        check(0 <= own <= 1, "own", own, "in [0, 1]")
        check(caution >= 0, "caution", caution, "at least 0")
        check(0 < floor <= 1, "floor", floor, "in (0, 1]")
        check(trust > 0, "trust", trust, "positive")
        check(warmup >= 1, "warmup", warmup, "at least 1")
        check(growth > 1, "growth", growth, "above 1")
        check(brake is None or brake >= 1, "brake", brake, "at least 1 or None")
        check(head_start >= 0, "head_start", head_start, "at least 0")
        check(stretch > 1, "stretch", stretch, "above 1")
        check(isinstance(look_back, bool), "look_back", look_back, "true or false")
        check(every >= 1 and every == int(every), "every", every, "a whole number, at least 1")
        check(settling >= 0, "settling", settling, "at least 0")
        whole = correct_every >= 1 and correct_every == int(correct_every)
        check(whole, "correct_every", correct_every, "a whole number, at least 1")
        check(0 < share <= 1, "share", share, "in (0, 1]")
        check(joint_trust is None or joint_trust > 0, "joint_trust", joint_trust, "positive or None")
        super().__init__(params, {"lr": sigma} | defaults)
        self.averaging, self.own, self.floor, self.look_back = averaging, own, floor, look_back
        self.every, self.settling, self.correct_every, self.share = every, settling, correct_every, share
        self.bounds = Bounds(trust, joint_trust, caution, warmup, growth, brake, stretch, head_start)
        self.curvature = GaussNewton() if curvature is None else curvature

    def check_group(self, group: dict) -> None:
        super().check_group(group)
        check(group["lr"] > 0, "lr", group["lr"], "positive, for it is sigma")

    @torch.no_grad()
    def step(self, closure: Minibatch) -> Tensor:
        """One step on ``objective(inputs, targets)``.

        Returns:
            The minibatch's mean loss before the step, detached.

        Raises:
            TypeError: the closure is not a minibatch of an ``optimizers.Objective``.
            ValueError: the parameter groups do not hold all of the model's trainable parameters, or divide a layer
                between step-size scales.
        """
        plan = self.plan(closure)
        try:
            return self.carry_out(plan, closure)
        except BaseException:
            if "step_size" not in self._search:  # what later measurements build on is not there
                self._forget(self._search)
            raise

    def plan(self, closure: Minibatch) -> Plan:
        """Count a step, and say what it will do; errors as of ``step``."""
        known, layers = self._layers, self.find_layers(closure)
        search = self._search
        if layers is not known:
            self._start_anew(search)
        self._check_scales()
        measures = search["step"] < self.settling or search["step"] % self.every == 0
        search["step"] += 1
        kind, numbers = self._count()
        if not measures:
            return Plan((search.settled, kind), numbers, None)
        due = self._due(closure, search)
        numbers["noise"] = self._weight_of_noise(search)
        search["measured"] += 1
        search["skipped"] = not due.curvature
        numbers |= {"past": search.weight(), "curvature_past": search.weight(due.count)}
        return Plan((search.settled, kind, due), numbers, due)

    @torch.no_grad()
    def carry_out(self, plan: Plan, closure: Minibatch) -> Tensor:
        """The step that was planned; returns as ``step``."""
        search, self._numbers = self._search, plan.numbers
        if plan.due is not None:
            return self._measured_step(closure, search, plan.due)
        loss = self.fill_gradients(closure)
        self._take_in_gradients()
        self._descend(search)
        return loss

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """By layer: the present ``step_size`` (σ included), and the averaged ``slope`` and ``curvature`` per length."""
        search = self._search
        if "step_size" not in search or not self._layers:
            return {}
        columns = {
            "step_size": self._step_sizes(search),
            "slope": search["slope"] - search["noise"],
            "curvature": search["curvature"].diagonal().clone(),
        }
        return {
            layer.name: {name: column[i] for name, column in columns.items()} for i, layer in enumerate(self._layers)
        }

    # The descent ------------------------------------------------------------------------------------------------------

    def _count(self) -> tuple[Hashable, dict[str, float]]:
        """Count a step of every parameter: the ``kind`` and the ``numbers`` that the descent has in it."""
        return None, {}

    def _take_in(self, parameter: Tensor) -> None:
        """Take the averages that the direction is made of one step further, by a parameter's present ``.grad``."""
        raise NotImplementedError

    def _direction(self, parameter: Tensor) -> Tensor:
        """``d`` of one parameter, from its averages."""
        raise NotImplementedError

    def _metric(self, parameter: Tensor, e: Tensor) -> Tensor:
        """``M e``: how the direction moves with the gradient."""
        raise NotImplementedError

    def _take_in_gradients(self) -> None:
        for p in self._parameters:
            self._take_in(p)

    def _descend(self, search: Averages) -> None:
        for layer, alpha in zip(self._layers, self._step_sizes(search).unbind(), strict=True):
            self._move(layer, alpha)

    def _move(self, layer: Layer, alpha: Tensor) -> None:
        """``θ ← (1 − α w) θ − α d``."""
        for p in layer.parameters:
            decay = self.group(p)["weight_decay"]
            if decay:
                p.mul_(1 - alpha * decay)
            p.addcmul_(self._direction(p), alpha, value=-1)

    def _by_layer(self, of_parameters: Tensor) -> Tensor:
        """Sums of the parameters' numbers over each layer."""
        return of_parameters.new_zeros(len(self._layers)).index_add_(0, self._layer_of, of_parameters)

    # The search -------------------------------------------------------------------------------------------------------

    @property
    def _search(self) -> Averages:
        """The search's own state, kept with the first parameter's so that ``state_dict`` carries it."""
        values = self.state[self.first].setdefault("search", {"step": 0, "measured": 0})
        span = min(self.every, max(1, 1 / (1 - self.averaging) / self.FEWEST))
        return Averages(values, self.averaging, span, self.settling)

    def _check_scales(self) -> None:
        """Layers have one step size each, which groups may scale, and schedulers."""
        if len({group["lr"] for group in self.param_groups}) == 1:
            return
        for layer in self._layers:
            sigma = {self.group(p)["lr"] for p in layer.parameters}
            if len(sigma) > 1:
                raise ValueError(f"layer '{layer.name}' has one step size, but groups of lr (sigma) {sorted(sigma)}")

    def _start_anew(self, search: Averages) -> None:
        """Where other layers train than before, what was measured is of no use."""
        self._warn_of_rates(search)
        if search.get("layers", self.layer_names) != self.layer_names:
            self._forget(search)
        search["layers"] = self.layer_names
        self._parameters = [p for layer in self._layers for p in layer.parameters]
        number = [i for i, layer in enumerate(self._layers) for _ in layer.parameters]
        self._layer_of = torch.tensor(number, device=self.first.device)
        self._least_norms = torch.tensor([_least_norm(layer) for layer in self._layers], dtype=torch.float64)

    @staticmethod
    def _forget(search: Averages) -> None:
        search.clear()
        search.update(step=0, measured=0)

    def _warn_of_rates(self, search: Averages) -> None:
        """A schedule or a group made for another method sets learning rates, and training would stand still."""
        least = min(group["lr"] for group in self.param_groups)
        if search["step"] == 0 and 0 < least < self.LEAST_SIGMA:  # a warm-up may start at none
            warnings.warn(
                f"{type(self).__name__} starts with lr={least:g}, which is its sigma (1 minimises the model, 2 is the "
                f"edge of stability), not a learning rate: its steps are {2 / least:.0e} times as short as usual. "
                "Schedules that multiply (LambdaLR, StepLR, CosineAnnealingLR) suit it; of those that set "
                "rates (OneCycleLR, CyclicLR) give max_lr=2",
                stacklevel=7,  # of who called `step`, through torch's wrappers
            )

    def _due(self, minibatch: Minibatch, search: Averages) -> Due:
        """Once settled curvature skips the measurement of noise, and the loss is compared after the next one."""
        turn = search["measured"] % self.correct_every
        settled = search["measured"] >= max(self.settling, 1)
        noise, comparison = turn == 0, turn == (1 % self.correct_every if settled else 0)
        back = self.look_back and comparison and settled and not minibatch.complete
        curvature = comparison or not (settled and noise and minibatch.noisy)
        return Due(noise, comparison and not back, back, curvature, 2 if search.get("skipped") else 1)

    def _weight_of_noise(self, search: Averages) -> float:
        """Of a measurement of noise that is added to those before: a plain mean until the average has its length."""
        count = search["measured"] // self.correct_every + 1
        return max(1 - search.past**self.correct_every, 1 / count)

    def _measured_step(self, minibatch: Minibatch, search: Averages, due: Due) -> Tensor:
        """Measure, step, and where it is due compare what the model says of a step with what the loss does."""
        last = self._look_back(minibatch, search) if due.back else None
        random_state = RandomState(self.first.device) if due.ahead else None
        line = self._measure(minibatch, search, due, last)
        self._descend(search)
        if due.ahead:
            with random_state.replayed():
                self._compare(line._replace(end=minibatch.evaluate()), search)
        return line.start

    def _look_back(self, minibatch: Minibatch, search: Averages) -> Line:
        """The line back along the last step, before this batch's gradients are taken in."""
        lengths = torch.stack([dot([d], [d]) for d in map(self._direction, self._parameters)])
        sample, trace = self._sample(minibatch, self._stride(minibatch))
        curvature = sample.mean(self.curvature(sample, trace, _Directions(self._layers, self._direction)))
        del trace
        ends = [p.clone() for p in self._parameters]
        try:
            for layer, alpha in zip(self._layers, self._step_sizes(search).unbind(), strict=True):
                for p in layer.parameters:
                    p.addcmul_(self._direction(p), alpha)
            with RandomState(self.first.device).replayed():  # the pass from the step's end will draw the same masks
                loss = minibatch.evaluate()
        finally:  # also where the pass is interrupted
            torch._foreach_copy_(self._parameters, ends)
        return Line(inverse(self._by_layer(lengths).sqrt()), curvature, end=loss)

    def _measure(self, minibatch: Minibatch, search: Averages, due: Due, last: Line | None) -> Line:
        """Gradients, directions; the averages of the slope and of what else is due."""
        minibatch.objective.model.zero_grad(set_to_none=True)
        trace = minibatch.trace(keep_outputs=False)
        if "rounding" not in search:
            search.keep("rounding", _rounding(minibatch, trace.outputs))
        stride = self._stride(minibatch, trace)
        loss, seen = self._see_gradients(minibatch, trace, stride == 1, due.back)
        search.keep("resolved", (loss.abs() / search["rounding"]).clamp(max=1.0))
        length = seen.pop("squared_length").sqrt()
        per_length = inverse(length)
        slopes = {name: slope / minibatch.clipped for name, slope in seen.items()}  # along the loss's own gradient
        sample = minibatch
        if stride > 1:
            del trace  # before the next is made
            sample, trace = self._sample(minibatch, stride)
        if not minibatch.complete:
            minibatch.objective.model.zero_grad(set_to_none=True)  # what the directions do not hold is done with
            if due.noise:
                self._measure_noise(sample, trace, per_length, search)
        q = None
        if due.curvature:
            q = sample.mean(self.curvature(sample, trace, _Directions(self._layers, self._direction)))
        if minibatch.complete and due.noise:
            del trace  # the second draw compares gradients and makes a trace of its own
            self._measure_noise(minibatch, None, per_length, search)
        minibatch.objective.model.zero_grad(set_to_none=True)
        moved = ((length > 0) & (search["resolved"] == 1)).to(length)
        search.keep("moved", search.get("moved", 0) + moved)
        if last is not None:
            self._compare(last._replace(slope=-slopes["last"], start=loss), search)
        self._add(search, loss, slopes["own"], q, per_length)
        self._search_step_sizes(search, per_length)
        return Line(per_length, q, slopes["own"] + slopes.get("decay", 0.0), loss)

    def _stride(self, minibatch: Minibatch, trace: Trace | None = None) -> int:
        """Of how many examples one is measured for curvature and noise: ``1/share``, or 1 where examples mix."""
        if minibatch.mixes(trace):
            return 1
        m = minibatch.size
        return max(1, min(int(1 / self.share), m * minibatch.ranks // self.FEWEST_EXAMPLES, m))

    @staticmethod
    def _sample(minibatch: Minibatch, stride: int) -> tuple[Minibatch, Trace]:
        """Every so many-th example, and a pass over them that leaves BatchNorm's running statistics alone."""
        sample = minibatch.thinned(stride) if stride > 1 else minibatch
        with frozen_statistics(minibatch.objective.model):
            return sample, sample.trace(keep_outputs=False)

    def _add(self, search: Averages, loss: Tensor, slope: Tensor, curvature: Tensor | None, per_length: Tensor) -> None:
        """Add what a batch says to the averages."""
        search.add_loss(loss, self._numbers["past"])
        search.add("slope", slope * per_length, self._numbers["past"])
        if curvature is not None:
            per_area = torch.outer(per_length, per_length)
            search.add("curvature", curvature * per_area, self._numbers["curvature_past"])

    def _see_gradients(
        self, minibatch: Minibatch, trace: Trace, retain_graph: bool, back: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take every gradient in; the loss, and by layer what is seen of them.

        That is ``‖d‖²`` and the slopes: ``gᵀd`` along its ``own`` direction, ``w gᵀθ`` along ``decay``, if there is
        any, and along the ``last`` step's direction, to look back.
        """
        seen: dict[str, dict[torch.nn.Parameter, Tensor]] = defaultdict(dict)
        decays = any(group["weight_decay"] for group in self.param_groups)

        def see(p: torch.nn.Parameter) -> None:
            if back:
                seen["last"][p] = dot([p.grad], [self._direction(p)])
            self._take_in(p)
            d = self._direction(p)
            seen["own"][p] = dot([p.grad], [d])
            seen["squared_length"][p] = dot([d], [d])
            if decays:
                seen["decay"][p] = dot([p.grad], [p]) * self.group(p)["weight_decay"]

        loss = minibatch.visit_gradients(trace, see, retain_graph)
        sums = {name: torch.stack([of[p] for p in self._parameters]) for name, of in seen.items()}
        return loss, {name: self._by_layer(of_parameters) for name, of_parameters in sums.items()}

    def _measure_noise(self, minibatch: Minibatch, trace: Trace | None, per_length: Tensor, search: Averages) -> None:
        """Update the average of ``eᵀMe`` per unit of length."""
        noise: dict[torch.nn.Parameter, Tensor] = {}

        def measure(p: Tensor, e: Tensor) -> None:
            noise[p] = dot([e], [self._metric(p, e)])

        if minibatch.noisy:
            minibatch.noise(trace, measure)
        none = torch.zeros_like(per_length[0])
        noise = self._by_layer(torch.stack([noise.get(p, none) for p in self._parameters]))
        noise = noise / minibatch.clipped * per_length  # of the slope, which is the loss's own
        search.remember("noise", search["noise"].lerp(noise, self._numbers["noise"]) if "noise" in search else noise)

    def _compare(self, line: Line, search: Averages) -> None:
        """Update the averages of the loss's and the model's curvature along a step."""
        curvatures = line.curvatures(self._step_sizes(search), search["rounding"])
        past = search.get("along_step", curvatures[1].expand(2))
        weight = 1 - search.past**self.correct_every
        search.remember("along_step", past.lerp(curvatures, weight))

    def _correction(self, search: Averages, share: Tensor) -> Tensor:
        """``η``, at least the whole direction's ``share`` of signal; no less than 1 before the first comparison."""
        if "along_step" not in search:
            return torch.ones_like(share)
        seen, modelled = search["along_step"]
        tiny = torch.finfo(seen.dtype).tiny  # where no slope is signal, and the loss bends down, no step is 0/0 long
        return torch.maximum(seen / modelled.clamp_min(tiny), share).clamp_min(tiny)

    def _search_step_sizes(self, search: Averages, per_length: Tensor) -> None:
        """The module's formulas."""
        tiny, length = torch.finfo(per_length.dtype).tiny, 1 / per_length
        measured, curvature = search["slope"], search["curvature"]
        slope = torch.maximum(measured - search["noise"], self.floor * measured).clamp_min(0)
        share = slope / measured.clamp_min(tiny)
        signal = Signal(share, slope @ length / (measured @ length).clamp_min(tiny), self.own * share.square())
        along = curvature.diagonal()
        known = along > tiny**0.5 * along.amax()
        common = minimiser(slope * known, curvature, length) * length
        u = signal.pool(torch.where(known, slope / along.clamp_min(tiny), common), common)
        sizes = minimiser(slope * known, curvature, u) / self._correction(search, signal.whole) * u * per_length
        layers = Layers(per_length, self._weight_norms(), self._sizes_by_decay(sizes))
        search.keep("step_size", self.bounds(sizes, signal, layers, search))

    @torch.no_grad()
    def _weight_norms(self) -> Tensor:
        """``max(‖θ_l‖, r_l)``; unlimited for other vectors that start at zero."""
        norms = self._by_layer(torch.stack(torch._foreach_norm(self._parameters)).square()).sqrt()
        self._least_norms = self._least_norms.to(norms)
        norms = torch.maximum(norms, self._least_norms)
        return norms.masked_fill(norms == 0, torch.inf)

    def _sizes_by_decay(self, like: Tensor) -> Tensor:
        """``ζ / w``, by the largest decay of a layer's parameters."""
        decay = [max(self.group(p)["weight_decay"] for p in layer.parameters) for layer in self._layers]
        return _vector([self.SHRINKAGE / w if w else math.inf for w in decay], like)

    def _step_sizes(self, search: Averages) -> Tensor:
        """``α``; ``σ`` is a group's ``lr``, and so for a scheduler to change."""
        sizes = search["step_size"]
        return sizes * _vector([self.group(layer.parameters[0])["lr"] for layer in self._layers], sizes)


def _vector(numbers: list[float], like: Tensor) -> Tensor:
    """Numbers, mostly equal ones, written by the device itself: a copy of the host's would be waited for."""
    runs = [like.new_full((len(list(run)),), number) for number, run in groupby(numbers)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _rounding(minibatch: Minibatch, outputs: Tensor) -> Tensor:
    """``ε|f_0|``: what of a loss, or of the difference of two, is rounding. A loss that is not finite is no scale."""
    some = slice(32)  # examples enough for a scale, and no memory to speak of
    z, y = minibatch.labelled(outputs)[some], minibatch.targets[some]
    losses = torch.stack([minibatch.objective.likelihood.nll(v, y).mean() for v in (z, torch.zeros_like(z))])
    number = torch.finfo(losses.dtype)
    return (number.eps * minibatch.mean(losses).nan_to_num(0.0, 0.0, 0.0).abs().amax()).clamp_min(number.tiny)


def _least_norm(layer: Layer) -> float:
    """``r_l``: half of the norm that torch starts such a layer with, entries of variance ``1/(3 inputs)``.

    The weights of normalisations, which start at 1, shrink in ordinary training too: a quarter of theirs.
    """
    if isinstance(layer, NormalisationLayer):
        weights = (p for name, p in zip(layer.names, layer.parameters, strict=True) if name == "weight")
        return 0.25 * math.sqrt(sum(p.numel() for p in weights))
    return 0.5 * math.sqrt(sum(len(p) for p in layer.parameters if p.dim() > 1) / 3)
