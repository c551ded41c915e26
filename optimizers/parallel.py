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

Labels and signs are drawn for the whole batch, on all ranks from generators in the same state, so that every example
gets what it would get on one process, and the step is the same but for rounding. The models must start equal on all
ranks. BatchNorm sees a rank's own part, unless ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` was applied, which
torch has for CUDA alone; dropout draws its masks on each rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optimizers.layers import Trace
from optimizers.objective import Minibatch, Objective


class DataParallel(Objective):
    """An objective on one rank of the default process group; see ``Objective`` for the arguments."""

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

    @property
    def ranks(self) -> int:
        return dist.get_world_size()

    def mean(self, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole.div_(self.ranks)

    def __call__(self) -> Tensor:
        return self._exchange(super().__call__())

    def evaluate(self) -> Tensor:
        return self.mean(super().evaluate())

    def fill_gradients(self, trace: Trace, retain_graph: bool = False) -> Tensor:
        return self._exchange(super().fill_gradients(trace, retain_graph))

    def noise(self, trace: Trace, visit: Callable[[nn.Parameter, Tensor], None]) -> None:
        super().noise(trace, lambda p, e: visit(p, self.mean(e)))

    def sampled_residual(self, outputs: Tensor) -> Tensor:
        parts = [torch.empty_like(outputs) for _ in range(self.ranks)]
        dist.all_gather(parts, outputs.detach().contiguous())
        return self._mine(self.objective.likelihood.sampled_residual(torch.cat(parts), self.objective.generator))

    def _exchange(self, loss: Tensor) -> Tensor:
        """Every ``.grad`` and the loss become their means, in one exchange."""
        gradients = [p.grad for p in self.objective.model.parameters() if p.grad is not None]
        flat = self.mean(torch.cat([loss.view(1), *(g.flatten() for g in gradients)]))
        loss, *parts = flat.split([1, *(g.numel() for g in gradients)])
        for g, part in zip(gradients, parts, strict=True):
            g.copy_(part.view_as(g))
        return loss.squeeze(0)

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.ranks)[dist.get_rank()]
