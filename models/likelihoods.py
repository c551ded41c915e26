"""Likelihoods: what a model's outputs mean.

A likelihood turns outputs `z` and targets `y` into the per-example negative log-likelihood `ℓ(z, y)` and knows, in
closed form, what curvature methods ask of it: the residual `∂ℓ/∂z`, the Hessian `∂²ℓ/∂z²`, and residuals at labels
drawn from the model's own output, whose second moment is that Hessian. All are sums over an example's outputs, never
means, and none waits for the device. The first dimension runs over the `m` examples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Bernoulli:
    """Independent pixels `y ∈ [0, 1]` with logits `z`: `ℓ = Σ_j log(1 + exp z_j) − y_j z_j`.

    The metric is the squared reconstruction error summed over pixels.

    >>> outputs, targets = torch.zeros(1, 2), torch.ones(1, 2)
    >>> Bernoulli().nll(outputs, targets) / math.log(2)
    tensor([2.])
    """

    metric_name = "error"
    metric_mode = "min"

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each example, `(m,)`.

        Raises:
            ValueError: outputs and targets differ in shape.
        """
        _check_shapes(self, outputs, targets, targets.shape == outputs.shape, "targets of the outputs' shape")
        return _by_example(F.binary_cross_entropy_with_logits(outputs, _as_numbers(targets, outputs), reduction="none"))

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`∂ℓ/∂z = σ(z) − y`."""
        return outputs.sigmoid() - _as_numbers(targets, outputs)

    def sampled_residual(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The residual at labels drawn from the output, by `generator` on the outputs' device."""
        probabilities = outputs.detach().sigmoid()
        # Comparing takes half the time of torch.bernoulli on a CPU.
        labels = torch.empty_like(probabilities).uniform_(generator=generator).lt_(probabilities)
        return probabilities.sub_(labels)

    def hessian_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """`∂²ℓ/∂z² v = σ(z)(1 − σ(z)) v`."""
        probabilities = outputs.sigmoid()
        return probabilities * (1 - probabilities) * v

    def metric(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error of the reconstruction `σ(z)`, summed over pixels, `(m,)`."""
        return _by_example((outputs.sigmoid() - _as_numbers(targets, outputs)).square())


class Categorical:
    """Labels `y` `(m, …)`, each one of C classes with logits `z` `(m, …, C)`: `ℓ = Σ log Σ_c exp z_c − z_y`.

    An example has one label, or several, such as the tokens of a sequence, and its loss is their sum. Every label
    counts: padding, such as torch's −100, is refused as out of bounds (make batches of one length). The metric is the
    accuracy.

    >>> Categorical().nll(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)) / math.log(4)
    tensor([5., 5.])
    """

    metric_name = "accuracy"
    metric_mode = "max"

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each example, `(m,)`.

        Raises:
            ValueError: outputs are not one row of logits per label.
        """
        fits = outputs.dim() >= 2 and targets.shape == outputs.shape[:-1]
        _check_shapes(self, outputs, targets, fits, "outputs (m, C) and targets (m,), or a row of C for every label")
        # No label is left out, -100 neither: curvature, by labels drawn from the outputs, would not know of it.
        none = torch.iinfo(torch.long).min
        losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=none)
        return losses if targets.dim() == 1 else losses.view(len(targets), -1).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`∂ℓ/∂z = softmax(z) − onehot(y)`."""
        return _minus_onehot(outputs.softmax(-1), targets)

    def sampled_residual(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The residual at labels drawn from the output, by `generator` on the outputs' device."""
        probabilities = outputs.detach().softmax(-1)
        # argmax p/e with exponential e draws from p; torch.multinomial checks its input on the host.
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        return _minus_onehot(probabilities, (probabilities / noise).argmax(-1))

    def hessian_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """`∂²ℓ/∂z² v = p ∘ v − p (pᵀv)` with `p = softmax(z)`."""
        weighted = outputs.softmax(-1) * v
        return weighted - outputs.softmax(-1) * weighted.sum(-1, keepdim=True)

    def metric(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 where the likeliest class is the label, else 0; of several labels the mean: `(m,)`."""
        right = (outputs.argmax(-1) == targets).to(outputs.dtype)
        return right if targets.dim() == 1 else right.view(len(targets), -1).mean(1)


class Gaussian:
    """Unit-variance outputs: `ℓ = ½ ‖z − y‖²`, less its constant.

    The metric is the squared reconstruction error summed over outputs.
    """

    metric_name = "error"
    metric_mode = "min"

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each example, `(m,)`.

        Raises:
            ValueError: outputs and targets differ in shape.
        """
        _check_shapes(self, outputs, targets, targets.shape == outputs.shape, "targets of the outputs' shape")
        return self.metric(outputs, targets) / 2

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`∂ℓ/∂z = z − y`."""
        return outputs - targets

    def sampled_residual(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The residual at labels drawn from the output, by `generator` on the outputs' device: standard normal."""
        return torch.empty_like(outputs).normal_(generator=generator)

    def hessian_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """`∂²ℓ/∂z² v = v`."""
        return v

    def metric(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error summed over outputs, `(m,)`."""
        # Written out: F.mse_loss has no forward-over-reverse derivative.
        return _by_example((outputs - targets).square())


class Scaled:
    """`factor` times another likelihood's loss; the metric is the other's own.

    Args:
        likelihood: the likelihood to scale.
        factor: positive.

    Raises:
        ValueError: if the factor is not positive.
    """

    def __init__(self, likelihood: Bernoulli | Categorical | Gaussian, factor: float) -> None:
        if not factor > 0:
            raise ValueError(f"factor is {factor}; use a positive number")
        self.likelihood = likelihood
        self.factor = factor
        self.metric_name = likelihood.metric_name
        self.metric_mode = likelihood.metric_mode
        self.metric = likelihood.metric

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`factor · ℓ`, `(m,)`."""
        return self.factor * self.likelihood.nll(outputs, targets)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`factor · ∂ℓ/∂z`."""
        return self.factor * self.likelihood.residual(outputs, targets)

    def sampled_residual(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`√factor` times the other's, so that the second moment is the scaled Hessian."""
        return math.sqrt(self.factor) * self.likelihood.sampled_residual(outputs, generator)

    def hessian_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """`factor · ∂²ℓ/∂z² v`."""
        return self.factor * self.likelihood.hessian_product(outputs, v)


def _check_shapes(likelihood, outputs: Tensor, targets: Tensor, fit: bool, wanted: str) -> None:
    """Refuse what torch would broadcast, or would fail at in words of its own."""
    if not fit:
        name, shapes = type(likelihood).__name__, f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"{name} needs {wanted}; the shapes are {shapes}")


def _by_example(terms: Tensor) -> Tensor:
    """Sums over each example's terms, `(m,)`; a net with one output may leave its dimension out."""
    return terms.reshape(len(terms), -1).sum(1)


def _as_numbers(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets of the outputs' type where they are whole numbers or truths."""
    return targets if targets.is_floating_point() else targets.to(outputs.dtype)


def _minus_onehot(probabilities: Tensor, labels: Tensor) -> Tensor:
    minus_one = probabilities.new_full((), -1).expand(*labels.shape, 1)
    return probabilities.scatter_add(-1, labels[..., None], minus_one)
