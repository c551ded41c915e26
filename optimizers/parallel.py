r"""Data-parallel minibatches: every process holds an equal part of each batch, and all take the same step.

Build a ``DataParallel`` instead of an ``Objective`` on every rank, and hand each rank its part of the batch::

    torch.distributed.init_process_group("gloo")  # nccl on CUDA
    objective = DataParallel(model, likelihood, generator, population)
    loss = optimizer.step(objective(inputs.chunk(ranks)[rank], targets.chunk(ranks)[rank]))

What a method asks of a batch is then the mean over all ``R`` ranks of what each has measured on its ``m/R`` examples,
equal on all of them:

* the loss and the gradient, so that every method of gradients alone is data-parallel as it is;
* the layers' curvature ``Q``: ``L²`` numbers;
* the gradient's noise ``e``, which is linear in the examples: one more exchange of the size of the gradient, when it is
  measured.

Labels, signs and the sample that curvature is measured on are drawn for the whole batch, on all ranks from generators
in the same state, so that every example gets what it would get on one process; BatchNorm takes its statistics over the
whole batch (``SharedBatchNorm``, put in the model's place of each). So the step is the one of one process but for
rounding, if a sample of every ``k``-th example takes as many of each rank's part (``m/R`` a multiple of ``k``).
The models must start equal on all ranks. Dropout draws its masks on each rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from optimizers.layers import NORMALISATIONS
from optimizers.objective import Minibatch, Objective
from optimizers.trace import Trace


class DataParallel(Objective):
    """An objective on one rank of the default process group; see ``Objective`` for the arguments.

    The model's BatchNorm modules are replaced in it by ``SharedBatchNorm``, with the same parameters and buffers.
    """

    def __init__(self, model: nn.Module, *arguments, **settings) -> None:
        super().__init__(model, *arguments, **settings)
        shared: dict[nn.Module, nn.Module] = {}  # a module may have several names
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    shared.setdefault(child, SharedBatchNorm.of(child))
                    setattr(module, name, shared[child])

    def __call__(self, inputs, targets: Tensor, rows: Tensor | None = None) -> Shard:
        """This rank's part of a minibatch; all ranks must have as many examples.

        Raises:
            NotImplementedError: a graph's minibatch, whose rows are not independent.
        """
        if rows is not None:
            raise NotImplementedError("a graph's rows depend on one another: its batches cannot be shared by processes")
        return Shard(self, inputs if isinstance(inputs, tuple) else (inputs,), targets, None)


class Shard(Minibatch):
    """One rank's part of a minibatch."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.drawn = self.size * self.ranks

    @property
    def ranks(self) -> int:
        return dist.get_world_size()

    def mean(self, part: Tensor) -> Tensor:
        return mean(part)

    def evaluate(self) -> Tensor:
        return self.mean(super().evaluate())

    def noise(self, trace: Trace, visit: Callable[[nn.Parameter, Tensor], None]) -> None:
        super().noise(trace, lambda p, e: visit(p, self.mean(e)))

    def sampled_residual(self, outputs: Tensor) -> Tensor:
        parts = [torch.empty_like(outputs) for _ in range(self.ranks)]
        dist.all_gather(parts, outputs.detach().contiguous())
        return self._mine(self.objective.likelihood.sampled_residual(torch.cat(parts), self.objective.generator))

    def finish(self, loss: Tensor) -> Tensor:
        """Every ``.grad`` and the loss become their means, in one exchange; then as ever."""
        gradients = [p.grad for p in self.objective.model.parameters() if p.grad is not None]
        flat = self.mean(torch.cat([loss.view(1), *(g.flatten() for g in gradients)]))
        loss, *parts = flat.split([1, *(g.numel() for g in gradients)])
        for g, part in zip(gradients, parts, strict=True):
            g.copy_(part.view_as(g))
        return super().finish(loss.squeeze(0))

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.ranks)[dist.get_rank()]


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    r"""BatchNorm over the examples of all ranks, of which each has as many, on any device.

    The statistics are those of the whole batch, ``μ = ⟨x⟩`` and ``v = ⟨(x − μ)²⟩``, and so is the derivative: with ``g
    = ∂L/∂x`` at fixed ``μ, v`` and ``x̂ = (x − μ)/√(v + ε)`` it is ``g − ⟨g⟩ − x̂ ⟨g x̂⟩``. One exchange of ``2C``
    numbers each way. It can be differentiated once: the estimators of ``optimizers.curvature`` that differentiate a
    gradient again are refused by autograd. In evaluation mode it is BatchNorm.
    """

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> SharedBatchNorm:
        """The same module otherwise: with its parameters, buffers, settings and hooks."""
        shared = cls(norm.num_features, device="meta")
        shared.__dict__.update(norm.__dict__)
        return shared

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, variance = _statistics(x.detach())
        if self.track_running_stats and self.running_mean is not None:
            self._follow(mean, variance, x.numel() // x.shape[1] * dist.get_world_size())
        x = _OfTheWholeBatch.apply(x, mean, variance, self.eps)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """The running statistics; of the variance, the unbiased estimate."""
        self.num_batches_tracked += 1
        weight = self.num_batches_tracked.to(mean).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), weight)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions."""


NORMALISATIONS.add(SharedBatchNorm)  # a layer with the rules of BatchNorm


class _OfTheWholeBatch(torch.autograd.Function):
    """The identity on the input of a normalisation with fixed statistics; backward adds what moves through these."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, mean, variance)
        ctx.eps = eps
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, centre, variance = ctx.saved_tensors
        normal = F.batch_norm(x, centre, variance, eps=ctx.eps)
        over = (0, *range(2, x.dim()))
        moments = torch.stack([part.mean(over, dtype=centre.dtype) for part in (g, g * normal)])
        first, second = mean(moments).to(g.dtype).view(2, -1, *[1] * (x.dim() - 2))
        return (g - first).addcmul_(normal, second, value=-1), None, None, None


def mean(part: Tensor) -> Tensor:
    """The mean over all ranks."""
    whole = part.clone()
    dist.all_reduce(whole)
    return whole.div_(dist.get_world_size())


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel ``(C,)`` over all ranks' examples, in no less than single precision."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    own = torch.stack(torch.var_mean(x, (0, *range(2, x.dim())), correction=0))
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    variances, means = torch.stack(parts).unbind(1)
    centre = means.mean(0)
    return centre, (variances + (means - centre).square()).mean(0)  # not E x² − μ², which cancels
